"""Manifests say what Kubernetes takes, and what the processes and the other manifests take."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic_settings import BaseSettings

from gateway.__main__ import GatewaySettings
from runtime import telemetry
from runtime.settings import StageSettings
from services.denoiser.__main__ import DenoiserSettings
from services.denoiser.model import PRESETS
from services.denoiser.parallel import tokens_between
from tests.k8s.rendered import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    ROOT,
    Container,
    Manifest,
    containers,
    kustomized,
    of_kind,
    overlay,
    templates,
    with_component,
)

VERSIONS = ("1.36.0", "1.37.0")
WHOLE = ("base", "one-pod", *OVERLAYS)
_AFTER_GRACE_S = 10  # runtime.server: what a stage takes to end when its grace is over
_CUSTOM = "keda.sh", "leaderworkerset.x-k8s.io", "monitoring.coreos.com", "cert-manager.io", "gateway.networking.k8s.io"


@pytest.fixture(params=[*WHOLE, *(f"components/{name}" for name in COMPONENTS)])
def manifests(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    """Each overlay, and the base with each component."""
    kind, _, component = request.param.partition("/")
    return with_component(component) if component else overlay(kind)


def settings_classes(container: Container) -> list[type[BaseSettings]]:
    """What reads the environment of its process."""
    if container.module == "gateway":
        return [GatewaySettings]
    return [StageSettings, DenoiserSettings] if container.name == "denoiser" else [StageSettings]


def is_custom(manifest: Manifest) -> bool:
    return str(manifest["apiVersion"]).split("/")[0] in _CUSTOM


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # it reads megabytes of schemas for each manifest
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
    rendered = [*map(overlay, WHOLE), *map(with_component, COMPONENTS)]
    # what a custom resource makes pods of is known to Kubernetes too
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-a-group", **template["metadata"]}, **template}
        for _, template in templates(with_component("leader-worker-set"))
    ]
    rendered.append(tuple(pods))
    different = {json.dumps(each): each for manifests in rendered for each in manifests if not is_custom(each)}
    assert len(different) > 40
    for manifest in different.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    deployment = json.loads(json.dumps(of_kind(overlay("base"), "Deployment")["vae"]))
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.fixture(scope="module")
def schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """Schemas of custom resources, by apiVersion and kind, from the CRDs in $CRDS."""
    if "CRDS" not in os.environ:
        pytest.skip("CRDS names no directory with the CRDs of KEDA, Prometheus' operator, cert-manager and others")
    found = {}
    for path in Path(os.environ["CRDS"]).rglob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            if isinstance(crd, dict) and crd.get("kind") == "CustomResourceDefinition":
                spec = crd["spec"]
                for version in spec["versions"]:
                    key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    found[key] = closed(version["schema"]["openAPIV3Schema"])
    return found


def closed(schema: Any) -> Any:
    """A structural schema that refuses what it does not name, as the API server's strict validation does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        preserved = schema.get("x-kubernetes-preserve-unknown-fields", False)
        result["additionalProperties"] = bool(preserved)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


def test_custom_resources_fit_their_own_schemas(
    manifests: tuple[Manifest, ...], schemas: dict[tuple[str, str], dict[str, Any]]
) -> None:
    import jsonschema

    for manifest in filter(is_custom, manifests):
        schema = schemas[manifest["apiVersion"], manifest["kind"]]
        schema["properties"]["metadata"] = {"type": "object"}  # ObjectMeta, which CRDs leave to Kubernetes
        jsonschema.Draft202012Validator(schema).validate(manifest)


def test_every_variable_is_one_that_the_process_reads(manifests: tuple[Manifest, ...]) -> None:
    for container in containers(manifests):
        fields = [name for each in settings_classes(container) for name in each.model_fields]
        known = {f"BUNRAKU_{name.upper()}" for name in fields}
        own = {variable["name"] for variable in container.spec.get("env", [])}
        # obstore's: gateway.blobs
        assert own - {"AWS_REGION", "AWS_ENDPOINT_URL"} <= known, container.name
    shared = {name for each in of_kind(manifests, "ConfigMap").values() for name in each["data"]} - {"dashboard.json"}
    every = {f"BUNRAKU_{name.upper()}" for each in (StageSettings, GatewaySettings) for name in each.model_fields}
    assert shared <= every


