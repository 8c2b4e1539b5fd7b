"""The diffusion transformer of Wan 2.1, Wan 2.2 and SCAIL: noisy latents, timestep and context in, velocity out.

Latents are [B, C, T, h, w] float32, one token is a 1x2x2 patch of them, so L = T * h/2 * w/2 tokens (SCAIL appends the
tokens of its pose video). The residual stream, all norms, the modulation, the time embedding, the patch embeddings and
the head are float32; the linears of the blocks and of the context compute in the dtype of their weights.

Module names are those of the released checkpoints (Wan-Video/Wan2.2 42bf4cf, Wan-Video/Wan2.1 9737cba,
deepbeepmeep/Wan2GP 8681e9f). Architecture: Peebles & Xie 2022 (arXiv:2212.09748), Wan 2025 (arXiv:2503.20314).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.denoiser.attention import AUTO, Attended, Attention
from services.denoiser.glue import PLAIN, Affine, Consumer, Gate, Glue, HeadNorm, Prepared
from services.denoiser.rope import Rope

_CLIP_EPS = 1e-5  # the image projection keeps PyTorch's default where the blocks have 1e-6


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one transformer; what the checkpoint's names and shapes follow from."""

    in_dim: int  # channels of the model input: latents and what is concatenated to them
    out_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None  # width of the CLIP tokens; None: no image branch
    pose: bool = False  # SCAIL: a second patch embedding for the pose video
    eps: float = 1e-6
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


def _wan_14b(in_dim: int, image_dim: int | None = None, pose: bool = False) -> TransformerConfig:
    return TransformerConfig(
        in_dim=in_dim,
        out_dim=16,
        dim=5120,
        ffn_dim=13824,
        num_heads=40,
        num_layers=40,
        image_dim=image_dim,
        pose=pose,
    )


