"""Runs every case of a directory through this project's own modules: `python -m tests.parity DIRECTORY`.

Prints a line per case and last `N passed, N failed`; exits 1 if any failed. A case whose family has no check here fails.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

import tests.parity.denoiser
import tests.parity.encoder
import tests.parity.pose_detect
import tests.parity.pose_nlf
import tests.parity.pose_persons
import tests.parity.pose_render
import tests.parity.vae  # noqa: F401 (the modules register their families)
from tests.parity.cases import Case, cases
from tests.parity.families import check_for
from tests.parity.manifests import Manifest, manifests


def run_case(case: Case) -> tuple[bool, str]:
    """Runs one case; returns whether it passed and what to print of it."""
    check = check_for(case.name)
    if check is None:
        return False, "no check for this family"
    try:
        with torch.inference_mode():
            verdicts = [(comparison.name, *comparison.verdict()) for comparison in check(case)]
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return False, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    if not verdicts:
        return False, "the check compared nothing"
    failed = [f"{name} {text}" for name, passed, text in verdicts if not passed]
    return not failed, "; ".join(failed) if failed else ", ".join(f"{name} {text}" for name, _, text in verdicts[:3])


def run_manifest(manifest: Manifest) -> tuple[bool, str]:
    """Maps one inventory onto its module, built at full size on the meta device."""
    try:
        problems = manifest.problems()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    return not problems, "; ".join(problems) if problems else f"{manifest.count} names map"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("directory", type=Path, help="cases: NAME.json beside NAME.safetensors")
    parser.add_argument("--manifests", type=Path, help="also map every *.json.gz inventory of this directory")
    options = parser.parse_args(arguments)
    results: list[bool] = []
    for case in cases(options.directory):
        results.append(report(case.name, *run_case(case)))
    if options.manifests:
        for manifest in manifests(options.manifests):
            results.append(report(manifest.name, *run_manifest(manifest)))
    passed = sum(results)
    print(f"{passed} passed, {len(results) - passed} failed")
    return 0 if results and passed == len(results) else 1


def report(name: str, passed: bool, text: str) -> bool:
    print(f"{'PASS' if passed else 'FAIL'}  {name:<24} {text}", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
