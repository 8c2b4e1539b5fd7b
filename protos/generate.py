"""Compiles protos/bunraku/v1 to Python stubs with types beside them: `python protos/generate.py`."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


def main() -> int:
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("bunraku/v1/*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    options = ["--python_out", "--grpc_python_out", "--mypy_out", "--mypy_grpc_out"]
    status: int = protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *(f"{o}={ROOT}" for o in options), *sources])
    return status


if __name__ == "__main__":
    sys.exit(main())