PRESETS: dict[str, TransformerConfig] = {
    "wan2.1-t2v-1.3b": TransformerConfig(in_dim=16, out_dim=16, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": _wan_14b(in_dim=16),
    "wan2.1-i2v-14b": _wan_14b(in_dim=36, image_dim=1280),
    "wan2.2-t2v-a14b": _wan_14b(in_dim=16),
    "wan2.2-i2v-a14b": _wan_14b(in_dim=36),
    "wan2.2-ti2v-5b": TransformerConfig(in_dim=48, out_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30),
    "scail-14b": _wan_14b(in_dim=20, image_dim=1280, pose=True),
}


@dataclass(frozen=True)
class Context:
    """What the blocks attend to besides the video; computed once per prompt."""

    text: Tensor  # [B, text_len, D]
    image: Tensor | None  # [B, image tokens, D], None without an image branch
    # Keys and values that each cross-attention has made of them: the same at every step
    made: dict[CrossAttention, tuple[tuple[Tensor, Tensor], ...]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class TimeEmbedding:
    """The distinct timesteps of a forward pass (one, or two where known frames are at 0), and who has which.

    Per-token modulation would be 9 GB at 75,600 tokens; these rows are gathered, or broadcast, where they are used.
    """

    embedding: Tensor  # [n, D] float32, modulates the head
    projection: Tensor  # [n, 6, D] float32, modulates the blocks
    row: Tensor  # [B or 1, L or 1] int64: the row of each token; one column if all tokens of a sample share it

    def tokens(self, piece: slice) -> TimeEmbedding:
        """The same for some of the tokens."""
        row = self.row if self.row.shape[1] == 1 else self.row[:, piece]
        return TimeEmbedding(self.embedding, self.projection, row)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weights, whatever it is given."""

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def prepare(self, inputs: Attended, also: Tensor | None = None) -> Tensor:
        tokens = inputs if isinstance(inputs, Tensor) else inputs.float()
        return (tokens if also is None else tokens + also).to(self.weight.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(self.prepare(inputs), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.float())


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs.float(), self.weight.shape, self.weight, self.eps)


class PatchEmbedding(nn.Conv3d):
    """Patches of [B, C, T, h, w] -> tokens [B, L, D], in the order frame, row, column.

    A convolution whose stride is its kernel is a linear map of patches. As a matrix product it stays float32, where a
    convolution would be rounded to TF32 on the GPU.
    """

    def __init__(self, in_dim: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__(in_dim, dim, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        t, h, w = self.kernel_size
        batch, channels, frames, height, width = latents.shape
        patches = latents.float().reshape(batch, channels, frames // t, t, height // h, h, width // w, w)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)  # [B, grid, C, t, h, w]
        return F.linear(patches.flatten(4).flatten(1, 3), self.weight.flatten(1), self.bias)


class AttentionLayer(nn.Module):
    """What self- and cross-attention share: four projections, norms over all heads at once, the kernel."""

    def __init__(self, config: TransformerConfig, attention: Attention, glue: Glue) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention = attention
        self.glue = glue
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, H, d]."""
        return torch.unflatten(tokens, -1, (self.num_heads, -1))

    def normed(
        self, projected: Tensor, norm: RMSNorm, rope: Rope | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[B, L, D] -> [B, L, H, d] of `dtype`, or the same, turned to the tokens' positions where there are any."""
        return self.glue.turn(projected, HeadNorm(norm.eps, norm.weight, self.num_heads, dtype), rope)


class SelfAttention(AttentionLayer):
    """Attention of all tokens to all tokens, at rotary positions."""

    def project(self, tokens: Prepared, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, L, D] as the linears take them -> queries, keys, values [B, L, H, d].

        Values in the linears' dtype; queries and keys too, unless attention wants them in another.
        """
        queries = self.normed(self.q(tokens), self.norm_q, rope, self.attention.dtype)
        keys = self.normed(self.k(tokens), self.norm_k, rope, self.attention.dtype)
        return queries, keys, self.split_heads(self.v(tokens))


class CrossAttention(AttentionLayer):
    """Attention of the video to the text and, if there is an image branch, to the image.

    Two softmaxes share the queries and are summed before the output projection. Padded text takes part.
    """

    def __init__(self, config: TransformerConfig, attention: Attention, glue: Glue) -> None:
        super().__init__(config, attention, glue)
        if config.image_dim is not None:
            self.k_img = Linear(config.dim, config.dim)
            self.v_img = Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, tokens: Prepared, context: Context) -> Prepared:
        """tokens [B, L, D] as the linears take them -> what the output projection takes."""
        queries = self.normed(self.q(tokens), self.norm_q)
        attended = [self.attention(queries, *pair).flatten(2) for pair in self.keys_and_values(context)]
        return cast(Consumer, self.o).prepare(*attended)

    def keys_and_values(self, context: Context) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of the text, then of the image if there is one: [B, n, H, d] each. Kept in the context, but not in training."""
        if self in context.made:
            return context.made[self]
        made = [(self.normed(self.k(context.text), self.norm_k), self.split_heads(self.v(context.text)))]
        if context.image is not None:
            keys = self.normed(self.k_img(context.image), self.norm_k_img)
            made.append((keys, self.split_heads(self.v_img(context.image))))
        if not torch.is_grad_enabled():
            context.made[self] = tuple(made)
        return tuple(made)


class Block(nn.Module):
    """x += gate * SelfAttn(mod(norm1 x)); x += CrossAttn(norm3 x); x += gate * FFN(mod(norm2 x)).

    Everything but the self-attention itself treats each token alone: `project` before it, `update` after it. So both
    may also be run on some of the tokens at a time.
    """

    def __init__(self, config: TransformerConfig, attention: Attention, glue: Glue) -> None:
        super().__init__()
        self.glue = glue
        self.modulation = modulation_table(6, config.dim)
        self.norm1 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config, attention, glue)
        self.norm3 = LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, attention, glue)
        self.norm2 = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, config.dim)
        )

    def forward(self, tokens: Tensor, time: TimeEmbedding, context: Context, rope: Rope) -> Tensor:
        """tokens [B, L, D] float32 -> the same."""
        queries, keys, values = self.project(tokens, time, rope)
        attending = self.self_attn.attention.over(keys, values)
        return self.update(tokens, attending.finish(attending.gather(queries)), time, context)

    def project(self, tokens: Tensor, time: TimeEmbedding, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, H, d] of self-attention."""
        shift, scale = self.modulation_rows(time)[:2]
        affine = Affine(self.norm1.eps, scale, shift, time.row, plus=1)
        return self.self_attn.project(self.glue.normed(tokens, affine, self.self_attn.q), rope)

    def update(self, tokens: Tensor, attended: Attended, time: TimeEmbedding, context: Context) -> Tensor:
        """Residual stream after the block, given what self-attention gathered, both [B, L, D]."""
        gate, shift, scale, ffn_gate = self.modulation_rows(time)[2:]
        only = time.row.new_zeros(1, 1)  # every token takes the only row of norm3
        tokens = self.glue.add(tokens, self.self_attn.o, attended, Gate(gate, time.row))
        affine = Affine(self.norm3.eps, self.norm3.weight[None], self.norm3.bias[None], only, plus=0)
        gathered = self.cross_attn(self.glue.normed(tokens, affine, self.cross_attn.q), context)
        tokens = self.glue.add(tokens, self.cross_attn.o, gathered, Gate(None, only))
        affine = Affine(self.norm2.eps, scale, shift, time.row, plus=1)
        first, gelu, last = cast(tuple[Consumer, nn.Module, Consumer], tuple(self.ffn))
        hidden = gelu(first(self.glue.normed(tokens, affine, first)))
        return self.glue.add(tokens, last, hidden, Gate(ffn_gate, time.row))

    def modulation_rows(self, time: TimeEmbedding) -> tuple[Tensor, ...]:
        """Shift, scale and gate of self-attention, then of the FFN: six of [n, D], a row per distinct timestep."""
        return (self.modulation + time.projection).unbind(1)


class Head(nn.Module):
    """Tokens -> patches of the velocity; modulated by the time embedding itself, not by its projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        t, h, w = config.patch
        self.modulation = modulation_table(2, config.dim)
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, t * h * w * config.out_dim)

    def forward(self, tokens: Tensor, time: TimeEmbedding) -> Tensor:
        """tokens [B, L, D] -> [B, L, 4 * out_dim], within a patch: row, column, channel (fastest)."""
        shift, scale = (self.modulation + time.embedding[:, None]).unbind(1)  # [n, D] each
        patches: Tensor = self.head(torch.addcmul(shift[time.row], self.norm(tokens), 1 + scale[time.row]))
        return patches


