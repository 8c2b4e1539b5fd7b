"""Rotary positions of video tokens and of SCAIL's pose tokens: positions in, cos and sin tables [L, d/2] out.

A head's d channels are d/2 adjacent pairs (2i, 2i+1); the first turn with the frame, the next with the row, the last
with the column of the token. Angles are float64, tables float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_THETA = 10000.0
POSE_COLUMN_OFFSET = 120  # of SCAIL's pose tokens, in token positions, before pooling
_POSE_POOL = 2  # the pose video has half the width and height


@dataclass(frozen=True)
class Rope:
    """cos and sin of every token's pairs, [L, d/2] float32 each. Pooled tables are no unit rotations."""

    cos: Tensor
    sin: Tensor

    def tokens(self, piece: slice) -> Rope:
        """The tables of some of the tokens."""
        return Rope(self.cos[piece], self.sin[piece])

    def to(self, device: torch.device) -> Rope:
        return Rope(self.cos.to(device), self.sin.to(device))


def video_rope(frames: int, rows: int, columns: int, head_dim: int) -> Rope:
    """Tables of frames * rows * columns tokens, column fastest, all positions from 0."""
    return _as_tables(_grid(range(frames), rows, columns, head_dim))


def scail_rope(frames: int, rows: int, columns: int, head_dim: int, *, pose_time_origin: int) -> Rope:
    """Tables of a SCAIL sequence: reference frame, video frames, then pose tokens.

    The pose tokens' cos and sin (not their positions) are those of the full grid, averaged 2x2.

    Args:
        frames: latent frames T of the video, without the reference frame.
        rows, columns: token grid of a video frame, both even.
        head_dim: channels d of a head.
        pose_time_origin: time position of the first pose frame: 1, where its video frame is, as SCAIL was trained;
            0 as Wan2GP runs it.

    Returns:
        tables of (1 + frames) * rows * columns + frames * rows/2 * columns/2 tokens.
    """
    video = _grid(range(1 + frames), rows, columns, head_dim)
    pose_times = range(pose_time_origin, pose_time_origin + frames)
    pose = _grid(pose_times, rows, columns, head_dim, column_offset=POSE_COLUMN_OFFSET, pool=_POSE_POOL)
    return _as_tables(torch.cat((video, pose)))


def rotate(heads: Tensor, rope: Rope) -> Tensor:
    """Turns the pairs of queries or keys [B, L, H, d] by their token's angles; float32."""
    even, odd = torch.unflatten(heads.float(), -1, (-1, 2)).unbind(-1)  # [B, L, H, d/2] each
    cos, sin = rope.cos[:, None], rope.sin[:, None]  # [L, 1, d/2]: the same for every head
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _grid(
    times: Sequence[int], rows: int, columns: int, head_dim: int, *, column_offset: int = 0, pool: int = 1
) -> Tensor:
    """cos + i sin of every token of a grid, [times * rows/pool * columns/pool, d/2] complex128."""
    spatial_dim = 2 * (head_dim // 6)
    time = _axis(times, head_dim - 2 * spatial_dim)
    row = _pooled(_axis(range(rows), spatial_dim), pool)
    column = _pooled(_axis(range(column_offset, column_offset + columns), spatial_dim), pool)
    shape = (len(time), len(row), len(column), -1)
    parts = (time[:, None, None], row[None, :, None], column[None, None])
    return torch.cat([part.expand(shape) for part in parts], dim=-1).flatten(0, 2)


def _axis(positions: Sequence[int], dim: int) -> Tensor:
    """cos + i sin of positions * theta^(-2k/dim), [positions, dim/2] complex128."""
    frequencies = _THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.tensor(positions, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _pooled(axis: Tensor, pool: int) -> Tensor:
    """Mean of every `pool` neighbours. A part depends on one axis only, so this is the 2x2 average of the grid."""
    return torch.unflatten(axis, 0, (-1, pool)).mean(1)


def _as_tables(turns: Tensor) -> Rope:
    return Rope(turns.real.float(), turns.imag.float())
