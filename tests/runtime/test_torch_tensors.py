"""WireTensor <-> torch.Tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.tensors import WireTensor
from runtime.torch_tensors import from_torch, to_torch

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31))
def test_every_type_and_shape_comes_back_bit_for_bit(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape, dtype=torch.int64).prod())
    content = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    sent = (content & 1 if dtype is torch.bool else content).view(dtype).reshape(shape)
    back = to_torch(from_torch("latents", sent))
    assert back.dtype == dtype
    assert back.shape == sent.shape
    assert bits(back) == bits(sent)


def test_payloads_of_bfloat16_nans_are_kept() -> None:
    patterns = torch.tensor([0x7FC1, 0x7F81, 0xFFFF - 2**16, 0x0001, 0x8000 - 2**16], dtype=torch.int16)
    back = to_torch(from_torch("latents", patterns.view(torch.bfloat16)))
    assert torch.equal(back.view(torch.int16), patterns)


def test_a_transposed_tensor_is_sent_in_order() -> None:
    sent = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    wire = from_torch("latents", sent)
    assert wire.shape == (3, 2)
    assert torch.equal(to_torch(wire), sent)


def test_neither_way_copies_a_contiguous_tensor() -> None:
    sent = torch.zeros(4, dtype=torch.bfloat16)
    back = to_torch(from_torch("latents", sent))
    assert back.data_ptr() == sent.data_ptr()


def test_a_tensor_that_requires_gradients_is_sent() -> None:
    assert to_torch(from_torch("latents", torch.ones(2, requires_grad=True))).tolist() == [1, 1]


def test_a_type_that_cannot_be_carried_is_an_error() -> None:
    with pytest.raises(KeyError):
        from_torch("latents", torch.zeros(1, dtype=torch.float64))


def test_bytes_of_a_file_become_a_tensor() -> None:
    assert to_torch(WireTensor.from_bytes("video", b"\x01\x02")).tolist() == [1, 2]
