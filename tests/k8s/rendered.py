"""Manifests as kustomize renders them, and what can be looked up in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
K8S = ROOT / "k8s"
Manifest = dict[str, Any]

OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
# A component that changes what another one has added
AFTER = {
    "mig": ["gpu"],
    "dra": ["gpu"],
    "object-storage": ["postgresql"],
    "leader-worker-set": ["gpu", "models-pvc", "tls", "network-policies"],
}
LWS = "leaderworkerset.sigs.k8s.io"


def kustomized(directory: Path) -> tuple[Manifest, ...]:
    """The manifests of a kustomization; skips the test where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl (1.30 or newer, for its kustomize) is not installed")
    done = subprocess.run([kubectl, "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower()
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def overlay(name: str) -> tuple[Manifest, ...]:
    """One of the overlays; `base` and `one-pod` are what they stand on."""
    return kustomized(K8S / name if name in ("base", "one-pod") else K8S / "overlays" / name)


def with_component(name: str) -> tuple[Manifest, ...]:
    """The base with one component, and those that it needs before it."""
    return base_with(*AFTER.get(name, []), name)


@cache
def base_with(*components: str) -> tuple[Manifest, ...]:
    """The base with these components, in this order."""
    with tempfile.TemporaryDirectory() as directory:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "bunraku",
            "resources": [os.path.relpath(K8S / "base", directory)],
            "components": [os.path.relpath(K8S / "components" / each, directory) for each in components],
        }
        (Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomized(Path(directory))


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    """The manifests of a kind by name."""
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def templates(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """The pods of all Deployments and LeaderWorkerSets (with the labels that its controller gives them), by program."""
    for name, deployment in of_kind(manifests, "Deployment").items():
        yield name, deployment["spec"]["template"]
    for name, group in of_kind(manifests, "LeaderWorkerSet").items():
        for index, role in enumerate(("leaderTemplate", "workerTemplate")):
            template = group["spec"]["leaderWorkerTemplate"][role]
            labels = template["metadata"]["labels"] | {f"{LWS}/name": name, f"{LWS}/worker-index": str(index)}
            yield labels["app.kubernetes.io/name"], template | {"metadata": {"labels": labels}}


@dataclass(frozen=True)
class Container:
    """A container of a pod, with what it needs of the other manifests.

    Attributes:
        name: of its program: `encoder`, ... `gateway`.
        environment: what the process gets, from the ConfigMap and its own; secrets as their key.
    """

    name: str
    spec: Manifest
    pod: Manifest
    environment: Mapping[str, str]

    @property
    def module(self) -> str:
        """Of `python -m module`."""
        python, dash_m, module = self.spec["command"]
        assert (python, dash_m) == ("python", "-m")
        return str(module)

    def port(self, variable: str) -> int:
        """Port of an address among its variables."""
        return int(self.environment[variable].rpartition(":")[2])


def containers(manifests: tuple[Manifest, ...]) -> Iterator[Container]:
    """The containers of all pods."""
    settings = {name: each["data"] for name, each in of_kind(manifests, "ConfigMap").items()}
    for name, template in templates(manifests):
        pod = template["spec"]
        for spec in pod["containers"]:
            environment: dict[str, str] = {}
            for source in spec.get("envFrom", []):
                if "configMapRef" in source:
                    environment |= settings[source["configMapRef"]["name"]]
            for variable in spec.get("env", []):
                secret = variable.get("valueFrom", {}).get("secretKeyRef", {})
                environment[variable["name"]] = variable.get("value") or f"secret:{secret['name']}/{secret['key']}"
            yield Container(name if spec["name"] == "server" else spec["name"], spec, pod, environment)
