"""The windows of a long clip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.windows import Window, plan_windows


def test_short_clip_is_one_window() -> None:
    assert plan_windows(81) == [Window(0, 81, 0, 81)]
    assert plan_windows(13) == [Window(0, 13, 0, 13)]


def test_windows_start_in_the_overlap_and_keep_what_is_new() -> None:
    assert plan_windows(200) == [Window(0, 81, 0, 81), Window(80, 81, 1, 80), Window(160, 41, 1, 39)]
    assert plan_windows(157, 81, 5) == [Window(0, 81, 0, 81), Window(76, 81, 5, 76)]


def test_one_frame_too_many_makes_a_short_last_window() -> None:
    assert plan_windows(82)[1] == Window(80, 5, 1, 1)


@given(
    num_frames=st.integers(1, 1000),
    window=st.integers(1, 40).map(lambda n: 4 * n + 1),
    overlap=st.integers(0, 39).map(lambda n: 4 * n + 1),
)
def test_every_frame_is_made_once_and_in_order(num_frames: int, window: int, overlap: int) -> None:
    if overlap >= window:
        return
    windows = plan_windows(num_frames, window, overlap)
    timeline = [frame for w in windows for frame in range(w.start_frame, w.start_frame + w.num_frames)[w.kept]]
    assert timeline == list(range(num_frames))
    assert all(w.num_frames % 4 == 1 and w.num_frames <= window for w in windows)
    assert [w.overlap_frames for w in windows] == [0] + [overlap] * (len(windows) - 1)
    surplus = [w.num_frames - w.overlap_frames - w.kept_frames for w in windows]
    assert all(frames == 0 for frames in surplus[:-1])
    assert 0 <= surplus[-1] < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_frames must be at least 1, got 0"),
        ((100, 80), r"window_frames must be 4n \+ 1, got 80"),
        ((100, 81, 2), r"overlap_frames must be 4n \+ 1, got 2"),
        ((100, 81, -3), r"overlap_frames must be 4n \+ 1, got -3"),
        ((100, 81, 81), "overlap_frames must be below window_frames = 81, got 81"),
    ],
)
def test_impossible_plans_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_windows(*arguments)
