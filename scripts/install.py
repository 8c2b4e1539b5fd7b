"""Fills the current virtual environment with this project and everything it needs: `.venv/bin/python scripts/install.py`.

Versions come from constraints.txt. On Linux without an NVIDIA GPU the CPU build of torch is taken where it can be had,
because the default build brings gigabytes of CUDA libraries that would never be used.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_REACHABLE_WITHIN_S = 5


def main() -> int:
    has_gpu = shutil.which("nvidia-smi") is not None
    extras = f"dev,{'gpu' if has_gpu else 'cpu'}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += [
        "--constraint",
        str(ROOT / "constraints.txt"),
        *torch_source(has_gpu),
        "--editable",
        f"{ROOT}[{extras}]",
    ]
    print(f"installing bunraku[{extras}] and what it needs; the first time this takes some minutes", flush=True)
    return subprocess.run(command, check=False).returncode


def torch_source(has_gpu: bool) -> list[str]:
    """Where pip is to look for torch besides its own index."""
    if has_gpu or platform.system() != "Linux":
        return []
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=_REACHABLE_WITHIN_S):
            return ["--extra-index-url", CPU_INDEX]
    except (urllib.error.URLError, OSError):
        return []


if __name__ == "__main__":
    sys.exit(main())
