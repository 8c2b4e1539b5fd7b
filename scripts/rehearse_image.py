"""Runs the steps of docker/Dockerfile without a container engine: each stage in a directory tree of its own, by chroot.

`sudo python scripts/rehearse_image.py --base ROOT --work DIR gateway [vae ...]`: ROOT is a tree with Python 3.11 in
place of the base image (`debootstrap --include=python3,python3-venv,python3-pip,ca-certificates bookworm ROOT`). Then
each image's command is started as the image's user, must answer grpc.health.v1 with SERVING and end with status 0 on
SIGTERM. What pip is told in this environment (PIP_*), it is told in there; `--mount` shows it a directory of this machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SERVICES = {"gateway": "Gateway", "encoder": "Encoder", "pose": "Pose", "denoiser": "Denoiser", "vae": "Vae"}
_SERVING_WITHIN_S = 180.0


@dataclass
class Stage:
    """One `FROM` of the Dockerfile and the instructions after it."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Tree:
    """What a stage leaves: its files, and the settings that its children inherit."""

    path: Path
    environment: dict[str, str]
    directory: str = "/"
    user: str = "0:0"
    command: tuple[str, ...] = ()


def parsed(text: str) -> dict[str, Stage]:
    """The stages by name. Raises ValueError for an instruction that is not known here."""
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if not word or word.startswith("#") or word in ("ARG", "EXPOSE"):
            continue
        if word == "FROM":
            parent, _, name = rest.split()
            current = stages[name] = Stage(name, parent)
        elif word in ("RUN", "COPY", "ENV", "WORKDIR", "USER", "CMD") and current is not None:
            current.steps.append((word, rest))
        else:
            raise ValueError(f"{word} is not known here")
    return stages


class Rehearsal:
    """Builds stages into directories below `work`, each once."""

    def __init__(self, stages: dict[str, Stage], base: Path, work: Path, mounts: list[str]) -> None:
        self._stages, self._base, self._work, self._mounts = stages, base, work, mounts
        self._trees: dict[str, Tree] = {}

    def tree(self, name: str) -> Tree:
        """The tree of a stage."""
        if name not in self._trees:
            self._trees[name] = self._built(self._stages[name]) if name in self._stages else self._bare()
        return self._trees[name]

    def _bare(self) -> Tree:
        """In place of the base image: `python` and `pip` are called so there."""
        path = self._work / "base"
        if not path.exists():
            copy_tree(self._base, path)
            for name in ("python", "pip"):
                (path / "usr/local/bin" / name).symlink_to(f"/usr/bin/{name}3")
            for marker in path.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
                marker.unlink()  # Debian's, for its own Python
            shutil.copy("/etc/resolv.conf", path / "etc/resolv.conf")
        return Tree(path, {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"})

    def _built(self, stage: Stage) -> Tree:
        parent = self.tree(stage.parent)
        tree = Tree(self._work / stage.name, dict(parent.environment), parent.directory, parent.user, parent.command)
        copy_tree(parent.path, tree.path)
        for word, rest in stage.steps:
            print(f"[{stage.name}] {word} {rest[:100]}", flush=True)
            getattr(self, f"_{word.lower()}")(tree, rest)
        return tree

    def _env(self, tree: Tree, rest: str) -> None:
        for setting in shlex.split(rest):
            name, _, value = setting.partition("=")
            tree.environment[name] = value

    def _workdir(self, tree: Tree, rest: str) -> None:
        tree.directory = rest
        inside(tree, rest).mkdir(parents=True, exist_ok=True)

    def _user(self, tree: Tree, rest: str) -> None:
        tree.user = rest

    def _cmd(self, tree: Tree, rest: str) -> None:
        tree.command = tuple(json.loads(rest))

    def _run(self, tree: Tree, rest: str) -> None:
        told = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        done = subprocess.run(self.chrooted(tree, ["/bin/sh", "-ec", rest], told), check=False)
        if done.returncode != 0:
            raise SystemExit(f"a step failed with {done.returncode}: {rest}")

    def _copy(self, tree: Tree, rest: str) -> None:
        words = rest.split()
        source_tree = self.tree(words.pop(0).removeprefix("--from=")) if words[0].startswith("--from=") else None
        *sources, target = words
        for source in sources:
            into = inside(tree, os.path.join(tree.directory, target))
            origin = inside(source_tree, source) if source_tree else ROOT / source
            if origin.is_dir():
                shutil.copytree(
                    origin, into, symlinks=True, dirs_exist_ok=True, ignore=None if source_tree else not_in_context
                )
            else:
                into = into / origin.name if target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, into)

    def chrooted(self, tree: Tree, command: list[str], extra: dict[str, str]) -> list[str]:
        """The command line that runs a command inside a tree, with its settings and nothing else."""
        mounts = [f"mkdir -p {tree.path}{path} && mount --bind -o ro {path} {tree.path}{path}" for path in self._mounts]
        mounts += [f"mount -t proc proc {tree.path}/proc", f"mount --rbind /dev {tree.path}/dev"]
        variables = [f"{name}={value}" for name, value in {**tree.environment, **extra}.items()]
        # not `chroot --userspec`, which would look at the machine's groups
        entered = ["chroot", str(tree.path), "/usr/bin/setpriv", f"--reuid={tree.user.split(':')[0]}"]
        entered += [f"--regid={tree.user.split(':')[1]}", "--clear-groups", "/usr/bin/env", "-i", *variables]
        entered += ["/bin/sh", "-c", f"cd {tree.directory} && exec {shlex.join(command)}"]
        return ["unshare", "--mount", "/bin/sh", "-ec", " && ".join([*mounts, f"exec {shlex.join(entered)}"])]


def inside(tree: Tree, path: str) -> Path:
    """A path of a tree as this machine has it."""
    return tree.path / path.lstrip("/")


def copy_tree(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "--archive", "--reflink=auto", str(source), str(target)], check=True)


