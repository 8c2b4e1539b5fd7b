"""The point head: heatmaps to places, and places to metres in front of the camera."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.pose.nlf.config import NlfConfig
from services.pose.nlf.head import PointHead, PointWeights, RelativePoints, translation_full, translation_weak
from tests.services.pose.nlf.tiny import CONFIG, SIZES, canonical_points

# 4 x 4 cells of 32 pixels, 5 layers
BIG = replace(CONFIG, proc_side=128, stride=32, depth=5, box_size_m=2.0)
INTRINSICS = torch.tensor([[200.0, 0, 64], [0, 200, 64], [0, 0, 1]])


def head(config: NlfConfig = BIG) -> PointHead:
    torch.manual_seed(0)
    made = PointHead(config, SIZES).eval().requires_grad_(False)
    made.weight_field.gps_net.maxi.fill_(1)
    return made


def peak(row: int, column: int, layer: int, metric: tuple[int, int], uncertainty: float) -> Tensor:
    """Logits [2 + depth, 4, 4] of one point: all mass in one cell of each heatmap, one value in the uncertainty map."""
    logits = torch.full((7, 4, 4), -200.0)
    logits[0] = -7.0
    logits[0, row, column] = uncertainty
    logits[1, metric[0], metric[1]] = 200.0
    logits[2 + layer, row, column] = 200.0
    return logits


def located(logits: list[Tensor], config: NlfConfig = BIG) -> RelativePoints:
    """Decodes logits [2 + depth, 4, 4] of points: each is a feature, and point i reads the features of its own."""
    features = torch.cat(logits)[None]
    channels = features.shape[1]
    weights = torch.eye(channels).reshape(len(logits), 7, channels)
    return head(config).locate(features, PointWeights(weights, torch.zeros(len(logits), 7)))


def test_heatmap_peaks_become_pixels_of_cell_centres() -> None:
    found = located([peak(0, 0, 0, (0, 0), 0), peak(3, 1, 0, (0, 0), 0), peak(2, 3, 0, (0, 0), 0)])
    torch.testing.assert_close(found.pixels, torch.tensor([[[16.0, 16], [48, 112], [112, 80]]]))


def test_without_centred_stride_cells_start_at_the_first_pixel() -> None:
    found = located([peak(0, 0, 0, (0, 0), 0), peak(3, 1, 0, (0, 0), 0)], replace(BIG, centered_stride=False))
    torch.testing.assert_close(found.pixels, torch.tensor([[[0.0, 0], [32, 96]]]))


def test_metres_come_from_the_metric_heatmap_and_the_depth_of_the_volume() -> None:
    found = located([peak(0, 0, 3, (1, 2), 0)])
    # cell centres at 80 and 48 of 128 pixels that span 2 m; layer 3 of 0..4 of 2 m
    torch.testing.assert_close(found.metres, torch.tensor([[[80 / 64, 48 / 64, 1.5]]]))


def test_uncertainty_is_read_where_the_volume_peaks() -> None:
    config = replace(BIG, uncertainty_bias=0.5, uncertainty_floor=0.25)
    found = located([peak(2, 1, 4, (0, 0), 1.5)], config)
    torch.testing.assert_close(found.uncertainties, torch.nn.functional.softplus(torch.tensor([[2.0]])) + 0.25)


def test_place_between_two_equal_peaks_is_their_middle() -> None:
    two = peak(0, 0, 0, (0, 0), 0)
    two[2 + 4, 3, 3] = 200.0
    found = located([two])
    torch.testing.assert_close(found.pixels, torch.tensor([[[64.0, 64]]]))
    torch.testing.assert_close(found.metres[..., 2], torch.tensor([[1.0]]))


def scene(distance: float = 3.0, count: int = 30) -> tuple[Tensor, RelativePoints]:
    """Points of a person in front of the camera (metres), and what a perfect head would say of them."""
    shape = torch.rand(count, 3, generator=torch.Generator().manual_seed(3)) * torch.tensor([0.6, 1.4, 0.5])
    shape = shape - torch.tensor([0.3, 0.7, 0.25])
    absolute = shape + torch.tensor([0.1, -0.05, distance])
    pixels = (absolute / absolute[:, 2:] @ INTRINSICS.T)[:, :2]
    return absolute, RelativePoints(pixels[None], shape[None] + 5, torch.full((1, count), 0.1))


@pytest.mark.parametrize("distance", [2.8, 6.0])
def test_perfect_points_are_put_where_they_are(distance: float) -> None:
    absolute, points = scene(distance)
    millimetres, _ = head().absolute(points, INTRINSICS[None])
    torch.testing.assert_close(millimetres[0], absolute * 1000, atol=2.0, rtol=0)


@pytest.mark.parametrize("spoil", ["uncertain", "at the border"])
def test_untrusted_points_do_not_move_the_person(spoil: str) -> None:
    absolute, points = scene(6.0)
    if spoil == "uncertain":
        points.uncertainties[0, :5] = 0.31
        points.pixels[0, :5] += 20
    else:
        points.pixels[0, :5] = torch.tensor([64.0, 31.0])
    millimetres, _ = head().absolute(points, INTRINSICS[None])
    torch.testing.assert_close(millimetres[0, 5:], absolute[5:] * 1000, atol=5.0, rtol=0)


def test_trusted_points_do_move_the_person() -> None:
    absolute, points = scene(6.0)
    points.uncertainties[0, :5] = 0.29
    points.pixels[0, :5] += 20
    millimetres, _ = head().absolute(points, INTRINSICS[None])
    assert (millimetres[0, 5:] - absolute[5:] * 1000).abs().max() > 50


def test_points_seen_inside_are_half_back_projected() -> None:
    _, points = scene(6.0)
    straight, _ = head().absolute(points, INTRINSICS[None])
    moved_pixels = points._replace(pixels=points.pixels.clone(), uncertainties=points.uncertainties.clone())
    moved_pixels.pixels[0, 0, 0] += 10
    moved_pixels.uncertainties[0, 0] = 0.5  # so that it has no say in the translation
    millimetres, _ = head().absolute(moved_pixels, INTRINSICS[None])
    shift = millimetres[0, 0] - straight[0, 0]
    distance = straight[0, 0, 2]
    torch.testing.assert_close(shift, torch.tensor([0.5 * 10 / 200 * distance, 0, 0]), atol=3.0, rtol=0)


def test_points_outside_keep_their_place_in_the_body() -> None:
    _, points = scene(6.0)
    # far to the left of the person: projects out of the crop
    points.metres[0, 0] = points.metres[0].mean(dim=0) - torch.tensor([5.0, 0, 0])
    points.uncertainties[0, 0] = 0.5
    straight, _ = head().absolute(points, INTRINSICS[None])
    points.pixels[0, 0] += 10
    moved, _ = head().absolute(points, INTRINSICS[None])
    assert torch.equal(moved[0, 0], straight[0, 0])


def test_border_is_seen_from_cell_centres() -> None:
    pixels = torch.tensor([[31.9, 64.0], [32.0, 64], [64, 96], [64, 96.1]])
    assert head().inside(pixels, 1.0).tolist() == [False, True, True, False]
    shifted = head(replace(BIG, centered_stride=False))
    assert shifted.inside(pixels - 16, 1.0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(("fixed", "factor"), [(False, 3), (True, 1)])
def test_uncertainties_are_handed_out_threefold_unless_told_otherwise(fixed: bool, factor: int) -> None:
    _, points = scene()
    _, uncertainties = head(replace(BIG, fix_uncertainty_factor=fixed)).absolute(points, INTRINSICS[None])
    torch.testing.assert_close(uncertainties, factor * points.uncertainties)


@pytest.mark.parametrize("find", [translation_full, translation_weak])
def test_translation_is_finite_when_no_point_is_trusted(find: Callable[..., Tensor]) -> None:
    _, points = scene()
    rays = (points.pixels - 64) / 200
    nobody = torch.zeros(1, 30, dtype=torch.bool)
    assert find(rays, points.metres, nobody).isfinite().all()


def test_weak_perspective_puts_a_flat_person_where_full_perspective_does() -> None:
    flat = torch.rand(1, 30, 3, generator=torch.Generator().manual_seed(4)) * torch.tensor([1.0, 1, 0])
    translation = torch.tensor([0.2, -0.4, 5.0])
    absolute = flat + translation
    rays = absolute[..., :2] / absolute[..., 2:]
    trusted = torch.ones(1, 30, dtype=torch.bool)
    trusted[0, :3] = False
    rays[0, :3] += 1
    for find in (translation_full, translation_weak):
        torch.testing.assert_close(find(rays, flat, trusted), translation[None], atol=5e-3, rtol=0)


def test_weak_perspective_is_used_when_configured() -> None:
    _, points = scene()
    full, _ = head().absolute(points, INTRINSICS[None])
    weak, _ = head(replace(BIG, weak_perspective=True)).absolute(points, INTRINSICS[None])
    assert (full - weak).abs().max() > 10


def test_weights_of_a_point_do_not_depend_on_the_other_points() -> None:
    made, points = head(), canonical_points()
    together, alone = made.point_weights(points), made.point_weights(points[3:4])
    assert together.weight.shape == (40, 7, 16)
    assert together.bias.shape == (40, 7)
    torch.testing.assert_close(together.weight[3:4], alone.weight)
    torch.testing.assert_close(together.bias[3:4], alone.bias)


def test_weight_field_is_float32_beside_a_half_precision_layer() -> None:
    exact = head().point_weights(canonical_points())
    made = head()
    made.layer.half()
    weights = made.point_weights(canonical_points())
    assert weights.weight.dtype == weights.bias.dtype == torch.float16
    assert torch.equal(weights.weight, exact.weight.half())
