"""The person detector around its network: what it is given, and how its numbers become boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.pose.nlf.detector import DetectorConfig, Letterbox, PersonDetector, decode, letterboxed, suppress

SIDE = 64
CELLS = 8 * 8 + 4 * 4 + 2 * 2


def raw_output(found: list[tuple[int, float, float, float, float]]) -> Tensor:
    """YOLOX numbers with people at (cell, width, height, objectness, class score), each in the middle of its cell."""
    raw = torch.zeros(1, CELLS, 7)
    for cell, width, height, objectness, person in found:
        stride = 8 if cell < 64 else 16 if cell < 80 else 32
        size = torch.tensor([width, height]) / stride
        raw[0, cell] = torch.cat([torch.full((2,), 0.5), size.log(), torch.tensor([objectness, person, 0.99])])
    return raw


def detect(pictures: Tensor, raw: Tensor, **settings: float) -> list[Tensor]:
    config = DetectorConfig(side=SIDE, **settings)  # type: ignore[arg-type]  # max_detections is whole
    return PersonDetector(lambda _: raw, config).detect(pictures)


def test_box_is_given_in_pixels_of_the_picture() -> None:
    # 128 x 64: shrunk to half, 16 rows of grey above and below
    (boxes,) = detect(torch.zeros(1, 3, 64, 128), raw_output([(8 * 3 + 5, 20, 12, 0.9, 0.8)]))
    middle_x, middle_y = 8 * 5.5, 8 * 3.5 - 16
    expected = torch.tensor([[2 * (middle_x - 10), 2 * (middle_y - 6), 40, 24, 0.72]])
    torch.testing.assert_close(boxes, expected)


@pytest.mark.parametrize(
    ("cell", "middle"),
    [(0, (4, 4)), (7, (60, 4)), (8, (4, 12)), (64, (8, 8)), (64 + 5, (24, 24)), (80, (16, 16)), (83, (48, 48))],
)
def test_cells_run_along_rows_from_the_finest_to_the_coarsest(cell: int, middle: tuple[int, int]) -> None:
    corners, _ = decode(raw_output([(cell, 10, 6, 1, 1)])[0], SIDE)
    x, y = middle
    torch.testing.assert_close(corners[cell], torch.tensor([x - 5.0, y - 3, x + 5, y + 3]))


def test_score_is_objectness_times_the_score_of_a_person() -> None:
    raw = raw_output([(0, 9, 9, 0.5, 0.7)])
    assert decode(raw[0], SIDE)[1][0].item() == pytest.approx(0.35)


def test_boxes_above_the_threshold_come_best_first() -> None:
    raw = raw_output([(0, 6, 6, 1, 0.31), (20, 6, 6, 1, 0.8), (40, 6, 6, 1, 0.3), (60, 6, 6, 1, 0.5)])
    (boxes,) = detect(torch.zeros(1, 3, 64, 64), raw)
    torch.testing.assert_close(boxes[:, 4], torch.tensor([0.8, 0.5, 0.31]))


def test_no_more_than_the_most_detections() -> None:
    raw = raw_output([(cell, 6, 6, 1, 0.5 + cell / 200) for cell in range(10)])
    (boxes,) = detect(torch.zeros(1, 3, 64, 64), raw, max_detections=4)
    torch.testing.assert_close(boxes[:, 4], torch.tensor([0.545, 0.54, 0.535, 0.53]))


def test_picture_without_people_has_no_boxes() -> None:
    boxes = detect(torch.zeros(2, 3, 64, 64), torch.zeros(2, CELLS, 7))
    assert [rows.shape for rows in boxes] == [(0, 5), (0, 5)]


def test_overlapping_boxes_are_one_but_a_suppressed_box_suppresses_nothing() -> None:
    # widths of 10, each moved by 1: neighbours overlap by 9 / 11, next but one by 8 / 12
    corners = torch.tensor([[left, 0.0, left + 10, 10] for left in (0.0, 1, 2, 30)])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.95])
    assert suppress(corners, scores, 0.7, 10).tolist() == [3, 0, 2]
    assert suppress(corners, scores, 0.66, 10).tolist() == [3, 0]
    assert suppress(corners, scores, 0.7, 2).tolist() == [3, 0]


def test_overlap_at_the_limit_is_kept() -> None:
    corners = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    assert suppress(corners, torch.tensor([0.9, 0.8]), 0.5, 10).tolist() == [0, 1]
    assert suppress(corners, torch.tensor([0.9, 0.8]), 0.499, 10).tolist() == [0]


def test_shrunk_picture_is_averaged_in_linear_light_and_padded_with_grey() -> None:
    picture = torch.zeros(1, 3, 64, 128)
    picture[..., ::2] = 1.0
    boxed = letterboxed(picture, SIDE)
    assert (boxed[:, :, :16] == 0.5).all()
    assert (boxed[:, :, 48:] == 0.5).all()
    torch.testing.assert_close(boxed[:, :, 16:48], torch.full((1, 3, 32, 64), 0.5 ** (1 / 2.2)))


def test_picture_of_the_input_size_is_only_given_its_tone() -> None:
    picture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(letterboxed(picture, SIDE), picture ** (1 / 2.2))


def test_grown_picture_is_interpolated() -> None:
    picture = torch.tensor([0.0, 1]).expand(1, 3, 2, 2)
    row = letterboxed(picture, 8)[0, 0, 0]
    expected = torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]) ** (1 / 2.2)
    torch.testing.assert_close(row, expected)


def test_odd_padding_has_the_larger_half_after_the_picture() -> None:
    placed = Letterbox.centred(50, 128, SIDE)
    assert (placed.scaled_height, placed.scaled_width, placed.top, placed.left) == (25, 64, 19, 0)
    boxed = letterboxed(torch.zeros(1, 3, 50, 128), SIDE)
    assert boxed.shape == (1, 3, SIDE, SIDE)
    assert (boxed[0, 0, :, 0] == 0.5).nonzero()[:, 0].tolist() == [*range(19), *range(44, 64)]


def test_network_is_given_levels_of_the_whole_batch() -> None:
    given: list[Tensor] = []

    def network(letterboxes: Tensor) -> Tensor:
        given.append(letterboxes)
        return torch.zeros(len(letterboxes), CELLS, 7)

    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    PersonDetector(network, DetectorConfig(side=SIDE)).detect(pictures)
    assert len(given) == 1
    assert given[0].dtype == torch.float32
    torch.testing.assert_close(given[0], letterboxed(pictures, SIDE).float() * 255)


def test_each_picture_of_a_batch_has_its_own_people() -> None:
    found = [[(8 * 3 + 5, 20, 12, 0.9, 0.8)], [], [(0, 6, 6, 1, 0.5), (60, 6, 6, 1, 0.7)]]
    raws = [raw_output(list(people)) for people in found]  # type: ignore[call-overload]
    pictures = torch.zeros(3, 3, 64, 64)
    together = detect(pictures, torch.cat(raws))
    assert [len(boxes) for boxes in together] == [1, 0, 2]
    for boxes, raw in zip(together, raws, strict=True):
        assert torch.equal(boxes, detect(pictures[:1], raw)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_boxes_of_pictures_on_a_gpu_come_to_the_host() -> None:
    raw = raw_output([(8 * 3 + 5, 20, 12, 0.9, 0.8), (0, 6, 6, 1, 0.5)])
    (here,) = detect(torch.zeros(1, 3, 64, 128), raw)
    (there,) = detect(torch.zeros(1, 3, 64, 128).cuda(), raw.cuda())
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, here)
