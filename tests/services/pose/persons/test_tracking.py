"""People keep their identity through drawn clips: when they cross, leave and come back, and hide each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from services.pose.persons.tracking import NOBODY, PersonTracker, TrackingConfig, mask_box
from tests.services.pose.persons.drawn import (
    BLUE,
    BODY_HEIGHT,
    BODY_WIDTH,
    BROWN,
    GREEN,
    HEIGHT,
    RED,
    WIDTH,
    Drawn,
    Walker,
    draw,
    walk,
)

FAR = -1000.0  # where somebody is who is not in the picture
FRAMES_PER_SECOND = 24


def follow(clip: Sequence[Drawn], max_people: int = 2, *, masks: bool = False) -> list[list[int | None]]:
    """For each frame, who stands at each place; None for nobody."""
    tracker = PersonTracker(max_people)
    rows = [tracker.update(drawn.frame, drawn.boxes, drawn.masks if masks else None) for drawn in clip]
    return [
        [None if row == NOBODY else drawn.who[row] for row in found] for drawn, found in zip(clip, rows, strict=True)
    ]


def assert_all_are_recognised(clip: Sequence[Drawn], places: Sequence[Sequence[int | None]]) -> None:
    """Each place has the one person or nobody, and whoever was detected has a place."""
    owners = list(places[0])
    for index, (drawn, found) in enumerate(zip(clip, places, strict=True)):
        assert [person if person in drawn.who else None for person in owners] == list(found), f"frame {index}"


def blue_and_red(left: Sequence[float], right: Sequence[float]) -> list[Walker]:
    return [Walker(RED, BLUE, left, depth=1), Walker(GREEN, BROWN, right)]


CROSSING = (walk((0, 40), (40, 200)), walk((0, 200), (40, 40)))
MEETING = (walk((0, 60), (20, 115), (40, 60)), walk((0, 180), (20, 122), (40, 180)))
RETURNING = (walk((0, 60), (10, -20), (11, FAR), (40, FAR), (41, 260), (60, 180)), walk((0, 120), (60, 110)))
HIDING = (walk((0, 60), (20, 118), (34, 122), (54, 190)), walk((0, 120), (54, 120)))
HIDING_ON_THE_WAY = (walk((0, 60), (20, 120), (35, 100), (55, 40)), walk((0, 140), (20, 122), (35, 98), (55, 160)))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "paths",
    [CROSSING, MEETING, RETURNING, HIDING, HIDING_ON_THE_WAY],
    ids=["cross", "meet and turn back", "leave and come back", "hide", "hide while walking"],
)
def test_two_people_keep_their_identity(paths: tuple[list[float], list[float]], seed: int, masks: bool) -> None:
    clip = draw(blue_and_red(*paths), seed=seed)
    assert_all_are_recognised(clip, follow(clip, masks=masks))


def test_the_clip_really_hides_one_for_half_a_second_and_the_other_leaves() -> None:
    hidden = [drawn.who == [1] for drawn in draw(blue_and_red(*HIDING))]
    assert max(len(run) for run in "".join("x" if one else " " for one in hidden).split()) >= FRAMES_PER_SECOND / 2
    away = [0 not in drawn.who for drawn in draw(blue_and_red(*RETURNING))]
    assert sum(away) > FRAMES_PER_SECOND


def test_people_in_the_same_clothes_are_told_apart_by_where_they_were_heading() -> None:
    left, right = CROSSING
    clip = draw([Walker(RED, BLUE, left, depth=1), Walker(RED, BLUE, right)])
    assert_all_are_recognised(clip, follow(clip))


def test_people_in_the_same_clothes_who_turn_back_behind_each_other_are_told_apart_by_their_masks() -> None:
    left, right = walk((0, 60), (20, 118), (26, 118), (46, 60)), walk((0, 180), (20, 122), (26, 122), (46, 180))
    clip = draw([Walker(RED, BLUE, left, depth=1), Walker(RED, BLUE, right)], seen_share=0.1)
    assert_all_are_recognised(clip, follow(clip, masks=True))


def test_trousers_tell_people_with_the_same_shirt_apart() -> None:
    left, right = MEETING
    clip = draw([Walker(RED, BLUE, left, depth=1), Walker(RED, BROWN, right)])
    assert_all_are_recognised(clip, follow(clip))


def test_three_people_walk_through_each_other() -> None:
    walkers = [
        Walker(RED, BLUE, walk((0, 30), (60, 210)), depth=2),
        Walker(GREEN, BROWN, walk((0, 210), (60, 30)), depth=1),
        Walker((220, 210, 60), (30, 30, 30), walk((0, 120), (60, 120))),
    ]
    clip = draw(walkers)
    assert_all_are_recognised(clip, follow(clip, 3))


def test_a_stranger_does_not_get_the_place_of_somebody_who_left() -> None:
    stranger = Walker((220, 210, 60), (20, 20, 20), walk((0, FAR), (14, FAR), (15, 20), (60, 60)))
    leaving = blue_and_red(walk((0, 60), (10, -20), (11, FAR), (60, FAR)), walk((0, 120), (60, 110)))
    places = follow(draw([*leaving, stranger]))
    assert all(2 not in found for found in places)
    assert places[-1].count(None) == 1


def test_somebody_who_comes_later_gets_a_free_place() -> None:
    clip = draw(blue_and_red(walk((0, 60), (30, 80)), walk((0, FAR), (14, FAR), (15, 200), (30, 180))))
    places = follow(clip)
    assert places[0] == [0, None]
    assert places[-1] == [0, 1]


def test_one_place_stays_with_one_person_however_the_detections_are_ordered() -> None:
    clip = draw(blue_and_red(*CROSSING))
    assert len({tuple(drawn.who) for drawn in clip}) > 2
    places = follow(clip, max_people=1)
    assert {found[0] for found in places} - {None} == {places[0][0]}
    assert sum(found[0] is not None for found in places) > 35


def test_places_go_by_size_and_with_masks_to_whom_the_mask_shows() -> None:
    drawn = draw([Walker(RED, BLUE, [60]), Walker(GREEN, BROWN, [180])], jitter=0)[0]
    small, large = drawn.boxes[drawn.who.index(0)], drawn.boxes[drawn.who.index(1)] + [-2, -2, 2, 2]
    assert PersonTracker(2).update(drawn.frame, [small, large]) == [1, 0]
    assert PersonTracker(2).update(drawn.frame, [small, large], drawn.masks) == [0, 1]
    only_second = drawn.masks * np.array([0, 1])[:, None, None]
    assert PersonTracker(2).update(drawn.frame, [small, large], only_second) == [NOBODY, 1]


def test_same_clip_gives_same_places() -> None:
    clip = draw(blue_and_red(*HIDING_ON_THE_WAY))
    assert follow(clip) == follow(clip)


def test_the_order_of_the_detections_does_not_matter() -> None:
    clip = draw(blue_and_red(*CROSSING))
    turned = [Drawn(drawn.frame, drawn.boxes[::-1], drawn.who[::-1], drawn.masks) for drawn in clip]
    assert follow(turned) == follow(clip)


def test_frames_without_anybody_and_boxes_beyond_the_frame_are_no_trouble() -> None:
    tracker = PersonTracker(2)
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert tracker.update(frame, []) == [NOBODY, NOBODY]
    assert tracker.update(frame, [[-50, 10, -20, 60]]) == [0, NOBODY]
    assert tracker.update(frame, [], np.zeros((2, HEIGHT, WIDTH))) == [NOBODY, NOBODY]


def standing(*walkers: Walker) -> tuple[Drawn, npt.NDArray[np.float64]]:
    """One frame, and everybody's whole box, hidden parts included."""
    boxes = [[w.xs[0] - BODY_WIDTH / 2, w.top, w.xs[0] + BODY_WIDTH / 2, w.top + BODY_HEIGHT] for w in walkers]
    return draw(walkers, jitter=0)[0], np.array(boxes)


