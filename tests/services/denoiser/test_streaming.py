"""Weights that come and go: the same predictions, whatever stays, and after a run that broke off."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from services.denoiser.denoise import Prompt
from services.denoiser.model import Block, Context, DiffusionTransformer
from services.denoiser.precision import set_precision
from services.denoiser.quantisation import block_linears, quantize_modules, quantize_state_dict
from services.denoiser.streaming import of_every_step, of_the_context, of_the_request, stream_weights
from tests.services.denoiser.tiny import SCAIL, animation_of, normal, predict_animation, prompt, transformer

CPU = torch.device("cpu")
DEEP = replace(SCAIL, num_layers=5)


def quantised() -> DiffusionTransformer:
    model = transformer(DEEP)
    modules = block_linears(model)
    state = quantize_state_dict(model.state_dict(), modules)
    quantize_modules(model, modules)
    model.load_state_dict({name: tensor for name, tensor in state.items() if "put_scale" not in name}, assign=True)
    return model


def embedded(model: DiffusionTransformer, embeds: Prompt | None = None) -> Context:
    embeds = embeds or prompt(SCAIL)
    with torch.no_grad():
        return model.embed_context(embeds.prompt_embeds, embeds.image_embeds)


def predicted(model: DiffusionTransformer, context: Context) -> torch.Tensor:
    clip = animation_of(head_dim=model.config.head_dim)
    latents = clip.model_input(normal(1, 16, 3, 8, 8))
    with torch.no_grad():
        velocity: torch.Tensor = model(latents, torch.tensor([500]), context, clip.rope, clip.pose_latents)
    return velocity


def predicted_twice(model: DiffusionTransformer, context: Context | None = None) -> tuple[torch.Tensor, Context]:
    context = context or embedded(model)
    predicted(model, context)
    return predicted(model, context), context


def count_calls(model: DiffusionTransformer) -> list[int]:
    """How often each block makes its keys of the text, from now on."""
    calls = [0] * len(model.blocks)

    def count(index: int) -> None:
        calls[index] += 1

    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.cross_attn.k.register_forward_hook(lambda *_, index=index: count(index))
    return calls


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


@pytest.mark.parametrize("resident", [0, 2, 5])
def test_after_a_pass_a_block_has_its_weights_in_few_pieces_of_memory(resident: int) -> None:
    model = quantised()
    names = {name for name, _ in model.blocks.named_parameters()} | {name for name, _ in model.blocks.named_buffers()}
    stream_weights(model, CPU, resident)
    predict_animation(model)
    assert set(model.blocks.state_dict()) == names
    memory = {tensor.untyped_storage().data_ptr() for tensor in model.blocks.state_dict().values()}
    assert len(memory) == (1 + 4) * DEEP.num_layers  # of every step, and of each linear of the context


def test_weights_of_every_step_are_all_but_those_of_the_context() -> None:
    block = quantised().blocks[0]
    apart = {id(tensor) for module in of_the_context(block) for tensor in [*module.parameters(), *module.buffers()]}
    everything = {id(tensor) for tensor in [*block.parameters(), *block.buffers()]}
    assert {id(tensor) for _, _, tensor in of_every_step(block)} == everything - apart


@pytest.mark.parametrize("resident", [0, 5])
def test_keys_of_the_context_are_made_once_and_kept_in_one_piece_of_memory_a_block(resident: int) -> None:
    model = quantised()
    expected, _ = predicted_twice(model)
    stream_weights(model, CPU, resident)
    made = count_calls(model)
    again, context = predicted_twice(model)
    assert torch.equal(again, expected)
    assert made == [1] * DEEP.num_layers
    for block in model.blocks:
        assert isinstance(block, Block)
        pairs = context.made[block.cross_attn]
        assert [tensor.shape[1] for pair in pairs for tensor in pair] == [6, 6, 5, 5]
        assert len({tensor.untyped_storage().data_ptr() for pair in pairs for tensor in pair}) == 1


def test_two_contexts_do_not_mix() -> None:
    model = quantised()
    other = replace(embeds := prompt(SCAIL), prompt_embeds=embeds.prompt_embeds + 1)
    expected = [predicted_twice(model, embedded(model, each))[0] for each in (embeds, other)]
    assert not torch.equal(*expected)
    stream_weights(model, CPU, 2)
    contexts = [embedded(model, each) for each in (embeds, other)]
    for _ in range(2):  # branch after branch, as guidance does
        for context, result in zip(contexts, expected, strict=True):
            assert torch.equal(predicted(model, context), result)


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
    assert len(of_the_request(plain)) == 1
    assert len(of_the_request(transformer(SCAIL))) == 2
