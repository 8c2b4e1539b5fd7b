"""Compiles the protos before anything is packaged, so that stubs are never edited and never committed."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    """build_py that makes bunraku/v1 first."""

    def run(self) -> None:
        generate = Path(__file__).resolve().parent / "protos" / "generate.py"
        subprocess.run([sys.executable, str(generate)], check=True)
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
