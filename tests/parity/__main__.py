"""Runs every case of a directory through this project's own modules: `python -m tests.parity DIRECTORY`.

Prints a line per case and last `N passed, N failed`; exits 1 if any failed. A case whose family has no check here fails.

`--device cuda` computes the networks there, in float32 without TF32, and the rest (solvers, tables, what is drawn) on the
host as ever. Machines that are lent for their GPU alone may lack packages: families whose modules cannot be imported are
named and their cases skipped then, and only then.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from tests.parity.cases import CPU, Case, cases
from tests.parity.families import check_for, fits_any_device
from tests.parity.manifests import Manifest, manifests

# They register their families
MODULES = ("denoiser", "encoder", "pose_detect", "pose_nlf", "pose_persons", "pose_render", "vae")


def register(device: torch.device) -> list[str]:
    """Imports the checks. On a GPU those that lack a package are named and left out; gives their modules."""
    left_out = []
    for module in MODULES:
        try:
            importlib.import_module(f"tests.parity.{module}")
        except ModuleNotFoundError as error:
            if device.type == "cpu":
                raise
            print(f"SKIP  the families of {module}: {error}")
            left_out.append(module)
    return left_out


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
    parser.add_argument("--device", type=torch.device, default=CPU, help="of the networks, as torch names it")
    options = parser.parse_args(arguments)
    left_out = register(options.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions are rounded otherwise; products are not
    results: list[bool] = []
    for case in cases(options.directory):
        if left_out and check_for(case.name) is None:
            print(f"SKIP  {case.name}")
            continue
        device = options.device if fits_any_device(case.name) else CPU
        right, text = run_case(replace(case, device=device))
        results.append(report(case.name, right, text if options.device == CPU else f"[{device}] {text}"))
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
