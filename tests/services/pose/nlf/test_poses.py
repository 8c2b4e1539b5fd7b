"""Which poses of a frame are kept, and in what order."""

from __future__ import annotations

import torch
from torch import Tensor

from services.pose.nlf.poses import Poses, best_first, fits_box, is_certain, per_frame, similarity

BODY = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) * 1000


def people(offsets: list[float], uncertainties: list[float]) -> Poses:
    """The same body 4 m away, moved sideways by so many millimetres; its pixels span (10, 10) to (50, 90)."""
    millimetres = torch.stack([BODY + torch.tensor([offset, 0, 4000]) for offset in offsets])
    pixels = torch.tensor([10.0, 10]) + torch.linspace(0, 1, 20)[:, None] * torch.tensor([40.0, 80])
    return Poses(
        millimetres, pixels.expand(len(offsets), 20, 2), torch.tensor(uncertainties)[:, None].expand(len(offsets), 20)
    )


def boxes(scores: list[float]) -> Tensor:
    return torch.tensor([[10, 10, 40, 80, score] for score in scores])


def test_poses_come_by_score_over_uncertainty() -> None:
    kept = best_first(people([0, 2000, 4000], [0.2, 0.05, 0.1]), boxes([0.9, 0.4, 0.5]))
    assert kept.tolist() == [1, 2, 0]


def test_of_two_poses_of_one_person_the_better_is_kept() -> None:
    kept = best_first(people([0, 2000, 20], [0.1, 0.1, 0.1]), boxes([0.4, 0.5, 0.6]))
    assert kept.tolist() == [2, 1]


def test_pose_like_a_suppressed_one_only_is_kept() -> None:
    # each is like its neighbour, the outer two are not alike
    kept = best_first(people([0, 170, 340], [0.1, 0.1, 0.1]), boxes([0.9, 0.8, 0.7]))
    assert kept.tolist() == [0, 2]


def test_uncertain_and_misplaced_poses_are_dropped() -> None:
    found = people([0, 2000, 4000], [0.1, 0.26, 0.1])
    placed = boxes([0.9, 0.9, 0.9])
    placed[2, :2] += 200
    assert best_first(found, placed).tolist() == [0]


def test_nobody_is_kept_of_nobody() -> None:
    assert best_first(people([0], [0.1])[:0], boxes([0.9])[:0]).tolist() == []


def test_certain_needs_more_than_a_third_of_certain_points() -> None:
    points = torch.full((3, 9), 0.25)
    points[1, :3] = 0.249
    points[2, :4] = 0.249
    assert is_certain(points).tolist() == [False, False, True]


def test_fitting_needs_more_than_a_quarter_of_the_box_covered() -> None:
    box = torch.tensor([[100.0, 100, 40, 40, 1]])
    for size, expected in ((19.0, False), (20.0, False), (21.0, True)):
        corner = torch.tensor([[[90.0, 90], [100 + size, 100 + size]]])
        assert fits_box(corner, box).tolist() == [expected], size
    # beside the box on both axes: two negative extents do not make an overlap
    assert fits_box(torch.tensor([[[0.0, 0], [10, 10]]]), box).tolist() == [False]
    # beside a narrow one
    narrow = torch.tensor([[100.0, 100, 3, 40, 1]])
    assert fits_box(torch.tensor([[[0.0, 90], [99, 150]]]), narrow).tolist() == [False]


def test_similarity_is_of_the_fifth_that_is_farthest_apart() -> None:
    pair = torch.stack([BODY, BODY]) + torch.tensor([0.0, 0, 4000])
    assert similarity(pair)[0, 1].item() == 1
    pair[1, :3, 1] += 150
    alike = similarity(pair)
    # of twenty points four are looked at: three half way to unlike, one that has not moved; the scales hardly differ
    assert abs(alike[0, 1].item() - 0.625) < 0.02
    assert torch.allclose(alike, alike.T)


def test_similarity_looks_at_shapes_at_a_common_scale() -> None:
    person = BODY + torch.tensor([0.0, 0, 4000])
    assert similarity(torch.stack([person, person * 1.3]))[0, 1].item() > 0.999


def test_people_are_split_by_frame() -> None:
    found = people([0, 10, 20], [0.1, 0.2, 0.3])
    split = list(per_frame(found, [2, 0, 1]))
    assert [len(here) for here in split] == [2, 0, 1]
    assert torch.equal(split[2].millimetres, found.millimetres[2:])
    assert torch.equal(split[0].uncertainties, found.uncertainties[:2])
    assert torch.equal(split[0].pixels, found.pixels[:2])