def test_every_value_is_one_that_the_process_takes(
    manifests: tuple[Manifest, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for container in containers(manifests):
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("BUNRAKU_")]:
                patch.delenv(name)
            for name, value in container.environment.items():
                patch.setenv(name, value)
            for each in settings_classes(container):
                each()


def test_commands_are_modules_that_can_be_run(manifests: tuple[Manifest, ...]) -> None:
    for container in containers(manifests):
        package = importlib.util.find_spec(f"{container.module}.__main__")
        assert package is not None


def test_probes_ask_the_service_of_the_process_at_its_health_port(manifests: tuple[Manifest, ...]) -> None:
    for container in containers(manifests):
        service = f"bunraku.v1.{container.name.capitalize()}Service"
        health = container.port("BUNRAKU_HEALTH_ADDRESS")
        for probe in ("startupProbe", "readinessProbe"):
            assert container.spec[probe]["grpc"] == {"port": health, "service": service}
        assert container.spec["livenessProbe"]["grpc"] == {"port": health}
        assert service in (K8S.parent / "README.md").read_text()


def test_declared_ports_are_those_that_the_process_listens_on(manifests: tuple[Manifest, ...]) -> None:
    for container in containers(manifests):
        listens = [container.port(f"BUNRAKU_{name}ADDRESS") for name in ("", "HEALTH_", "METRICS_")]
        assert [port["containerPort"] for port in container.spec["ports"]] == listens
    for _, template in templates(manifests):
        ports = [port["containerPort"] for container in template["spec"]["containers"] for port in container["ports"]]
        assert len(ports) == len(set(ports))


def test_a_pod_is_given_the_time_that_its_processes_take_to_drain(manifests: tuple[Manifest, ...]) -> None:
    for container in containers(manifests):
        sleep_s = container.spec["lifecycle"]["preStop"]["sleep"]["seconds"]
        needed_s = sleep_s + float(container.environment["BUNRAKU_GRACE_S"]) + _AFTER_GRACE_S
        assert container.pod["terminationGracePeriodSeconds"] >= needed_s, container.name


def test_compiled_kernels_are_on_disk_and_outlive_their_container(manifests: tuple[Manifest, ...]) -> None:
    found = re.search(r"TRITON_CACHE_DIR=(\S+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert found is not None
    for container in containers(manifests):
        [name] = [
            each["name"] for each in container.spec["volumeMounts"] if found[1].startswith(each["mountPath"] + "/")
        ]
        [volume] = [each for each in container.pod["volumes"] if each["name"] == name]
        assert "medium" not in volume["emptyDir"]


def test_the_gateway_is_patient_for_as_long_as_a_stage_may_load(manifests: tuple[Manifest, ...]) -> None:
    found = {container.name: container for container in containers(manifests)}
    patience_s = float(found["gateway"].environment["BUNRAKU_STAGE_PATIENCE_S"])
    for container in found.values():
        startup = container.spec["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] < patience_s


def test_the_gateway_calls_addresses_that_are_there(manifests: tuple[Manifest, ...]) -> None:
    services = of_kind(manifests, "Service")
    found = {container.name: container for container in containers(manifests)}
    for stage in telemetry.STAGES:
        host, _, port = found["gateway"].environment[f"BUNRAKU_{stage.upper()}"].rpartition(":")
        assert int(port) == found[stage].port("BUNRAKU_ADDRESS")
        if host == "127.0.0.1":  # one pod
            assert found[stage].pod is found["gateway"].pod
        else:
            assert services[host]["spec"]["clusterIP"] == "None"
            assert int(port) in [each["port"] for each in services[host]["spec"]["ports"]]


def test_services_select_pods_and_name_their_ports(manifests: tuple[Manifest, ...]) -> None:
    for service in of_kind(manifests, "Service").values():
        selector = service["spec"]["selector"].items()
        (pod,) = [each["spec"] for _, each in templates(manifests) if selector <= each["metadata"]["labels"].items()]
        ports = {port["containerPort"] for container in pod["containers"] for port in container["ports"]}
        assert {port["port"] for port in service["spec"]["ports"]} <= ports


def test_what_a_pod_refers_to_is_there(manifests: tuple[Manifest, ...]) -> None:
    accounts, claims = of_kind(manifests, "ServiceAccount"), of_kind(manifests, "PersistentVolumeClaim")
    claim_templates, certificates = of_kind(manifests, "ResourceClaimTemplate"), of_kind(manifests, "Certificate")
    secrets = {each["spec"]["secretName"] for each in certificates.values()}
    for name, template in templates(manifests):
        pod = template["spec"]
        assert pod["serviceAccountName"] in accounts
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            assert len(volume) == 2, f"{name}: {volume} must be of one kind"
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        assert mounted == set(volumes)
        given = {claim["name"] for claim in pod.get("resourceClaims", [])}
        taken = {c["name"] for each in pod["containers"] for c in each["resources"].get("claims", [])}
        assert given == taken
        for claim in pod.get("resourceClaims", []):
            assert claim["resourceClaimTemplateName"] in claim_templates


def test_every_disruption_budget_covers_pods_and_every_deployment_has_one(manifests: tuple[Manifest, ...]) -> None:
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for name, template in templates(manifests):
        labels = template["metadata"]["labels"]
        assert budgets[name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert budgets[name]["spec"]["maxUnavailable"] == 1


def test_pods_meet_the_restricted_standard(manifests: tuple[Manifest, ...]) -> None:
    for namespace in of_kind(manifests, "Namespace").values():
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for container in containers(manifests):
        pod, own = container.pod["securityContext"], container.spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert container.pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & container.pod.keys()
        assert not [volume for volume in container.pod["volumes"] if "hostPath" in volume]
        assert container.spec["resources"]["limits"]["memory"]


def test_a_certificate_is_of_the_name_that_the_gateway_calls() -> None:
    manifests = with_component("tls")
    certificates = of_kind(manifests, "Certificate")
    found = {container.name: container for container in containers(manifests)}
    for name, container in found.items():
        (volume,) = [volume for volume in container.pod["volumes"] if volume["name"] == "tls"]
        assert volume["secret"]["secretName"] == certificates[name]["spec"]["secretName"]
        (mount,) = [mount for mount in container.spec["volumeMounts"] if mount["name"] == "tls"]
        for variable in ("BUNRAKU_TLS_CA", "BUNRAKU_TLS_CERTIFICATE", "BUNRAKU_TLS_KEY"):
            assert Path(container.environment[variable]).parent == Path(mount["mountPath"])
    for stage in telemetry.STAGES:
        host = found["gateway"].environment[f"BUNRAKU_{stage.upper()}"].rpartition(":")[0]
        assert host in certificates[stage]["spec"]["dnsNames"]


def test_network_policies_let_through_the_edges_of_the_pipeline_and_no_more() -> None:
    manifests = with_component("network-policies")
    policies = of_kind(manifests, "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (into_stages,) = policies["stages"]["spec"]["ingress"]
    (caller,) = into_stages["from"]
    assert caller == {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "gateway"}}}
    found = {container.name: container for container in containers(manifests)}
    assert [port["port"] for port in into_stages["ports"]] == [found["vae"].port("BUNRAKU_ADDRESS")]
    (scraped,) = policies["every-part"]["spec"]["ingress"]
    assert [port["port"] for port in scraped["ports"]] == [found["vae"].port("BUNRAKU_METRICS_ADDRESS")]


def test_scaling_stands_on_rules_and_deployments_that_are_there() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    scaled = list(yaml.safe_load_all((K8S / "components/keda/scaled-objects.yaml").read_text()))
    assert {each["spec"]["scaleTargetRef"]["name"] for each in scaled} == set(telemetry.STAGES)
    for each in scaled:
        stage = each["metadata"]["name"]
        (trigger,) = each["spec"]["triggers"]
        assert each["spec"]["scaleTargetRef"]["name"] == stage
        assert trigger["metadata"]["query"] == f'bunraku:stage_queued_work_seconds{{stage="{stage}"}}'
        assert trigger["metadata"]["query"].partition("{")[0] in recorded
        # a denoise that was begun is not left without a replica to go on
        assert each["spec"]["minReplicaCount"] == (1 if stage == "denoiser" else 0)
    adapter = (K8S / "components/hpa/adapter-rule.yaml").read_text()
    for each in yaml.safe_load_all((K8S / "components/hpa/autoscalers.yaml").read_text()):
        (metric,) = each["spec"]["metrics"]
        assert f"as: {metric['external']['metric']['name']}" in adapter


@pytest.mark.parametrize("component", ["keda", "hpa"])
def test_what_is_scaled_has_no_fixed_number_of_replicas(component: str) -> None:
    deployments = of_kind(with_component(component), "Deployment")
    assert {name for name, each in deployments.items() if "replicas" not in each["spec"]} == set(telemetry.STAGES)


def rules() -> Iterator[dict[str, Any]]:
    manifest = yaml.safe_load((K8S / "components/prometheus/rules.yaml").read_text())
    for group in manifest["spec"]["groups"]:
        yield from group["rules"]


def expressions() -> Iterator[str]:
    """Everything that is asked of Prometheus: rules, dashboard, scaling."""
    yield from (rule["expr"] for rule in rules())
    board = json.loads((K8S / "components/prometheus/dashboard.json").read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel.get("targets", []))


def test_rules_and_dashboard_ask_for_metrics_and_labels_that_there_are() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    metrics = {metric.name: metric for metric in telemetry.METRICS}
    asked = set()
    for expression in expressions():
        assert set(re.findall(r"\bbunraku:\w+", expression)) <= recorded
        for name, labels in re.findall(r"\b(bunraku_\w+)(?:\{([^}]*)\})?", expression):
            metric = metrics[re.sub(r"_(total|bucket|count|sum)$", "", name)]
            asked.add(metric.name)
            for label, _, value in re.findall(r'(\w+)(=|!=|=~)"([^"]*)"', labels):
                assert set(value.split("|")) <= metric.labels[label], expression
    assert asked == metrics.keys()


def test_every_alert_is_explained_to_operators() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules():
        if "alert" in rule:
            assert rule["annotations"]["summary"]
            assert f"`{rule['alert']}`" in guide


def test_everything_is_in_one_namespace(manifests: tuple[Manifest, ...]) -> None:
    (namespace,) = of_kind(manifests, "Namespace")
    for manifest in manifests:
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == namespace, manifest["metadata"]["name"]


def test_no_secret_is_in_the_manifests(manifests: tuple[Manifest, ...]) -> None:
    assert not of_kind(manifests, "Secret")


def test_one_setting_that_changes_rolls_every_pod() -> None:
    names = {
        source["configMapRef"]["name"]
        for container in containers(overlay("base"))
        for source in container.spec["envFrom"]
    }
    with_tls = {
        source["configMapRef"]["name"]
        for container in containers(with_component("tls"))
        for source in container.spec["envFrom"]
    }
    assert len(names) == len(with_tls) == 1
    assert names != with_tls


def test_both_bases_serve_the_same_programs_with_the_same_patience() -> None:
    base = {each.name: each for each in containers(overlay("base"))}
    pod = {each.name: each for each in containers(overlay("one-pod"))}
    assert base.keys() == pod.keys()
    for name, container in base.items():
        other = pod[name]
        assert (container.module, container.spec["image"]) == (other.module, other.spec["image"])
        assert container.environment["BUNRAKU_GRACE_S"] == other.environment["BUNRAKU_GRACE_S"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert {**container.spec[probe], "grpc": 0} == {**other.spec[probe], "grpc": 0}


def test_stages_on_one_gpu_share_its_memory_and_a_little_is_left() -> None:
    fractions = [
        float(each.environment["BUNRAKU_VRAM_FRACTION"])
        for each in containers(overlay("one-gpu"))
        if each.name in telemetry.STAGES
    ]
    assert len(fractions) == 4
    # what the CUDA contexts of four processes take is outside of their fractions
    assert 0.85 <= sum(fractions) <= 0.95


def test_a_group_has_the_pods_of_the_denoiser_and_serves_at_its_leader() -> None:
    manifests = with_component("leader-worker-set")
    assert "denoiser" not in of_kind(manifests, "Deployment")
    group = of_kind(manifests, "LeaderWorkerSet")["denoiser-group"]
    # the controller takes a Service of the group's name for its own, in which pods must be found before they are ready
    assert group["metadata"]["name"] not in of_kind(manifests, "Service")
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    leader, worker = [template for name, template in templates(manifests) if name == "denoiser"]
    assert leader["spec"] == worker["spec"]
    (container,) = leader["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
    selector = of_kind(manifests, "Service")["denoiser"]["spec"]["selector"].items()
    assert selector <= leader["metadata"]["labels"].items()
    assert not selector <= worker["metadata"]["labels"].items()


def test_network_policies_let_the_pods_of_a_group_and_nobody_else_talk_at_any_port() -> None:
    manifests = with_component("leader-worker-set")
    policy = of_kind(manifests, "NetworkPolicy")["denoiser-group"]["spec"]
    chosen = policy["podSelector"]["matchLabels"].items()
    selected = [template for _, template in templates(manifests) if chosen <= template["metadata"]["labels"].items()]
    assert len(selected) == 2
    peers = [{"podSelector": policy["podSelector"]}]
    assert (policy["ingress"], policy["egress"]) == ([{"from": peers}], [{"to": peers}])


def test_the_size_of_a_group_divides_the_heads_of_the_models() -> None:
    group = of_kind(with_component("leader-worker-set"), "LeaderWorkerSet")["denoiser-group"]
    size = group["spec"]["leaderWorkerTemplate"]["size"]
    assert size > 1
    for config in PRESETS.values():
        tokens_between(config.num_heads, size)


def test_kustomize_refuses_a_broken_kustomization(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [absent.yaml]\n")
    with pytest.raises(AssertionError, match=re.escape("absent.yaml")):
        kustomized(tmp_path)
