"""WireTensor <-> torch.Tensor, bit-exact, without a copy where the tensor is on the CPU."""

from __future__ import annotations

import torch

from runtime.tensors import WireTensor, dtype_name, dtype_of


def to_torch(tensor: WireTensor) -> torch.Tensor:
    """The tensor on the CPU, sharing the bytes that arrived (a copy of what may not be written to)."""
    dtype: torch.dtype = getattr(torch, dtype_name(tensor.dtype))
    if tensor.size_bytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    data = tensor.data if tensor.data.flags.writeable else tensor.data.copy()
    return torch.from_numpy(data).view(dtype).reshape(tensor.shape)


def from_torch(name: str, tensor: torch.Tensor) -> WireTensor:
    """A tensor of any device as bytes; copies only what is on another device or not contiguous."""
    contiguous = tensor.detach().to("cpu").contiguous()
    data = contiguous.reshape(-1).view(torch.uint8).numpy()
    return WireTensor(name, dtype_of(str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape), data)
