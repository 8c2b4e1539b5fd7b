"""Scores a bundle through its real services, and says whether every floor is reached.

    python -m benchmarks.quality [--bundle DIR] [--bf16 FILE] [--clips N] [--effects N] [--fewer] [--presets] [--json FILE] [--sheet FILE]

Starts the five processes, animates reference pictures of the held-out split after raw driving clips, and compares with
what is known of both. Exit status 1 where a floor is missed. `--bf16` names the transformer before it was quantised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality import scoring
from benchmarks.quality.bundles import with_transformer
from benchmarks.quality.scores import Score, as_json, table
from benchmarks.quality.services import running
from benchmarks.quality.sheet import write_sheet
from benchmarks.quality.suite import Suite
from runtime.bundles import load_bundle
from services.denoiser.precision import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent.parent
_SHOWN = 4


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as directory:
        scores = asyncio.run(_measure(arguments, Path(directory)))
    print(table(scores))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(scores), indent=1) + "\n")
    missed = [score.name for score in scores if score.missed]
    print(f"\n{len(missed)} missed" + "".join(f"\n- {name}" for name in missed))
    sys.exit(bool(missed))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "tiny")
    parser.add_argument("--bf16", type=Path, help="safetensors file of the transformer in bfloat16")
    parser.add_argument("--clips", type=int, default=12, help="whose poses are read; at least 2")
    parser.add_argument("--effects", type=int, default=12, help="clips whose captions ask for effects; at least 1")
    parser.add_argument("--quick", action="store_true", help="leaves out what has no floor")
    parser.add_argument("--fewer", action="store_true", help="step caches, less guidance and fewer steps alone")
    parser.add_argument("--presets", action="store_true", help="the precisions of the denoiser alone")
    parser.add_argument("--json", type=Path, help="file for the scores")
    parser.add_argument("--sheet", type=Path, help="PNG to look at")
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace, directory: Path) -> list[Score]:
    """All scores; each is told as soon as it is known."""
    side = load_bundle(arguments.bundle).video.height
    files, data = directory / "files", directory / "data"
    files.mkdir()
    suite = Suite.make(files, side, arguments.clips, arguments.effects)
    scores: list[Score] = []
    if arguments.presets:
        exact: list[Tensor] = []
        for precision in PRECISIONS:
            async with running(arguments.bundle, data / precision, precision) as services:
                motley, further = await scoring.score_beside(services, suite, precision, exact, PRECISIONS[0])
            exact = exact or motley
            _tell(scores, further)
        return scores
    async with running(arguments.bundle, data) as services:
        if arguments.fewer:
            async for further in scoring.score_fewer(services, suite):
                _tell(scores, further)
            return scores
        _tell(scores, await scoring.score_vae(services, suite))
        _tell(scores, await scoring.score_extraction(services, suite))
        own, effects = await scoring.animate(services, suite)
        if arguments.sheet is not None:
            cases = [*suite.motley[:_SHOWN], *suite.effects[:_SHOWN]]
            write_sheet(arguments.sheet, cases, [*own[:_SHOWN], *effects[:_SHOWN]])
        generated = scoring.score_generated(own, effects, suite)
        _tell(scores, generated)
        _tell(scores, await scoring.score_controls(services, suite))
        _tell(scores, scoring.score_reader(suite))
        if not arguments.quick:
            _tell(scores, await scoring.score_guidance(services, suite))
    _tell(scores, [await _quantisation(arguments, directory, suite, generated[0])])
    return scores


def _tell(scores: list[Score], further: list[Score]) -> None:
    scores += further
    for score in further:
        print(f"{score.name}: {score.value}", file=sys.stderr, flush=True)


async def _quantisation(arguments: argparse.Namespace, directory: Path, suite: Suite, int8: Score) -> Score:
    """How far the quantised transformer's PCK is from that of the transformer before."""
    name = "INT8 against bf16: difference of PCK@0.1"
    if arguments.bf16 is None:
        return Score(name, None, "", 0.01, "at most")
    bundle = with_transformer(arguments.bundle, arguments.bf16, directory / "bf16")
    async with running(bundle, directory / "bf16-data") as services:
        videos = await services.animate(suite.motley, [case.driving for case in suite.motley], named="bf16")
    assert int8.value is not None
    return Score(name, abs(int8.value - scoring.pck(videos, suite.motley)), "", 0.01, "at most", len(videos))


if __name__ == "__main__":
    main()
