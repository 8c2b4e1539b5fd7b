"""Hands, faces and head painted over frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from services.pose.overlay import overlay
from services.pose.people import People
from services.pose.quirks import Strokes
from tests.services.pose.figures import person

HEIGHT, WIDTH = 80, 120


def nobody() -> People:
    """One person of whom nothing is visible."""
    hidden = person()
    return replace(
        hidden,
        visible=np.zeros_like(hidden.visible),
        faces=np.full_like(hidden.faces, -1),
        hands=np.full_like(hidden.hands, -1),
    )


def with_hand(**points: tuple[float, float]) -> People:
    """Hand points `left0=(x, y)`, `right5=...` in pixels; everything else is hidden."""
    hands = nobody().hands.copy()
    for name, at in points.items():
        side = 0 if name.startswith("left") else 1
        hands[0, side, int(name.removeprefix("left").removeprefix("right"))] = np.array(at) / (WIDTH, HEIGHT)
    return replace(nobody(), hands=hands)


def with_head(first: int, at: tuple[float, float], second: int, other: tuple[float, float]) -> People:
    """Two visible points of the head."""
    hidden = nobody()
    bodies, visible = hidden.bodies.copy(), hidden.visible.copy()
    for index, place in ((first, at), (second, other)):
        bodies[0, index], visible[0, index] = np.array(place) / (WIDTH, HEIGHT), True
    return replace(hidden, bodies=bodies, visible=visible)


def painted(*people: People, height: int = HEIGHT, width: int = WIDTH, below: int = 0) -> Tensor:
    """One frame of that level, painted over."""
    joined = People(*(np.concatenate([getattr(one, name) for one in people]) for name in vars(people[0])))
    frames = torch.full((1, height, width, 3), below, dtype=torch.uint8)
    overlay([joined], height, width).cover(frames)
    return frames[0]


def colours(picture: Tensor) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}


def test_finger_is_a_line_in_its_colour_between_blue_points() -> None:
    picture = painted(with_hand(left0=(20.9, 30.2), left1=(30.1, 30.9)))
    assert picture[30, 22:29].tolist() == [[255, 0, 0]] * 7
    for x in (20, 30):
        assert (picture[29:32, x] == torch.tensor([0, 0, 255])).all()
        assert (picture[30, x - 1 : x + 2] == torch.tensor([0, 0, 255])).all()
    assert int((picture != 0).any(-1).sum()) == 17


@pytest.mark.parametrize(
    ("edge", "colour"),
    [
        ((0, 1), (255, 0, 0)),
        ((1, 2), (255, 77, 0)),
        ((0, 9), (0, 255, 102)),
        ((19, 20), (255, 0, 77)),
        ((0, 17), (204, 0, 255)),
    ],
)
def test_fingers_go_round_the_colour_circle(edge: tuple[int, int], colour: tuple[int, int, int]) -> None:
    first, second = edge
    picture = painted(with_hand(**{f"right{first}": (50, 10), f"right{second}": (50, 40)}))
    assert tuple(picture[25, 50].tolist()) == colour


def test_points_that_do_not_follow_each_other_are_not_joined() -> None:
    assert colours(painted(with_hand(left4=(20, 20), left5=(40, 20)))) == {(0, 0, 0), (0, 0, 255)}


def test_hidden_points_and_those_in_the_first_row_or_column_are_not_drawn() -> None:
    assert not painted(nobody()).any()
    assert not painted(with_hand(left0=(0.9, 30), left1=(30, 0.9), right3=(-5, 20))).any()
    assert painted(with_hand(left0=(1, 1))).any()


def test_pictures_of_600_pixels_and_more_get_lines_two_pixels_thick() -> None:
    hand = with_hand(left0=(60, 40), left1=(90, 40))
    thin, thick = (painted(hand, height=side, width=side + 50) for side in (599, 600))
    rows_of = [int((picture[..., 0] == 255).any(dim=1).sum()) for picture in (thin, thick)]
    assert rows_of == [1, 3]
    # and discs of radius 2
    assert [int((picture[..., 2] == 255).sum()) for picture in (thin, thick)] == [10, 26]


def test_only_brows_eyes_and_mouth_of_a_face_are_drawn_in_white() -> None:
    hidden = nobody()
    faces = np.stack([np.linspace(0.1, 0.9, 68), np.full(68, 0.5)], axis=-1)[None]
    picture = painted(replace(hidden, faces=faces), width=680)
    assert colours(picture) == {(0, 0, 0), (255, 255, 255)}
    xs = (faces[0, :, 0] * 680).astype(int)
    drawn = [index for index, x in enumerate(xs) if picture[HEIGHT // 2, x].any()]
    assert drawn == [*range(17, 27), *range(36, 68)]


@pytest.mark.parametrize(
    ("ends", "link", "dots"),
    [
        ((0, 14), (51, 0, 153), ((255, 0, 0), (170, 0, 255))),
        ((14, 16), (102, 0, 153), ((170, 0, 255), (255, 0, 170))),
        ((0, 15), (153, 0, 153), ((255, 0, 0), (255, 0, 255))),
        ((15, 17), (153, 0, 102), ((255, 0, 255), (255, 0, 85))),
    ],
)
def test_head_links_are_dimmed_and_their_points_are_not(
    ends: tuple[int, int], link: tuple[int, ...], dots: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    picture = painted(with_head(ends[0], (30, 30), ends[1], (70, 30)))
    assert tuple(picture[30, 50].tolist()) == link
    # an ellipse of half axes 20 and 4
    assert int((picture[:, 50] != 0).any(-1).sum()) == 9
    assert [tuple(picture[30, x].tolist()) for x in (30, 70)] == list(dots)
    assert tuple(picture[26, 30].tolist()) == dots[0]


def test_link_needs_both_its_points() -> None:
    both = with_head(0, (30, 30), 14, (70, 30))
    one = replace(both, visible=both.visible & (np.arange(24) != 14))
    assert colours(painted(one)) == {(0, 0, 0), (255, 0, 0)}


def test_zero_channels_let_the_frame_show_through() -> None:
    picture = painted(with_hand(left0=(20, 30), left1=(40, 30)), below=90)
    assert picture[30, 30].tolist() == [255, 90, 90]
    assert picture[30, 20].tolist() == [90, 90, 255]
    assert picture[0, 0].tolist() == [90, 90, 90]


def test_later_strokes_of_a_person_cover_earlier_ones_and_canvases_of_people_wrap() -> None:
    hand = with_hand(left0=(40, 30), right0=(44, 30), right1=(36, 30))
    face = replace(
        nobody(), faces=np.where(np.arange(68)[:, None] == 40, np.array([40, 30]) / (WIDTH, HEIGHT), -1.0)[None]
    )
    both = replace(hand, faces=face.faces)
    assert painted(hand)[30, 40].tolist() == [255, 0, 0]  # the second hand's line over the first hand's point
    assert painted(both)[30, 40].tolist() == [255, 255, 255]
    assert painted(hand, face)[30, 40].tolist() == [254, 255, 255]


def test_each_frame_gets_its_own_people() -> None:
    clip = [person(2, seed=1), person(0), person(1, seed=2)]
    frames = torch.zeros((3, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    overlay(clip, HEIGHT, WIDTH).cover(frames)
    assert not frames[1].any()
    for index in (0, 2):
        alone = torch.zeros((1, HEIGHT, WIDTH, 3), dtype=torch.uint8)
        overlay([clip[index]], HEIGHT, WIDTH).cover(alone)
        assert (frames[index] == alone[0]).all()


def test_strokes_set_the_size_of_heads_and_dots() -> None:
    seen = np.ones((1, 24), np.bool_)
    body = np.full((1, 24, 2), 0.5)
    nowhere_faces, nowhere_hands = np.full((1, 68, 2), -1.0), np.full((1, 2, 21, 2), -1.0)
    for radius, area in ((0, 1), (1, 5), (4, 49)):
        people = People(np.zeros((1, 4)), body, seen, nowhere_faces, nowhere_hands)
        assert len(overlay([people], 64, 64, Strokes(head_radius_px=radius)).y) == area
    hands = nowhere_hands.copy()
    hands[0, 0, 3] = 0.5
    for radius, area in ((0, 1), (1, 5), (2, 13)):
        people = People(np.zeros((1, 4)), body, ~seen, nowhere_faces, hands)
        assert len(overlay([people], 64, 64, Strokes(dot_radius_px=radius)).y) == area