class ImageProjection(nn.Module):
    """CLIP tokens [B, n, image_dim] -> [B, n, D] float32."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim, _CLIP_EPS),
            Linear(image_dim, image_dim),
            nn.GELU(),  # exact, unlike the text's and the blocks'
            Linear(image_dim, dim),
            LayerNorm(dim, _CLIP_EPS),
        )

    def forward(self, image_embeds: Tensor) -> Tensor:
        tokens: Tensor = self.proj(image_embeds)
        return tokens


class Team(Protocol):
    """Who computes a forward pass: this process, or several that each have some of its tokens."""

    def own(self, tokens: Tensor, time: TimeEmbedding, rope: Rope) -> tuple[Tensor, TimeEmbedding, Rope]:
        """What of all tokens [B, L, D] and their tables the blocks of this process get."""
        ...

    def predicted(self, head: Head, tokens: Tensor, time: TimeEmbedding, count: int) -> Tensor:
        """The head's patches [B, count, p] of the first `count` of all tokens, from the own ones."""
        ...

    def both(self, positive: Callable[[], Tensor], negative: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What the forward passes of the two guidance branches predict."""
        ...


class Alone:
    """This process computes everything."""

    def own(self, tokens: Tensor, time: TimeEmbedding, rope: Rope) -> tuple[Tensor, TimeEmbedding, Rope]:
        return tokens, time, rope

    def predicted(self, head: Head, tokens: Tensor, time: TimeEmbedding, count: int) -> Tensor:
        patches: Tensor = head(tokens[:, :count], time.tokens(slice(count)))
        return patches

    def both(self, positive: Callable[[], Tensor], negative: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        return positive(), negative()


ALONE: Team = Alone()


class DiffusionTransformer(nn.Module):
    """Predicts velocity = noise - clean latents."""

    team: Team = ALONE

    def __init__(self, config: TransformerConfig, attention: Attention = AUTO, glue: Glue = PLAIN) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config.in_dim, config.dim, config.patch)
        if config.pose:
            self.pose_patch_embedding = PatchEmbedding(config.in_dim, config.dim, config.patch)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        if config.image_dim is not None:
            self.img_emb = ImageProjection(config.image_dim, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention, glue) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Context,
        rope: Rope,
        pose_latents: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the latents.

        Args:
            latents: [B, in_dim, T, h, w]: noisy latents with the channels that condition them.
            timestep: [B], or [B, L] for a timestep per token; 0..1000, any real dtype.
            context: from `embed_context`.
            rope: tables of all L tokens.
            pose_latents: [B, in_dim, T', h/2, w/2], for SCAIL; their tokens follow those of `latents`.

        Returns:
            [B, out_dim, T, h, w] float32.
        """
        time = self.embed_timestep(timestep, latents.device)
        tokens, time, rope = self.team.own(self.embed_tokens(latents, pose_latents), time, rope)
        for block in self.blocks:
            tokens = block(tokens, time, context, rope)
        return self.predict(tokens, time, latents.shape[2:])

    def embed_context(self, prompt_embeds: Tensor, image_embeds: Tensor | None = None) -> Context:
        """Text [B, n <= text_len, text_dim] and CLIP tokens [B, m, image_dim] -> what the blocks attend to.

        Raises:
            ValueError: the text is longer than text_len, or image_embeds and the image branch do not come together.
        """
        missing = self.config.text_len - prompt_embeds.shape[1]
        if missing < 0:
            raise ValueError(
                f"prompt_embeds must have at most {self.config.text_len} rows, got {prompt_embeds.shape[1]}"
            )
        if (image_embeds is None) != (self.config.image_dim is None):
            raise ValueError(f"image_embeds must be {'absent' if image_embeds is not None else 'given'} for this model")
        # zeros before the MLP, which makes its biases' image of them; all rows are attended
        text = self.text_embedding(F.pad(prompt_embeds, (0, 0, 0, missing)))
        image = None if image_embeds is None else self.img_emb(image_embeds)
        return Context(text, image)

    def embed_timestep(self, timestep: Tensor, device: torch.device) -> TimeEmbedding:
        """Timesteps [B] or [B, L] -> embeddings of the distinct ones, and the row of each token."""
        distinct, row = torch.unique(timestep, return_inverse=True)
        row = row.reshape(len(timestep), -1)  # [B, 1] or [B, L]
        if len(distinct) == 1:
            row = row[:1, :1]
        embedding = self.time_embedding(sinusoid(distinct, self.config.freq_dim).to(device))
        projection = self.time_projection(embedding).unflatten(-1, (6, -1))
        return TimeEmbedding(embedding, projection, row.to(device))

    def embed_tokens(self, latents: Tensor, pose_latents: Tensor | None = None) -> Tensor:
        """[B, in_dim, T, h, w] and the pose latents -> tokens [B, L, D] float32."""
        tokens: Tensor = self.patch_embedding(latents)
        if pose_latents is not None:
            tokens = torch.cat((tokens, self.pose_patch_embedding(pose_latents)), dim=1)
        return tokens

    def predict(self, tokens: Tensor, time: TimeEmbedding, size: torch.Size) -> Tensor:
        """Tokens after the last block -> velocity [B, out_dim, *size]; tokens beyond those of `size` are left out."""
        grid = [length // patch for length, patch in zip(size, self.config.patch, strict=True)]
        patches = self.team.predicted(self.head, tokens, time, grid[0] * grid[1] * grid[2])
        patches = patches.reshape(len(tokens), *grid, *self.config.patch, -1)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """[1, rows, dim] with standard deviation dim^-0.5; uniform, as drawing normals on the meta device takes seconds."""
    bound = (3 / dim) ** 0.5
    return nn.Parameter(torch.empty(1, rows, dim).uniform_(-bound, bound))


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """cos then sin of timestep * 10000^(-2j/dim): [n] -> [n, dim] float32, from float64 angles."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2))
    angles = torch.outer(timestep.double(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()
