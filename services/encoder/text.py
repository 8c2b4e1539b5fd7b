"""Prompts -> prompt_embeds [B, text_len, dim]: cleaning, tokens, and the UMT5 encoder.

The encoder has a table of relative positions in every layer, no attention scaling and no biases; rows past the end of a
prompt are zero. Source: UMT5, Chung et al. 2023 (arXiv:2304.09151), and Wan-Video/Wan2.1 `wan/modules/t5.py`, with
which the outputs agree.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from runtime.weights import CheckpointMismatch


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a UMT5 encoder; `text_len` is the number of rows that the diffusion transformer is given."""

    vocab: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512


PRESETS: Mapping[str, TextEncoderConfig] = {
    "umt5-xxl": TextEncoderConfig(vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24),
}


@dataclass(frozen=True)
class EncodedPrompts:
    """What `TextEncoder.encode` gives, one entry per prompt.

    Attributes:
        prompt_embeds: [B, text_len, dim], in the dtype of the weights; rows from `num_tokens` on are zero.
        num_tokens: rows in use, the end-of-text token among them.
        truncated: whether the prompt was longer than text_len and lost its end.
    """

    prompt_embeds: Tensor
    num_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]


def clean_prompt(prompt: str) -> str:
    """Repairs the encoding, resolves HTML entities (also doubly escaped ones) and makes every run of whitespace one space.

    Source: Wan-Video/Wan2.2 `wan/modules/tokenizers.py`, cleaning mode "whitespace". ftfy also turns full-width letters
    and curly quotes into plain ones, which the models saw in training too.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """Text -> token ids that end in the end-of-text token, by the `tokenizer.json` of a local folder."""

    def __init__(self, directory: Path, config: TextEncoderConfig) -> None:
        """Reads the folder; nothing is looked up anywhere else.

        Raises:
            FileNotFoundError: the folder has no tokenizer.json.
            CheckpointMismatch: its ids do not fit the embedding table, or it does not mark the end of a text.
        """
        path = directory / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"tokenizer file {path} does not exist")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        # counts the end-of-text token, so a truncated prompt keeps it as its last one
        self._tokenizer.enable_truncation(config.text_len)
        if self._tokenizer.get_vocab_size() > config.vocab:
            size = self._tokenizer.get_vocab_size()
            raise CheckpointMismatch(f"{path.name} has {size} tokens, the embedding table only {config.vocab} rows")
        if len(self.tokenize("")[0]) != 1:
            raise CheckpointMismatch(f"{path.name} must add exactly one end-of-text token to a text")

    def tokenize(self, text: str) -> tuple[list[int], bool]:
        """Ids of a cleaned text, at most text_len of them, and whether some were cut off."""
        encoding = self._tokenizer.encode(text)
        return list(encoding.ids), bool(encoding.overflowing)


class TextModel(nn.Module):
    """Token ids -> hidden states; the part of the text encoder that has weights."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        umt5 = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab,
                d_model=config.dim,
                d_kv=config.dim_attn // config.num_heads,
                d_ff=config.dim_ffn,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_distance,
                dropout_rate=0.0,
            )
        )
        # the stack alone: around it, the embedding table has a second name, which loading would turn into a second copy
        self.stack = umt5.encoder

    def forward(self, token_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encodes padded texts.

        Args:
            token_ids: [B, L] int64, on the device of the weights.
            mask: [B, L], 1 for tokens and 0 for padding; None where nothing is padding.

        Returns:
            [B, L, dim]; rows of padding are zero.
        """
        hidden: Tensor = self.stack(input_ids=token_ids, attention_mask=mask).last_hidden_state
        return hidden if mask is None else hidden.masked_fill(mask[..., None] == 0, 0)


class TextEncoder:
    """Prompts -> prompt_embeds, with the weights in `model`; whoever moves `model` decides where it computes."""

    def __init__(self, config: TextEncoderConfig, model: TextModel, tokenizer: PromptTokenizer) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Cleans and encodes prompts; an empty one is a single end-of-text token.

        Each prompt runs alone and without padding: masked padding changes no row (it only costs time), and the
        embeddings of a prompt do not depend on what it was sent with.
        """
        table = self.model.stack.embed_tokens.weight
        prompt_embeds = table.new_zeros(len(prompts), self.config.text_len, self.config.dim)
        tokenized = [self.tokenizer.tokenize(clean_prompt(prompt)) for prompt in prompts]
        for rows, (ids, _) in zip(prompt_embeds, tokenized, strict=True):
            rows[: len(ids)] = self.model(torch.tensor([ids], device=table.device))[0]
        return EncodedPrompts(
            prompt_embeds,
            num_tokens=tuple(len(ids) for ids, _ in tokenized),
            truncated=tuple(truncated for _, truncated in tokenized),
        )
