"""Encoders within a budget: the same embeddings, however many layers stay, and plans that keep to their numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.budget import DoesNotFit
from runtime.weights import build_on_meta
from services.encoder.image import PRESETS as IMAGE_PRESETS
from services.encoder.image import ImageEncoder, ImageModel
from services.encoder.placement import (
    GIB,
    EncoderPlan,
    _look_up_in_host_memory,
    activations,
    place_encoders,
    plan_encoders,
    weights_of,
)
from services.encoder.text import PRESETS, TextEncoder, TextModel
from services.encoder.weights import image_model
from tests.services.encoder.checkpoints import IMAGE, TEXT, released_image_weights, text_encoder

CPU = torch.device("cpu")
DEEP = replace(TEXT, num_layers=5)
DEEP_IMAGE = replace(IMAGE, num_layers=5)
XXL = PRESETS["umt5-xxl"]
PROMPTS = ["a red jacket", "", "she walks slowly across the garden"]
PICTURES = [torch.arange(40 * 24 * 3).reshape(40, 24, 3).to(torch.uint8), torch.full((3, 9, 9), 0.5)]
WEIGHTS = weights_of(
    build_on_meta(lambda: TextModel(XXL)).to(torch.bfloat16),
    build_on_meta(lambda: ImageModel(IMAGE_PRESETS["clip-vit-h-14"])).to(torch.bfloat16),
)


def image_encoder() -> ImageEncoder:
    tensors = released_image_weights(DEEP_IMAGE)
    return ImageEncoder(DEEP_IMAGE, image_model(tensors, DEEP_IMAGE, device=CPU, dtype=torch.float32, source="a test"))


def budget_for(text: TextEncoder, image: ImageModel | None, resident: int) -> int:
    """The fewest bytes with so many layers of the text encoder on the device."""
    weights = weights_of(text.model, image)
    least = plan_encoders(weights, DEEP, GIB * 2).device_bytes - sum_of(text.model, image)
    places = 2 * weights.image_layer + 2 * weights.text_layer
    return least + weights.rest + places + resident * weights.text_layer


def sum_of(text: TextModel, image: ImageModel | None) -> int:
    models = [text] if image is None else [text, image]
    return sum(tensor.nbytes for model in models for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streamed_encoders_give_the_same_embeddings_again_and_again(tmp_path: Path, resident: int) -> None:
    text, image = text_encoder(tmp_path, DEEP), image_encoder()
    expected = text.encode(PROMPTS).prompt_embeds, image.encode(PICTURES)
    plan = place_encoders(text.model, image.model, DEEP, CPU, budget_for(text, image.model, resident))
    assert (plan.text_resident, plan.is_whole) == (resident, False)
    assert sum(bool(layer._forward_pre_hooks) for layer in text.model.stack.block) == 5 - resident
    for _ in range(2):
        assert torch.equal(text.encode(PROMPTS).prompt_embeds, expected[0])
        assert torch.equal(image.encode(PICTURES), expected[1])


def test_layers_that_wait_in_a_folder_give_the_same_embeddings(tmp_path: Path) -> None:
    text, image = text_encoder(tmp_path, DEEP), image_encoder()
    expected = text.encode(PROMPTS).prompt_embeds, image.encode(PICTURES)
    folder = tmp_path / "offload"
    folder.mkdir()
    place_encoders(text.model, image.model, DEEP, CPU, budget_for(text, image.model, 1), folder)
    for _ in range(2):
        assert torch.equal(text.encode(PROMPTS).prompt_embeds, expected[0])
        assert torch.equal(image.encode(PICTURES), expected[1])


def test_rows_of_the_table_come_to_the_device_and_the_table_does_not() -> None:
    table = torch.nn.Embedding(5, 3)
    _look_up_in_host_memory(table, torch.device("meta"))
    assert table(torch.tensor([1, 2])).device.type == "meta"
    assert table.weight.device.type == "cpu"


def test_a_text_encoder_alone_is_placed_too(tmp_path: Path) -> None:
    text = text_encoder(tmp_path, DEEP)
    expected = text.encode(PROMPTS).prompt_embeds
    place_encoders(text.model, None, DEEP, CPU, budget_for(text, None, 1))
    assert torch.equal(text.encode(PROMPTS).prompt_embeds, expected)


def test_all_of_it_stays_where_there_is_room(tmp_path: Path) -> None:
    text, image = text_encoder(tmp_path, DEEP), image_encoder()
    plan = place_encoders(text.model, image.model, DEEP, CPU, 2 * GIB)
    assert plan.is_whole
    assert not any(module._forward_pre_hooks for module in text.model.modules())


def test_the_released_encoders_need_two_gib() -> None:
    plan = plan_encoders(WEIGHTS, XXL, int(2.25 * GIB))
    assert (plan.text_resident, plan.is_whole) == (0, False)
    assert 2 * GIB < plan.device_bytes < 2.25 * GIB
    assert plan.streamed_bytes == 24 * WEIGHTS.text_layer
    assert plan.host_bytes == plan.streamed_bytes + WEIGHTS.table + 31 * WEIGHTS.image_layer
    with pytest.raises(DoesNotFit, match=r"need 2\.0\d GiB with every layer streamed; the budget is 2\.00 GiB"):
        plan_encoders(WEIGHTS, XXL, 2 * GIB)
    assert plan_encoders(WEIGHTS, XXL, 14 * GIB).is_whole


def test_scores_of_all_heads_are_counted() -> None:
    more = activations(replace(XXL, num_heads=65)) - activations(XXL)
    assert more == 512 * 512 * (2 + 2 + 4 + 4 + 2)


@given(st.integers(int(2.2 * GIB), 14 * GIB))
def test_plans_keep_within_the_budget_and_keep_more_where_there_is_more(budget: int) -> None:
    plan = plan_encoders(WEIGHTS, XXL, budget)
    assert plan.device_bytes <= budget
    more = plan_encoders(WEIGHTS, XXL, budget + GIB // 2)
    assert more.text_resident > plan.text_resident or more.is_whole or not _one_more_fits(plan, budget)


def _one_more_fits(plan: EncoderPlan, budget: int) -> bool:
    return plan.device_bytes + WEIGHTS.text_layer <= budget + GIB // 2 and plan.text_resident < 22
