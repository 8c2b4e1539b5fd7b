"""Weights that come and go: the same predictions, whatever stays, and after a run that broke off."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from services.denoiser.model import DiffusionTransformer
from services.denoiser.precision import set_precision
from services.denoiser.quantisation import block_linears, quantize_modules, quantize_state_dict
from services.denoiser.streaming import Piece, of_every_step, of_the_context, of_the_request, stream_weights
from tests.services.denoiser.tiny import SCAIL, predict_animation, transformer

CPU = torch.device("cpu")
DEEP = replace(SCAIL, num_layers=5)


def quantised() -> DiffusionTransformer:
    model = transformer(DEEP)
    modules = block_linears(model)
    state = quantize_state_dict(model.state_dict(), modules)
    quantize_modules(model, modules)
    model.load_state_dict({name: tensor for name, tensor in state.items() if "put_scale" not in name}, assign=True)
    return model


@pytest.mark.parametrize("resident", range(6))
def test_streamed_blocks_predict_the_same_again_and_again(resident: int) -> None:
    model = quantised()
    expected = predict_animation(model)
    stream_weights(model, CPU, resident)
    for _ in range(3):
        assert torch.equal(predict_animation(model), expected)


def test_int8_arithmetic_is_streamed_too() -> None:
    model = quantised()
    set_precision(model, "balanced")
    expected = predict_animation(model)
    stream_weights(model, CPU, 1)
    assert torch.equal(predict_animation(model), expected)


@pytest.mark.parametrize("broken", range(5))
def test_a_run_that_breaks_off_leaves_the_next_one_right(broken: int) -> None:
    model = quantised()
    expected = predict_animation(model)
    stream_weights(model, CPU, 1)

    def stop(module: nn.Module, arguments: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[broken].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        predict_animation(model)
    handle.remove()
    assert torch.equal(predict_animation(model), expected)


def test_after_a_pass_every_streamed_weight_is_one_of_host_memory() -> None:
    model = quantised()
    names = {name for name, _ in model.blocks.named_parameters()} | {name for name, _ in model.blocks.named_buffers()}
    stream_weights(model, CPU, 0)
    predict_animation(model)
    assert set(model.blocks.state_dict()) == names
    pieces = {tensor.untyped_storage().data_ptr() for tensor in model.blocks.state_dict().values()}
    assert len(pieces) == DEEP.num_layers * (1 + 4)  # a block, and its four linears of the context


def test_pieces_hold_every_weight_once_at_an_aligned_place() -> None:
    model = quantised()
    block = model.blocks[0]
    weights = of_every_step(block)
    apart = {id(tensor) for module in of_the_context(block) for tensor in [*module.parameters(), *module.buffers()]}
    everything = {id(tensor) for tensor in [*block.parameters(), *block.buffers()]}
    assert {id(tensor) for _, _, tensor in weights} == everything - apart
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    piece = Piece(weights, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    offsets = [part.offset for part in piece._parts]
    assert all(offset % 256 == 0 for offset in offsets)
    assert len(set(offsets)) == len(offsets)


def test_hooks_come_off() -> None:
    model = quantised()
    expected = predict_animation(model)
    stream_weights(model, CPU, 0)()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(predict_animation(model), expected)  # the weights are whole in host memory


def test_more_residents_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="resident must be 0 to 5, got 6"):
        stream_weights(quantised(), CPU, 6)


def test_models_without_an_image_branch_have_less_of_the_request() -> None:
    plain = transformer(replace(SCAIL, image_dim=None, pose=False))
    assert len(of_the_request(plain)) == 2
    assert len(of_the_request(transformer(SCAIL))) == 3