def test_somebody_elsewhere_is_nobody_known_until_they_could_have_walked_there() -> None:
    tracker = PersonTracker(1)
    here, box = standing(Walker(RED, BLUE, [40]))
    assert tracker.update(here.frame, box) == [0]
    # 2.2 heights away, beyond the reach; and a shade darker, as people are elsewhere
    there, box = standing(Walker((170, 30, 30), (30, 50, 170), [200]))
    found = [tracker.update(there.frame, box)[0] for _ in range(12)]
    assert found == [NOBODY] * 10 + [0] * 2


def test_somebody_in_half_of_the_same_clothes_is_not_the_one_who_left() -> None:
    tracker = PersonTracker(1, TrackingConfig(max_cost=0.99))
    here, box = standing(Walker(RED, BLUE, [40]))
    assert tracker.update(here.frame, box) == [0]
    there, box = standing(Walker(RED, BROWN, [200]))
    assert [tracker.update(there.frame, box)[0] for _ in range(13)] == [NOBODY] * 13


def test_a_neighbour_in_other_clothes_is_not_taken_for_somebody_who_has_just_gone() -> None:
    tracker = PersonTracker(1)
    here, box = standing(Walker(RED, BLUE, [40]))
    assert tracker.update(here.frame, box) == [0]
    there, box = standing(Walker(GREEN, BROWN, [66]))
    assert tracker.update(there.frame, box) == [NOBODY]


def test_masks_outweigh_where_people_were_heading() -> None:
    alike = [Walker(RED, BLUE, [100]), Walker(RED, BLUE, [140])]
    before, boxes = standing(*alike)
    jumped, jumped_boxes = standing(*(Walker(RED, BLUE, [x]) for x in (140, 100)))
    tracker = PersonTracker(2)
    assert tracker.update(before.frame, boxes, before.masks) == [0, 1]
    assert tracker.update(jumped.frame, jumped_boxes, jumped.masks) == [0, 1]
    without = PersonTracker(2)
    assert without.update(before.frame, boxes) == [0, 1]
    assert without.update(jumped.frame, jumped_boxes) == [1, 0]


def test_what_somebody_looks_like_is_not_learnt_while_others_are_in_the_way() -> None:
    tracker = PersonTracker(2)
    front = Walker(GREEN, BROWN, [60])
    for x in walk((0, 120), (12, 72), (52, 72)):
        together, boxes = standing(front, Walker(RED, BLUE, [x], depth=1))
        places = tracker.update(together.frame, boxes)
        assert NOBODY not in places
    alone, box = standing(front)
    for _ in range(20):
        tracker.update(alone.frame, box)
    returned, boxes = standing(front, Walker(RED, BLUE, [220]))
    assert tracker.update(returned.frame, boxes) == places


def test_box_of_a_mask_leaves_out_specks() -> None:
    mask: npt.NDArray[np.float32] = np.zeros((100, 200), np.float32)
    mask[20:80, 50:90] = 0.9
    mask[0, 0] = mask[99, 199] = 1
    box = mask_box(mask)
    assert box is not None
    assert np.abs(box - [50, 20, 90, 80]).max() <= 2


def test_a_mask_of_a_few_pixels_or_half_transparent_ones_is_empty() -> None:
    mask: npt.NDArray[np.float32] = np.zeros((100, 200), np.float32)
    mask[20:80, 50:90] = 0.49
    assert mask_box(mask) is None
    mask[50, 60] = 1
    assert mask_box(mask) is None
    mask[50:52, 60:62] = 1
    assert mask_box(mask) is not None
