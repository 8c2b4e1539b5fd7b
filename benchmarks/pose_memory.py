"""The pose stage within a number of bytes: frames a second, and what the process really takes. Needs a GPU.

`python -m benchmarks.pose_memory [--budgets 0,2,2.5,3.5] [--sam2 2.9,4.5] [--json FILE]` goes through the chain of
benchmarks.pose_chain (sizes of the released models, random weights, one person at 896x512) for each budget (in GiB; 0: no
limit) in a process of its own; for those after --sam2 with Segment Anything 2.1 loaded as well, which then follows two
people. Rates and milliseconds are those of a second run.

The stand-ins for onnxruntime's networks have their memory from PyTorch's allocator here, so that is given all of the
budget; what is planned is what the service plans for onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pose_chain import HEIGHT, WIDTH, Models, Stopwatch, run
from benchmarks.pose_render import dancing, synchronise
from runtime.vram import Peak, cap_memory
from services.pose.clip import Clip
from services.pose.extract import PoseExtractor
from services.pose.models import stream_sam2
from services.pose.persons.masks import PersonPrompt
from services.pose.persons.sam2 import PRESETS, Sam2Config, Sam2Masks, Sam2Network
from services.pose.plan import DEVICE_OVERHEAD_BYTES, GIB, KeptPlan, Networks, PoseMemory, plan_pose

_FRAMES = 97
_FOLLOWED = 8
_PROMPTS = [PersonPrompt((x, 40.0, x + 260, 500.0), ((x + 130, 100.0),)) for x in (100.0, 500.0)]
_COLUMNS = (
    "budget GiB",
    "plan",
    "frames/s",
    "masks ms",
    "planned GiB",
    "allocated",
    "reserved",
    "driver",
    "outside of PyTorch",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pose_memory", description=__doc__)
    parser.add_argument("--budgets", default="0,2,2.5,3.5", help="GiB, without masks")
    parser.add_argument("--sam2", default="2.9,4.5", help="GiB, with Segment Anything 2.1")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--budget", type=float, help="measure this one, and print JSON")
    parser.add_argument("--masks", action="store_true", help="with --budget: with Segment Anything 2.1")
    options = parser.parse_args()
    if options.budget is not None:
        config = PRESETS["sam2.1-hiera-large"] if options.masks else None
        torch.backends.cudnn.allow_tf32 = True
        print(json.dumps(measured(torch.device("cuda:0"), options.budget, config)))
        return
    print(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
    rows: list[dict[str, Any]] = []
    wanted = [[budget] for budget in options.budgets.split(",")]
    wanted += [[budget, "--masks"] for budget in options.sam2.split(",")]
    for arguments in wanted:
        command = [sys.executable, "-m", "benchmarks.pose_memory", "--budget", *arguments]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            print(f"| {' '.join(arguments)} | exit status {ended.returncode} |", flush=True)
            continue
        rows.append(json.loads(ended.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


def measured(device: torch.device, budget: float, sam2: Sam2Config | None, frames: int = _FRAMES) -> dict[str, Any]:
    """Runs the chain, and the masks if they are asked for; a dict of what it took, in bytes and seconds."""
    budget_bytes = round(budget * GIB) or 1024 * GIB
    memory = PoseMemory(replace(Networks(), sam2=sam2))
    plan = plan_pose(memory, HEIGHT, WIDTH, budget_bytes)
    with Peak(device) as peak:
        if budget:
            cap_memory(device, budget_bytes, DEVICE_OVERHEAD_BYTES)
        kept = KeptPlan(memory, plan, budget_bytes)
        watch = Stopwatch(device)
        models = Models(watch, dancing(frames, 1)[:, 0], kept.batch, plan.onnx_batch)
        masks = None if sam2 is None else sam2_masks(sam2, device, is_streamed=plan.masks.is_sam2_streamed)
        extractor = PoseExtractor(models)
        pictures = np.random.default_rng(0).integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)
        clip = Clip(lambda: iter(pictures), frames, HEIGHT, WIDTH)
        for _ in range(2):
            seconds = sum(run(extractor, clip).values())
        masks_s = 0.0 if masks is None else followed(masks, pictures, device)
    return {
        "budget": budget,
        "plan": str(plan),
        "rate": frames / seconds,
        "masks_s": masks_s,
        "planned": plan.device_bytes,
        "planned_outside": memory.outside(plan.onnx_batch),
        "allocated_bytes": peak.allocated_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "driver_bytes": peak.driver_bytes,
        "of_this_process_alone": peak.is_own,
    }


def sam2_masks(config: Sam2Config, device: torch.device, *, is_streamed: bool) -> Sam2Masks:
    """Of random weights."""
    network = Sam2Network(config).eval().requires_grad_(False)
    if is_streamed:
        stream_sam2(network, device)
    return Sam2Masks(network if is_streamed else network.to(device))


def followed(masks: Sam2Masks, pictures: Any, device: torch.device) -> float:
    """Seconds a frame of following two people, after two frames."""
    frames = [torch.from_numpy(picture) for picture in pictures[: _FOLLOWED + 2]]
    clip = masks.begin(frames[0], _PROMPTS)
    for frame in frames[1:2]:
        clip.follow(frame)
    synchronise(device)
    begun = time.perf_counter()
    for frame in frames[2:]:
        clip.follow(frame)
    synchronise(device)
    return (time.perf_counter() - begun) / max(1, len(frames) - 2)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    outside = row["driver_bytes"] - row["reserved_bytes"]
    taken = (row["planned"], row["allocated_bytes"], row["reserved_bytes"], row["driver_bytes"], outside)
    cells = [
        f"{row['budget']:g}" if row["budget"] else "none",
        row["plan"],
        f"{row['rate']:.0f}",
        f"{1000 * row['masks_s']:.0f}" if row["masks_s"] else "",
        *(f"{size / GIB:.2f}" for size in taken),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