def not_in_context(directory: str, names: list[str]) -> set[str]:
    """What docker/Dockerfile.dockerignore leaves out below directories that are copied."""
    generated = [name for name in names if fnmatch.fnmatch(name, "*_pb2*") and Path(directory).name == "v1"]
    return {"__pycache__", *generated} & set(names)


def answers(address: str, service: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process says SERVING before its time is over."""
    until = time.monotonic() + _SERVING_WITHIN_S
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while process.poll() is None and time.monotonic() < until:
            try:
                request = health_pb2.HealthCheckRequest(service=service)
                if stub.Check(request, timeout=1).status == health_pb2.HealthCheckResponse.SERVING:
                    return True
            except grpc.RpcError:
                pass
            time.sleep(0.2)
    return False


def started(rehearsal: Rehearsal, name: str, port: int) -> bool:
    """Starts the image's command, waits for its health, and ends it."""
    tree = rehearsal.tree(name)
    address = f"127.0.0.1:{port}"
    settings = {
        "BUNRAKU_ADDRESS": address,
        "BUNRAKU_BUNDLE": "/app/bundles/tiny",
        "BUNRAKU_DATA": "/tmp/data",
        **{f"BUNRAKU_{stage.upper()}": "127.0.0.1:1" for stage in SERVICES if stage != "gateway"},
    }
    process = subprocess.Popen(rehearsal.chrooted(tree, list(tree.command), settings))
    try:
        serving = answers(address, f"bunraku.v1.{SERVICES[name]}Service", process)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    finally:
        process.kill()
    print(f"{name}: as user {tree.user}, {'SERVING' if serving else 'not serving'}, ended with {status}", flush=True)
    return serving and status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mount", action="append", default=[], metavar="DIRECTORY")
    parser.add_argument("images", nargs="+", choices=SERVICES)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rehearsal = Rehearsal(parsed(DOCKERFILE.read_text()), arguments.base, arguments.work, arguments.mount)
    good = [started(rehearsal, image, 50350 + number) for number, image in enumerate(arguments.images)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
