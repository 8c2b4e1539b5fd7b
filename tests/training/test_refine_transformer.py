"""A finished bundle's transformer, before and after it is quantised."""

from __future__ import annotations

import torch

from services.denoiser.quantisation import quantize_state_dict
from training.refine_transformer import dequantized


def test_dequantized_weights_are_data_times_scale_under_the_plain_names() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = {
        "blocks.0.self_attn.q.weight": torch.randn(6, 4, generator=generator),
        "blocks.0.self_attn.q.bias": torch.randn(6, generator=generator),
        "head.modulation": torch.randn(1, 2, 4, generator=generator),
    }
    quantized = quantize_state_dict(plain, ["blocks.0.self_attn.q"])
    found = dequantized(quantized)
    assert found.keys() == plain.keys()
    weight = plain["blocks.0.self_attn.q.weight"]
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((found["blocks.0.self_attn.q.weight"] - weight).abs() <= 0.51 * step).all())
    assert torch.equal(found["blocks.0.self_attn.q.bias"], plain["blocks.0.self_attn.q.bias"])
    assert torch.equal(found["head.modulation"], plain["head.modulation"])
    again = quantize_state_dict(found, ["blocks.0.self_attn.q"])
    assert torch.equal(again["blocks.0.self_attn.q.weight._data"], quantized["blocks.0.self_attn.q.weight._data"])
