"""Sizes of MatAnyone's network, and how it goes through a clip."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatAnyoneConfig:
    """Sizes that the network depends on; the defaults are those of the released file (version 1).

    Attributes:
        pixel_mean, pixel_std: per channel, of pictures in [0, 1].
        pixel_dim: channels of the picture's features, of which mask values are made.
        key_dim: channels of the keys that memory is searched by.
        value_dim: channels of what memory holds of a person.
        sensory_dim: channels of the recurrent state.
        embed_dim: channels inside the object transformer, and of its summaries.
        ff_dim, num_heads, num_blocks, num_queries: of the object transformer; half of the queries see the person, half
            the background.
        up_dims: channels of the decoder at 1/16, 1/8, 1/4, 1/2 and 1/1 of the picture's size.
        position_scale: the largest position along an axis, as the sinusoids see it.
    """

    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pixel_dim: int = 256
    key_dim: int = 64
    value_dim: int = 256
    sensory_dim: int = 256
    embed_dim: int = 256
    ff_dim: int = 2048
    num_heads: int = 8
    num_blocks: int = 3
    num_queries: int = 16
    up_dims: tuple[int, int, int, int, int] = (256, 128, 128, 64, 16)
    position_scale: float = 32


@dataclass(frozen=True)
class PropagationConfig:
    """How masks are carried through a clip; the defaults are the released program's.

    Attributes:
        num_warmup: how often the first frame is predicted again, each time from its last prediction.
        memory_every: after how many frames one is memorised.
        max_memory_frames: frames in memory, the first included; the first stays, of the others the latest do.
        top_k: memory cells that a cell of the picture reads from.
        sensory_updates: how many of the frames between two memorised ones update the recurrent state.
    """

    num_warmup: int = 10
    memory_every: int = 5
    max_memory_frames: int = 5
    top_k: int = 30
    sensory_updates: int = 5
