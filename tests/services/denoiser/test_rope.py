"""Rotary positions: what the tables are, and the properties that make them positions."""

import torch
from torch import Tensor

from services.denoiser.rope import Rope, rotate, scail_rope, video_rope
from tests.services.denoiser.tiny import normal

HEAD_DIM = 24  # 4 pairs each for time, row and column


def dot(a: Tensor, b: Tensor, rope: Rope, at: int, other: int) -> float:
    """Product of two vectors standing at two tokens."""
    turned_a = rotate(a.expand(1, len(rope.cos), 1, -1), rope)[0, at, 0]
    turned_b = rotate(b.expand(1, len(rope.cos), 1, -1), rope)[0, other, 0]
    return float(turned_a @ turned_b)


def test_products_depend_on_the_distance_alone() -> None:
    rope = video_rope(4, 3, 5, HEAD_DIM)
    a, b = normal(HEAD_DIM), normal(HEAD_DIM, seed=1)
    one_frame, one_row, one_column = 15, 5, 1
    step = one_frame + one_row + one_column
    assert abs(dot(a, b, rope, 0, step) - dot(a, b, rope, step, 2 * step)) < 1e-4
    assert abs(dot(a, b, rope, 0, step) - dot(a, b, rope, step, 0)) > 1e-2  # the other way round is another distance


def test_turning_keeps_lengths_and_leaves_the_first_token() -> None:
    rope = video_rope(2, 2, 2, HEAD_DIM)
    heads = normal(1, 8, 3, HEAD_DIM)
    turned = rotate(heads, rope)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], heads[:, 0])


def test_adjacent_channels_turn_together_from_x_to_y() -> None:
    quarter = Rope(torch.zeros(1, 2), torch.ones(1, 2))
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4), quarter)
    assert turned.flatten().tolist() == [0.0, 1.0, -1.0, 0.0]


def test_channels_are_split_between_frame_row_and_column() -> None:
    rope = video_rope(2, 2, 2, 128)
    moved = [(rope.sin[token] != 0).nonzero().flatten().tolist() for token in (4, 2, 1)]  # next frame, row, column
    assert moved == [list(range(22)), list(range(22, 43)), list(range(43, 64))]


def test_first_pair_of_each_axis_turns_one_radian_per_position() -> None:
    rope = video_rope(3, 1, 1, 128)
    torch.testing.assert_close(rope.cos[:, 0], torch.tensor([0.0, 1.0, 2.0]).cos())
    torch.testing.assert_close(rope.cos[2, 21], torch.tensor(2 * 10000 ** (-42 / 44)).cos())


def test_pose_tables_are_means_of_four_tokens_120_columns_away() -> None:
    frames, rows, columns = 2, 4, 6
    rope = scail_rope(frames, rows, columns, HEAD_DIM, pose_time_origin=1)
    video_tokens = (1 + frames) * rows * columns
    far = video_rope(1 + frames, rows, 120 + columns, HEAD_DIM)
    for table, full in ((rope.cos, far.cos), (rope.sin, far.sin)):
        grid = full.view(1 + frames, rows, 120 + columns, -1)[1:, :, 120:]
        means = grid.unflatten(2, (columns // 2, 2)).unflatten(1, (rows // 2, 2)).mean((2, 4))  # type: ignore[no-untyped-call]  # torch's
        torch.testing.assert_close(table[video_tokens:], means.flatten(0, 2), rtol=0, atol=1e-6)
        assert torch.equal(
            table[:video_tokens],
            getattr(video_rope(1 + frames, rows, columns, HEAD_DIM), "cos" if table is rope.cos else "sin"),
        )


def test_pose_time_origin_moves_the_pose_alone() -> None:
    as_trained = scail_rope(3, 4, 4, HEAD_DIM, pose_time_origin=1)
    as_wan2gp = scail_rope(3, 4, 4, HEAD_DIM, pose_time_origin=0)
    video_tokens, pose_tokens_per_frame = 4 * 16, 4
    assert torch.equal(as_trained.cos[:video_tokens], as_wan2gp.cos[:video_tokens])
    assert torch.equal(
        as_trained.sin[video_tokens:-pose_tokens_per_frame], as_wan2gp.sin[video_tokens + pose_tokens_per_frame :]
    )
