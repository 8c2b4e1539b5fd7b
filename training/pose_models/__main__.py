"""Trains a pose model, or writes the bundle's files or pictures of the curves from what was trained."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from training.pose_models.detector import DetectorTask
from training.pose_models.drawing import draw
from training.pose_models.joints import JointTask
from training.pose_models.keypoints import KeypointTask
from training.pose_models.loop import Schedule, Task, train
from training.pose_models.networks import DETECTOR_SIDE

_SEED, _HELD_OUT_SEED, _HELD_OUT_PICTURES = 1, 2, 2048
_LEARNING_RATES = {"detector": 2e-3, "keypoints": 2e-3, "joints": 2e-3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.pose_models", description=__doc__)
    parser.add_argument("what", choices=[*_LEARNING_RATES, "export", "curves"])
    parser.add_argument("--directory", type=Path, required=True, help="of checkpoints and logs, a folder per model")
    parser.add_argument("--to", type=Path, help="folder that export or curves write to")
    parser.add_argument("--seconds", type=float, default=150.0, help="of training, without the drawing")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.what in ("export", "curves"):
        if arguments.to is None:
            parser.error(f"{arguments.what} needs --to")
        _write(arguments.what, arguments.directory, arguments.to)
        return
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.set_num_threads(1)  # what is left to the CPU is small, and several trainings may share it
    torch.manual_seed(_SEED)
    task = _task(arguments.what)
    task.model.to(device)
    began = time.monotonic()
    pictures = draw(arguments.pictures, _SEED, device, held_out=False)
    held_out = draw(min(_HELD_OUT_PICTURES, arguments.pictures), _HELD_OUT_SEED, device, held_out=True)
    print(f"{len(pictures) + len(held_out)} pictures drawn in {time.monotonic() - began:.1f} s", flush=True)
    if arguments.what != "detector":
        pictures, held_out = pictures[pictures.shown], held_out[held_out.shown]
    schedule = Schedule(arguments.seconds, learning_rate=_LEARNING_RATES[arguments.what])
    train(task, pictures, held_out, schedule, arguments.directory / arguments.what, seed=_SEED)


def _write(what: str, directory: Path, to: Path) -> None:
    """Writes a bundle's files, or pictures of the curves; what that needs is not needed to train."""
    to.mkdir(parents=True, exist_ok=True)
    if what == "export":
        from training.pose_models.export import write_bundle_files

        write_bundle_files(directory, to)
        return
    from training.pose_models.curves import draw_curves

    for name in _LEARNING_RATES:
        saved = torch.load(directory / name / "checkpoint.pt", map_location="cpu", weights_only=True)
        draw_curves(saved["log"], name, to / f"pose-{name}.svg")


def _task(name: str) -> Task:
    if name == "detector":
        return DetectorTask(DETECTOR_SIDE)
    return KeypointTask() if name == "keypoints" else JointTask()


if __name__ == "__main__":
    main()
