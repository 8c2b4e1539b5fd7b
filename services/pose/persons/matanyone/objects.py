"""Object queries of MatAnyone: what a person and their background look like in 16 vectors, and what they say of a picture.

Source: pq-yang/MatAnyone e5ddc53; the object transformer is Cutie's, Cheng et al. 2023 (arXiv:2310.12982).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.pose.persons.matanyone.blocks import GatedResidualBlock, area_resize
from services.pose.persons.matanyone.config import MatAnyoneConfig


class SpatialPositions(nn.Module):
    """Sinusoids of a cell's place: the first half of the channels from x, the second from y, sine and cosine in turn."""

    inv_freq: Tensor

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        self.scale = config.position_scale
        # a checkpoint has the frequencies themselves
        self.register_buffer("inv_freq", torch.empty(config.embed_dim // 4))

    def forward(self, height: int, width: int) -> Tensor:
        """-> [height, width, embed_dim], float32."""
        x, y = self._along(width), self._along(height)
        return torch.cat([x.expand(height, -1, -1), y[:, None].expand(-1, width, -1)], dim=-1)

    def _along(self, length: int) -> Tensor:
        """[length, embed_dim / 2]; the first cell is at 0, the last at `scale`."""
        places = torch.arange(length, device=self.inv_freq.device, dtype=torch.float32)
        places = places / (length - 1 + 1e-6) * self.scale
        angles = places[:, None] * self.inv_freq
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class ObjectSummarizer(nn.Module):
    """A person's values and mask -> sums over the person (half of the summaries) and over the rest, with their areas."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        dim, self.num_summaries = config.embed_dim, config.num_queries
        self.pos_enc = SpatialPositions(config)
        self.input_proj = nn.Linear(config.value_dim, dim)
        self.feature_pred = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.weights_pred = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, self.num_summaries))

    def forward(self, masks: Tensor, values: Tensor) -> Tensor:
        """[P, 1, H, W] and [P, value_dim, h, w] -> [P, num_queries, embed_dim + 1], the area last; to be summed in time."""
        person = area_resize(masks, values.shape[-2:]).flatten(1)[..., None]  # [P, h*w, 1]
        half = self.num_summaries // 2
        regions = torch.cat([person.expand(-1, -1, half), (1 - person).expand(-1, -1, half)], dim=-1)
        x = self.input_proj(values.flatten(2).transpose(1, 2)) + self.pos_enc(*values.shape[-2:]).flatten(0, 1)
        weights = torch.sigmoid(self.weights_pred(x)) * regions  # [P, h*w, num_queries]
        sums = weights.transpose(1, 2) @ self.feature_pred(x)
        return torch.cat([sums, weights.sum(dim=1)[..., None]], dim=-1)


class CrossAttention(nn.Module):
    """Attention to another set of tokens; places count for the search, not for what is read."""

    def __init__(self, dim: int, num_heads: int, *, norm: bool) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(
        self, x: Tensor, places: Tensor, other: Tensor, other_places: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        x = self.norm(x)
        read, _ = self.cross_attn(x + places, other + other_places, other, attn_mask=blocked, need_weights=False)
        return x + read  # on the normalised tokens


class SelfAttention(nn.Module):
    """Attention among the queries."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = self.norm(x)
        read, _ = self.self_attn(x + places, x + places, x, need_weights=False)
        return x + read  # on the normalised tokens


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(functional.relu(self.linear1(self.norm(x))))


class PixelFeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = GatedResidualBlock(dim)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """[P, height*width, dim] -> the same."""
        x: Tensor = self.conv(tokens.transpose(1, 2).reshape(len(tokens), -1, height, width))
        return x.flatten(2).transpose(1, 2)


class QueryBlock(nn.Module):
    """The queries look at the picture, at each other, and the picture looks at them."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        dim, heads = config.embed_dim, config.num_heads
        self.read_from_pixel = CrossAttention(dim, heads, norm=True)
        self.self_attn = SelfAttention(dim, heads)
        self.ffn = FeedForward(dim, config.ff_dim)
        self.read_from_query = CrossAttention(dim, heads, norm=False)
        self.pixel_ffn = PixelFeedForward(dim)

    def forward(
        self,
        queries: Tensor,
        query_places: Tensor,
        pixels: Tensor,
        pixel_places: Tensor,
        blocked: Tensor,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        queries = self.read_from_pixel(queries, query_places, pixels, pixel_places, blocked)
        queries = self.ffn(self.self_attn(queries, query_places))
        pixels = self.read_from_query(pixels, pixel_places, queries, query_places)
        return queries, self.pixel_ffn(pixels, *size)


class ObjectTransformer(nn.Module):
    """Corrects what was read cell by cell by what is known of the person as a whole."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads, self.num_queries = config.num_heads, config.num_queries
        self.query_init = nn.Embedding(config.num_queries, dim)
        self.query_emb = nn.Embedding(config.num_queries, dim)
        self.summary_to_query_init = nn.Linear(dim, dim)
        self.summary_to_query_emb = nn.Linear(dim, dim)
        self.pixel_init_proj = nn.Conv2d(dim, dim, 1)
        self.pixel_emb_proj = nn.Conv2d(dim, dim, 1)
        self.spatial_pe = SpatialPositions(config)
        self.blocks = nn.ModuleList(QueryBlock(config) for _ in range(config.num_blocks))
        # one before the first block and one after each; that after the last serves training only
        self.mask_pred = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(dim, 1, 1)) for _ in range(config.num_blocks + 1)
        )

    def forward(self, x: Tensor, summaries: Tensor) -> Tensor:
        """[P, embed_dim, h, w] and summaries [P, num_queries, embed_dim + 1] -> [P, embed_dim, h, w]."""
        size = (x.shape[-2], x.shape[-1])
        means = summaries[..., :-1] / (summaries[..., -1:] + 1e-4)
        queries = self.query_init.weight + self.summary_to_query_init(means)
        query_places = self.query_emb.weight + self.summary_to_query_emb(means)
        pixels = self.pixel_init_proj(x).flatten(2).transpose(1, 2)  # [P, h*w, embed_dim]
        places = self.spatial_pe(*size).flatten(0, 1) + self.pixel_emb_proj(x).flatten(2).transpose(1, 2)
        for block, predict in zip(self.blocks, self.mask_pred, strict=False):
            logits = predict(pixels.transpose(1, 2).reshape(x.shape))
            queries, pixels = block(queries, query_places, pixels, places, self._blocked(logits), size)
        return pixels.transpose(1, 2).reshape(x.shape)

    def _blocked(self, logits: Tensor) -> Tensor:
        """Which cells a query must not look at: the first half sees the person, the second the rest.

        Args:
            logits: [P, 1, h, w], above 0 where the person is.

        Returns:
            bool [P * num_heads, num_queries, h*w]; a query that would see nothing sees everything.
        """
        person = (logits >= 0).flatten(2)  # [P, 1, h*w]
        half = self.num_queries // 2
        blocked = torch.cat([~person.expand(-1, half, -1), person.expand(-1, half, -1)], dim=1)
        blocked = blocked & ~blocked.all(dim=-1, keepdim=True)
        return blocked.repeat_interleave(self.num_heads, dim=0)
