"""Draws examples/: reference pictures and raw driving clips of the held-out split, which no training has seen.

`python -m training.draw_example [directory]`. Any of the pictures goes with any of the clips; those of one name are what
benchmarks/quality would compare.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import torch
from PIL import Image
from torch import Tensor

from training.figures import FRAMES
from training.figures.clips import Stories, sample_stories
from training.figures.motion import FRAMES_PER_SECOND

DIRECTORY = Path(__file__).resolve().parent.parent / "examples"
SIDE = 256
"""Larger than the tiny bundle's pictures, as a user's are."""
EXAMPLES = {"jumps": 517, "waves": 502, "kicks": 508, "signals": 500}
"""Names of the files, and seeds."""


def story(name: str) -> Stories:
    """What the example of that name shows."""
    generator = torch.Generator().manual_seed(EXAMPLES[name])
    return sample_stories(1, generator, frames=FRAMES, held_out=True, motley=0.15, effects=0.0, fitted=1.0)


def draw_example(name: str, directory: Path) -> None:
    """Writes the picture and the clip."""
    shown = story(name)
    Image.fromarray(shown.draw_reference(SIDE, SIDE)[0].numpy()).save(directory / f"{name}.png", optimize=True)
    write_clip(directory / f"{name}.mp4", shown.draw_driving(SIDE, SIDE)[0])


def write_clip(path: Path, frames: Tensor) -> None:
    """Frames uint8 [T, H, W, 3] as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY
    directory.mkdir(exist_ok=True)
    for name in EXAMPLES:
        draw_example(name, directory)


if __name__ == "__main__":
    main()
