"""Draws examples/reference.png and examples/pose.mp4: a figure, and the skeleton that it is to follow.

`python -m training.draw_example`. Both are this project's own; the skeleton has SCAIL's limbs and colours.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

DIRECTORY = Path(__file__).resolve().parent.parent / "examples"
SIZE = 256
NUM_FRAMES, FRAMES_PER_SECOND = 25, 16

Point = tuple[float, float]
# Limbs in SCAIL's order of drawing: from, to, colour
LIMBS = (
    ("neck", "right_shoulder", (255, 0, 0)),
    ("right_shoulder", "right_elbow", (255, 85, 0)),
    ("right_elbow", "right_wrist", (255, 170, 0)),
    ("neck", "left_shoulder", (0, 255, 255)),
    ("left_shoulder", "left_elbow", (0, 170, 255)),
    ("left_elbow", "left_wrist", (0, 85, 255)),
    ("neck", "right_hip", (180, 255, 0)),
    ("right_hip", "right_knee", (0, 255, 0)),
    ("right_knee", "right_ankle", (0, 255, 85)),
    ("neck", "left_hip", (0, 0, 255)),
    ("left_hip", "left_knee", (85, 0, 255)),
    ("left_knee", "left_ankle", (170, 0, 255)),
    ("neck", "nose", (150, 150, 150)),
)


def joints(phase: float) -> dict[str, Point]:
    """Where a dancing figure's joints are, in units of the picture's side; one dance has a phase of 0 to 1."""
    beat = math.sin(2 * math.pi * phase)
    neck = (0.5 + 0.04 * beat, 0.3)
    points = {"neck": neck, "nose": (neck[0] + 0.02 * beat, neck[1] - 0.1)}
    for side, sign in (("right", -1), ("left", 1)):
        shoulder = (neck[0] + 0.09 * sign, neck[1] + 0.02)
        hip = (0.5 + 0.06 * sign + 0.02 * beat, 0.56)
        arm = math.pi / 2 - sign * (0.9 + 0.7 * beat * sign)
        leg = math.pi / 2 - sign * (0.15 + 0.12 * beat)
        elbow = _moved(shoulder, 0.13, arm)
        knee = _moved(hip, 0.17, leg)
        points |= {
            f"{side}_shoulder": shoulder,
            f"{side}_elbow": elbow,
            f"{side}_wrist": _moved(elbow, 0.12, arm - sign * (0.9 + 0.6 * beat)),
            f"{side}_hip": hip,
            f"{side}_knee": knee,
            f"{side}_ankle": _moved(knee, 0.17, leg + 0.2 * sign * max(0.0, sign * beat)),
        }
    return points


def draw_skeleton(points: dict[str, Point]) -> Image.Image:
    """The limbs as thick lines on black."""
    picture = Image.new("RGB", (SIZE, SIZE))
    draw = ImageDraw.Draw(picture)
    for start, end, colour in LIMBS:
        _capsule(draw, points[start], points[end], 0.018, colour)
    return picture


def draw_figure(points: dict[str, Point]) -> Image.Image:
    """A figure with clothes, in front of a wall."""
    picture = Image.new("RGB", (SIZE, SIZE), (196, 212, 226))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0.86 * SIZE, SIZE, SIZE), fill=(150, 128, 104))
    skin, shirt, trousers = (232, 182, 148), (205, 70, 60), (52, 74, 120)
    for side in ("right", "left"):
        _capsule(draw, points[f"{side}_hip"], points[f"{side}_knee"], 0.05, trousers)
        _capsule(draw, points[f"{side}_knee"], points[f"{side}_ankle"], 0.042, trousers)
        _capsule(draw, points[f"{side}_elbow"], points[f"{side}_wrist"], 0.028, skin)
        _capsule(draw, points[f"{side}_shoulder"], points[f"{side}_elbow"], 0.036, shirt)
    corners = [points[name] for name in ("right_shoulder", "left_shoulder", "left_hip", "right_hip")]
    draw.polygon([(x * SIZE, y * SIZE) for x, y in corners], fill=shirt)
    for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
        _capsule(draw, start, end, 0.035, shirt)
    _capsule(draw, points["neck"], points["nose"], 0.03, skin)
    _capsule(draw, points["nose"], points["nose"], 0.075, skin)
    x, y = points["nose"]
    draw.pieslice([c * SIZE for c in (x - 0.08, y - 0.085, x + 0.08, y + 0.06)], 180, 360, fill=(70, 48, 36))
    return picture


def _moved(point: Point, length: float, angle: float) -> Point:
    return point[0] + length * math.cos(angle), point[1] + length * math.sin(angle)


def _capsule(draw: ImageDraw.ImageDraw, start: Point, end: Point, radius: float, colour: tuple[int, int, int]) -> None:
    draw.line(
        [start[0] * SIZE, start[1] * SIZE, end[0] * SIZE, end[1] * SIZE], fill=colour, width=round(2 * radius * SIZE)
    )
    for x, y in (start, end):
        draw.ellipse([c * SIZE for c in (x - radius, y - radius, x + radius, y + radius)], fill=colour)


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    draw_figure(joints(0.0)).save(DIRECTORY / "reference.png", optimize=True)
    with av.open(DIRECTORY / "pose.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options={"crf": "14"})
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for number in range(NUM_FRAMES):
            skeleton = np.asarray(draw_skeleton(joints(2 * number / NUM_FRAMES)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(skeleton, format="rgb24")))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main()
