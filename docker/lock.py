"""Writes docker/locks/: what each image installs beside torch, by exact version and hash.

`python docker/lock.py` asks pip what it would install on this machine (Linux on x86-64, with the Python of the images)
and keeps the hashes that the index states. torch and onnxruntime-gpu have a layer of their own in the Dockerfile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
IMAGES = {
    "gateway": ["gateway", "storage"],
    "encoder": ["encoder"],
    "pose": ["pose"],
    "denoiser": ["denoiser"],
    "vae": ["vae"],
}
# Their builds for GPUs bring what their own metadata pin; the Dockerfile names their versions
OWN_LAYER = ("torch", "onnxruntime-gpu", "triton")


def main() -> int:
    python = ".".join(map(str, sys.version_info[:2]))
    wanted = re.search(r"python:(\d+\.\d+)", (ROOT / "docker" / "Dockerfile").read_text())
    if wanted is None or wanted[1] != python:
        print(f"the images have another Python than this one, {python}", file=sys.stderr)
        return 1
    for image, extras in IMAGES.items():
        lock = LOCKS / f"{image}.txt"
        lock.write_text("".join(f"{line}\n" for line in locked(requirements(extras))))
        print(lock.relative_to(ROOT), flush=True)
    return 0


def requirements(extras: list[str]) -> list[str]:
    """What the project and its extras ask for, with extras of extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, waiting = list(project["dependencies"]), list(extras)
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(requirement)
    return sorted(set(found))


def locked(wanted: list[str]) -> list[str]:
    """Lines `name==version --hash=sha256:...` of all that pip would install for the requirements."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--only-binary", ":all:", "--report", report.name]
        subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *wanted], check=True)
        installed: list[dict[str, Any]] = json.load(report)["install"]
    lines = []
    for entry in installed:
        name, version = entry["metadata"]["name"].lower(), entry["metadata"]["version"]
        if name not in OWN_LAYER:
            digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return sorted(lines)


if __name__ == "__main__":
    sys.exit(main())
