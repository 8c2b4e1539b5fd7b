from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from services.encoder.image import (
    ImageEncoder,
    ImageEncoderConfig,
    Preprocessing,
    preprocess,
    resize_bicubic,
    resize_lanczos,
)
from services.encoder.weights import image_model
from tests.services.encoder.checkpoints import CPU, IMAGE, released_image_weights

OFFICIAL = replace(IMAGE, preprocessing="official")
WAN2GP = replace(IMAGE, preprocessing="wan2gp")


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    model = image_model(released_image_weights(), IMAGE, device=CPU, dtype=torch.float32, source="test")
    return ImageEncoder(IMAGE, model)


def picture(height: int, width: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * width)) * 2 - 1


def test_pictures_of_any_size_give_one_row_per_patch_and_the_class_token(encoder: ImageEncoder) -> None:
    image_embeds = encoder.encode([picture(20, 50), picture(64, 33)])
    assert image_embeds.shape == (2, 1 + 4, IMAGE.dim)
    torch.testing.assert_close(image_embeds[1:], encoder.encode([picture(64, 33)]))


def test_class_token_is_the_row_that_no_patch_moves(encoder: ImageEncoder) -> None:
    # with no blocks left, a row is its own patch and position alone
    config = replace(IMAGE, num_layers=1)
    bare = ImageEncoder(
        config, image_model(released_image_weights(config), config, device=CPU, dtype=torch.float32, source="test")
    )
    one, other = bare.encode([picture(28, 28), picture(28, 29)])
    assert torch.equal(one[0], other[0])
    assert (one[1:] != other[1:]).any(1).all()


@pytest.mark.parametrize("name", ["visual.transformer.2.mlp.2.bias", "visual.post_norm.weight", "visual.head"])
def test_last_block_and_what_follows_it_have_no_influence(encoder: ImageEncoder, name: str) -> None:
    weights = released_image_weights()
    weights[name] = weights[name] + 1
    changed = ImageEncoder(IMAGE, image_model(weights, IMAGE, device=CPU, dtype=torch.float32, source="test"))
    assert torch.equal(changed.encode([picture(30, 30)]), encoder.encode([picture(30, 30)]))


def test_block_before_the_last_has_influence(encoder: ImageEncoder) -> None:
    weights = released_image_weights()
    weights["visual.transformer.1.mlp.2.bias"] = weights["visual.transformer.1.mlp.2.bias"] + 1
    changed = ImageEncoder(IMAGE, image_model(weights, IMAGE, device=CPU, dtype=torch.float32, source="test"))
    assert not torch.allclose(changed.encode([picture(30, 30)]), encoder.encode([picture(30, 30)]))


def test_embeddings_have_the_dtype_of_the_weights(encoder: ImageEncoder) -> None:
    model = image_model(released_image_weights(), IMAGE, device=CPU, dtype=torch.bfloat16, source="test")
    half = ImageEncoder(IMAGE, model).encode([picture(30, 30)])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), encoder.encode([picture(30, 30)]), atol=0.1, rtol=0.1)


def test_pictures_go_to_where_the_weights_are() -> None:
    model = image_model(released_image_weights(), IMAGE, device=CPU, dtype=torch.float32, source="test")
    assert ImageEncoder(IMAGE, model.to("meta")).encode([picture(30, 30)]).is_meta


@pytest.mark.parametrize("config", [OFFICIAL, WAN2GP])
def test_each_channel_is_normalised_by_its_own_mean_and_deviation(config: ImageEncoderConfig) -> None:
    flat = torch.tensor([128, 64, 255], dtype=torch.uint8).expand(9, 5, 3)  # red, green, blue
    pixels = preprocess(flat, config)
    assert pixels.shape == (3, IMAGE.image_size, IMAGE.image_size)
    expected = [
        (128 / 255 - 0.48145466) / 0.26862954,
        (64 / 255 - 0.4578275) / 0.26130258,
        (1 - 0.40821073) / 0.27577711,
    ]
    torch.testing.assert_close(pixels.mean((1, 2)), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("preprocessing", get_args(Preprocessing))
def test_bytes_and_floats_of_the_same_picture_agree(preprocessing: Preprocessing) -> None:
    config = replace(IMAGE, preprocessing=preprocessing)
    levels = torch.randint(0, 256, (17, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    floats = levels.permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(preprocess(levels, config), preprocess(floats, config))


@pytest.mark.parametrize("resize", [resize_bicubic, resize_lanczos])
def test_picture_is_squashed_and_not_cropped(resize: Callable[[Tensor, int], Tensor]) -> None:
    wide = torch.full((3, 8, 64), -1.0)
    wide[:, :, 32:] = 1
    square = resize(wide, 16)
    assert (square[:, :, :6] < -0.9).all()
    assert (square[:, :, 10:] > 0.9).all()


@pytest.mark.parametrize("resize", [resize_bicubic, resize_lanczos])
def test_picture_of_the_right_size_is_left_alone(resize: Callable[[Tensor, int], Tensor]) -> None:
    levels = torch.arange(64, 256).repeat(9).reshape(3, 24, 24) / 127.5 - 1
    torch.testing.assert_close(resize(levels, 24), levels, atol=1e-6, rtol=0)


def test_lanczos_truncates_dark_levels_to_one_step_less() -> None:
    levels = torch.arange(256)
    came_back = (resize_lanczos((levels / 127.5 - 1).expand(3, 256, 256), 256) + 1) * 127.5
    dark = (levels > 0) & (levels < 64)
    torch.testing.assert_close(came_back[0, 0], (levels - dark.long()).float(), atol=1e-3, rtol=0)


def test_lanczos_averages_where_bicubic_skips() -> None:
    # columns alternate; what is not antialiased keeps picking up single ones
    columns = torch.tensor([-1.0, 1.0]).repeat(70).expand(3, 140, 140)
    assert resize_lanczos(columns, 20).abs().max() < 0.1
    assert resize_bicubic(columns, 28).abs().max() > 0.5


def test_bicubic_follows_the_cubic_with_a_of_minus_three_quarters() -> None:
    step = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(3, 4, 4)
    # twice as large: output 3 lies at input 1.25, between the two halves of the step
    near, far = 0.25, 0.75
    a = -0.75
    inner = (a + 2) * far**3 - (a + 3) * far**2 + 1
    outer = a * (1 + far) ** 3 - 5 * a * (1 + far) ** 2 + 8 * a * (1 + far) - 4 * a
    assert near + far == 1
    torch.testing.assert_close(resize_bicubic(step, 8)[0, 0, 3], torch.tensor(inner + outer))
