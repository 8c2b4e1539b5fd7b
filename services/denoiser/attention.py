"""Attention: queries, keys and values [B, L, H, d] in, [B, L, H, d] out, through interchangeable backends.

A backend is a value that a model is built with, so that another kernel (or one that spreads the sequence over several
GPUs) needs no change in `model.py`, and the one in use can be reported by its name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from services.denoiser.fp8_attention import Fp8Tokens

Attended: TypeAlias = Tensor | Fp8Tokens  # what queries gathered, [B, L, D], as the linear that follows takes it


class Attending(Protocol):
    """Attention to keys and values that are given, by queries that may come piece by piece."""

    def gather(self, queries: Tensor) -> Tensor:
        """queries [B, L, H, d] -> the same shape; the same dtype, if it is that which the attention wants."""
        ...

    def finish(self, gathered: Tensor) -> Attended:
        """All that was gathered, [B, L, H, d] -> [B, L, D]."""
        ...


class Attention(Protocol):
    """softmax(q k^T / sqrt(d)) v over all keys, without a mask."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype | None:
        """What queries and keys of self-attention are to be made in; None: the dtype of the linears, as values are."""
        ...

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries [B, L, H, d], keys and values [B, K, H, d] -> [B, L, H, d] of the values' dtype."""
        ...

    def over(self, keys: Tensor, values: Tensor) -> Attending:
        """The same in two steps: what is left to do with what was gathered is then done to all of it at once."""
        ...


@dataclass(frozen=True)
class PlainAttending:
    """Where nothing is to be done to keys and values before, nor to what was gathered afterwards."""

    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    keys: Tensor
    values: Tensor

    def gather(self, queries: Tensor) -> Tensor:
        return self.attention(queries, self.keys, self.values)

    def finish(self, gathered: Tensor) -> Tensor:
        return gathered.flatten(2)


@dataclass(frozen=True)
class ScaledDotProduct:
    """PyTorch's scaled_dot_product_attention, held to some of its kernels."""

    name: str
    kernels: tuple[SDPBackend, ...]  # the first that can run is taken
    dtype: torch.dtype | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(list(self.kernels), set_priority=True):
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            )
        return attended.transpose(1, 2)  # [B, L, H, d]

    def over(self, keys: Tensor, values: Tensor) -> PlainAttending:
        return PlainAttending(self, keys, values)


@dataclass(frozen=True)
class Installed:
    """A function of a package that the operator may have installed; it is no dependency of this one."""

    name: str
    package: str
    oldest: int  # major version of the package
    module: str
    function: str
    arguments: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype | None = None

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        function = getattr(importlib.import_module(self.module), self.function)
        attended = function(queries, keys, values, **dict(self.arguments))
        result: Tensor = attended[0] if isinstance(attended, tuple) else attended
        return result

    def over(self, keys: Tensor, values: Tensor) -> PlainAttending:
        return PlainAttending(self, keys, values)

    @property
    def is_installed(self) -> bool:
        try:
            return int(importlib.metadata.version(self.package).split(".")[0]) >= self.oldest
        except importlib.metadata.PackageNotFoundError:
            return False


# int8 products of queries and keys, fp8 of weights and values (Zhang et al. 2024, arXiv:2411.10958). Version 1, which is
# what PyPI has, is slower than cuDNN in bf16 and writes into the caller's keys.
SAGE = Installed("sage", "sageattention", 2, "sageattention", "sageattn", (("tensor_layout", "NHD"),))
# FlashAttention 3, for Hopper (Shah et al. 2024, arXiv:2407.08608)
FLASH3 = Installed("flash3", "flash_attn_3", 3, "flash_attn_interface", "flash_attn_func")
# cuDNN first: 83 ms against 136 ms of flash at 48,832 tokens on an H100
_FASTEST_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
AUTO: Attention = ScaledDotProduct("auto", _FASTEST_FIRST)
BACKENDS: dict[str, Attention] = {
    "auto": AUTO,
    "cudnn": ScaledDotProduct("cudnn", (SDPBackend.CUDNN_ATTENTION,)),
    "flash": ScaledDotProduct("flash", (SDPBackend.FLASH_ATTENTION,)),
    "efficient": ScaledDotProduct("efficient", (SDPBackend.EFFICIENT_ATTENTION,)),
    "math": ScaledDotProduct("math", (SDPBackend.MATH,)),
    "sage": SAGE,
    "flash3": FLASH3,
}


def attention_backend(name: str) -> Attention:
    """The backend of this name.

    Raises:
        ValueError: there is no such backend, or its package is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name}")
    backend = BACKENDS[name]
    if isinstance(backend, Installed) and not backend.is_installed:
        raise ValueError(f"attention {name} needs {backend.package} {backend.oldest} or newer, which is not installed")
    return backend


def usable_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Names of the backends that run on this device in this dtype, found by trying each on a few tokens."""
    tokens = torch.zeros(1, 16, 1, head_dim, device=device, dtype=dtype)
    return [name for name, backend in BACKENDS.items() if _runs(backend, tokens)]


def _runs(backend: Attention, tokens: Tensor) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refused kernel explains itself in warnings
            backend(tokens, tokens, tokens)
    except (RuntimeError, ImportError):
        return False
    return True
