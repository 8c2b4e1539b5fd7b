"""What back-ends are asked, how a clip goes through them, and what is cut out with their masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from services.pose.people import People
from services.pose.persons.masks import BACKGROUNDS, PersonPrompt, alone, masks_of_clip, prompt_of


class CountingMasks:
    """Masks that are all of the frame's number, and how many frames have been asked for."""

    def __init__(self) -> None:
        self.first = torch.zeros(0)
        self.begun: list[tuple[PersonPrompt, ...]] = []

    def begin(self, first_frame: Tensor, prompts: Sequence[PersonPrompt]) -> CountingMasks:
        self.begun.append(tuple(prompts))
        self.first = self.follow(first_frame)
        return self

    def follow(self, frame: Tensor) -> Tensor:
        return frame[None, ..., 0].float()


def person(points: Sequence[tuple[float, float]], visible: Sequence[int]) -> People:
    bodies = np.zeros((2, 24, 2))
    bodies[1, [0, 1, 14, 15]] = points
    shown = np.zeros((2, 24), np.bool_)
    shown[1, list(visible)] = True
    boxes = np.array([[0, 0, 1, 1], [0.25, 0.5, 0.75, 1.0]])
    return People(boxes, bodies, shown, np.zeros((2, 68, 2)), np.zeros((2, 2, 21, 2)))


def test_prompt_is_the_box_and_the_visible_points_of_the_head_in_pixels() -> None:
    points = [(0.5, 0.6), (0.4, 0.7), (0.45, 0.55), (0.55, 0.55)]
    prompt = prompt_of(person(points, [0, 2, 14]), 1, height=100, width=200)
    np.testing.assert_allclose(prompt.box, (50, 50, 150, 100))
    np.testing.assert_allclose(prompt.points, [(100, 60), (90, 55)])


def test_points_outside_the_frame_are_left_out_of_a_prompt() -> None:
    prompt = prompt_of(person([(-0.1, 0.6), (0.4, 0.7), (0.4, 0.7), (0.4, 0.7)], [0, 1]), 1, height=100, width=200)
    np.testing.assert_allclose(prompt.points, [(80, 70)])


def test_prompt_without_visible_points_has_the_middle_of_the_box() -> None:
    prompt = prompt_of(person([(0.5, 0.6)] * 4, []), 1, height=100, width=200)
    assert prompt.points == ((100, 75),)


def test_clip_gives_each_frame_with_its_masks_and_reads_no_further_than_asked() -> None:
    read: list[int] = []

    def frames() -> Iterator[Tensor]:
        for index in range(5):
            read.append(index)
            yield torch.full((2, 3, 3), index, dtype=torch.uint8)

    backend, prompt = CountingMasks(), PersonPrompt((0, 0, 1, 1), ((0, 0),))
    clip = masks_of_clip(backend, frames(), [prompt])
    assert [int(next(clip)[1].mean()) for _ in range(3)] == [0, 1, 2]
    assert read == [0, 1, 2]
    frame, masks = next(clip)
    assert torch.equal(frame[None, ..., 0].float(), masks)
    assert backend.begun == [(prompt,)]


def test_clip_without_frames_has_no_masks() -> None:
    assert list(masks_of_clip(CountingMasks(), [], [PersonPrompt((0, 0, 1, 1), ((0, 0),))])) == []


def test_each_person_stands_alone_on_the_background_with_levels_truncated() -> None:
    frame = torch.tensor([[[200, 100, 0], [200, 100, 0], [201, 255, 255]]], dtype=torch.uint8)
    masks = torch.tensor([[[1.0, 0.0, 0.5]], [[0.0, 1.0, 0.0]]])
    cut = alone(frame, masks, BACKGROUNDS["wan2gp"])
    assert cut.dtype == torch.uint8
    assert cut.tolist() == [
        [[[200, 100, 0], [120, 255, 155], [160, 255, 205]]],
        [[[120, 255, 155], [200, 100, 0], [120, 255, 155]]],
    ]


def test_backgrounds_are_those_of_the_released_programs() -> None:
    assert BACKGROUNDS == {"wan2gp": (120, 255, 155), "official": (30, 60, 30)}
