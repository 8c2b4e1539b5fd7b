"""EncoderService over real gRPC: prompts, pictures, refusals."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bunraku.errors import InvalidRequest, NotThereYet
from bunraku.v1 import encoder_pb2 as pb
from bunraku.v1 import stage_pb2
from runtime.bundles import Bundle, BundleError, Quirks, configuration
from runtime.client import Budget
from runtime.tensors import FLOAT32, WireTensor
from runtime.torch_tensors import from_torch, to_torch
from services.encoder import image, text
from services.encoder.image import ImageEncoder, Preprocessing
from services.encoder.placement import least_bytes, weights_of
from services.encoder.service import EncoderService
from services.encoder.weights import load_image_encoder, load_text_encoder
from tests.services.serving import Answers, Served, serving

CPU = torch.device("cpu")
PICTURE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8))
Stage = Served[EncoderService]


def stage(bundle: Bundle, **options: Any) -> AbstractAsyncContextManager[Stage]:
    return serving("encoder", EncoderService, bundle, **options)


async def encode_text(of: Stage, prompt: str, negative_prompt: str | None = None) -> Answers:
    answers = Answers()
    request = pb.EncodeTextRequest(prompt=prompt, negative_prompt=negative_prompt)
    async with of.client.call(Budget.of(60)) as call:
        answers.items += [item async for item in call.unary(call.stub.EncodeText, request)]
    return answers


def image_first(**fields: Any) -> pb.EncodeImageRequest:
    return pb.EncodeImageRequest(parameters=pb.EncodeImageParameters(**fields))


async def encode_image(of: Stage, picture: torch.Tensor = PICTURE, **fields: Any) -> torch.Tensor:
    answers = await of.ask("EncodeImage", image_first(**fields), [from_torch("image", picture)])
    [embeds] = answers.items
    assert (embeds.name, embeds.dtype, embeds.shape) == ("image_embeds", FLOAT32, (1, 5, 16))
    return to_torch(embeds)


def prompt_embeds(bundle: Bundle, prompt: str) -> torch.Tensor:
    """Without the service."""
    component = bundle.component("text_encoder")
    config = configuration(component, text.PRESETS, text.TextEncoderConfig)
    assert component.tokenizer is not None
    encoder = load_text_encoder(component.files, config, component.tokenizer, device=CPU, dtype=torch.float32)
    return encoder.encode([prompt]).prompt_embeds


def image_embeds(bundle: Bundle, preprocessing: Preprocessing) -> torch.Tensor:
    """Without the service."""
    component = bundle.component("image_encoder")
    config = configuration(component, image.PRESETS, image.ImageEncoderConfig)
    model = load_image_encoder(component.files, config, device=CPU, dtype=torch.float32).model
    return ImageEncoder(replace(config, preprocessing=preprocessing), model).encode([PICTURE])


async def test_a_prompt_and_what_to_avoid_become_embeddings(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        answers = await encode_text(encoder, "a red dancer jumps", "blurry")
        [info] = answers.messages("info")
        assert answers.items[0].WhichOneof("message") == "info"
        assert [tensor.name for tensor in answers.tensors] == ["prompt_embeds", "negative_prompt_embeds"]
        for tensor, prompt, tokens in zip(
            answers.tensors,
            ("a red dancer jumps", "blurry"),
            (info.prompt_tokens, info.negative_prompt_tokens),
            strict=True,
        ):
            assert (tensor.dtype, tensor.shape) == (FLOAT32, (1, 12, 24))
            embeds = to_torch(tensor)
            assert torch.equal(embeds, prompt_embeds(bundle, prompt))
            assert 1 < tokens < 12
            assert bool((embeds[0, :tokens] != 0).any(dim=1).all())
            assert not bool(embeds[0, tokens:].any())
    assert not info.prompt_truncated
    assert not info.negative_prompt_truncated


async def test_a_prompt_alone_gives_no_negative_embedding(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        alone = await encode_text(encoder, "a red dancer")
        beside = await encode_text(encoder, "a red dancer", "blue " * 40)
    [info] = alone.messages("info")
    assert (info.negative_prompt_tokens, info.negative_prompt_truncated) == (0, False)
    assert [tensor.name for tensor in alone.tensors] == ["prompt_embeds"]
    assert torch.equal(to_torch(alone.one("prompt_embeds")), to_torch(beside.one("prompt_embeds")))


async def test_a_prompt_that_is_too_long_is_cut_and_that_is_told(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        [cut] = (await encode_text(encoder, "jump " * 11, "jump " * 12)).messages("info")
        assert (cut.prompt_tokens, cut.prompt_truncated) == (12, False)
        assert (cut.negative_prompt_tokens, cut.negative_prompt_truncated) == (12, True)
        longest = await encode_text(encoder, "ü" * 10_000)
    assert longest.messages("info")[0].prompt_truncated


async def test_empty_texts_are_encoded_as_their_end(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        answers = await encode_text(encoder, "", "")
        odd = await encode_text(encoder, " \n\t", "\x00\u200b\U0001f483")
    [info] = answers.messages("info")
    assert (info.prompt_tokens, info.negative_prompt_tokens) == (1, 1)
    empty, negative = (to_torch(tensor) for tensor in answers.tensors)
    assert torch.equal(empty, negative)
    assert torch.equal(empty, to_torch(odd.one("prompt_embeds")))
    assert empty[0, 0].any()
    assert not empty[0, 1:].any()


async def test_a_text_beyond_10_000_characters_is_refused(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        with pytest.raises(InvalidRequest) as error:
            await encode_text(encoder, "x" * 10_001, "ü" * 10_002)
        assert error.value.violations == (
            ("prompt", "must have at most 10000 characters, got 10001"),
            ("negative_prompt", "must have at most 10000 characters, got 10002"),
        )


async def test_a_picture_is_brought_to_size_as_it_is_asked_for(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        bicubic = await encode_image(encoder, resize=pb.IMAGE_RESIZE_BICUBIC)
        lanczos = await encode_image(encoder, resize=pb.IMAGE_RESIZE_LANCZOS)
        assert torch.equal(await encode_image(encoder), bicubic)
    assert torch.equal(bicubic, image_embeds(bundle, "official"))
    assert torch.equal(lanczos, image_embeds(bundle, "wan2gp"))
    assert not torch.equal(bicubic, lanczos)
    other_default = replace(bundle, presets={"official": Quirks(image_resize="lanczos")})
    async with stage(other_default) as encoder:
        assert torch.equal(await encode_image(encoder), lanczos)


async def test_pictures_of_any_size_are_encoded(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        for height, width in ((1, 1), (1, 4096), (28, 28)):
            embeds = await encode_image(encoder, torch.full((height, width, 3), 77, dtype=torch.uint8))
            assert bool(torch.isfinite(embeds).all())


SIDES = "must have sides of 1 to 4096 pixels, got "
WRONG_PICTURES: list[tuple[torch.Tensor, str]] = [
    (torch.zeros(0, 8, 3, dtype=torch.uint8), f"{SIDES}8x0"),
    (torch.zeros(8, 0, 3, dtype=torch.uint8), f"{SIDES}0x8"),
    (torch.zeros(4097, 1, 3, dtype=torch.uint8), f"{SIDES}1x4097"),
    (torch.zeros(1, 4097, 3, dtype=torch.uint8), f"{SIDES}4097x1"),
    (torch.zeros(8, 8, 4, dtype=torch.uint8), "must have the shape [any, any, 3], got [8, 8, 4]"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "must have the shape [any, any, 3], got [3, 8, 8]"),
    (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "must have the shape [any, any, 3], got [1, 8, 8, 3]"),
    (torch.zeros(8, 8, 3), "must be uint8, got float32"),
]


async def test_pictures_that_are_none_are_refused(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        for picture, violation in WRONG_PICTURES:
            violations = await encoder.refused("EncodeImage", image_first(), [from_torch("image", picture)])
            assert violations == (("image", violation),)
        assert await encoder.refused("EncodeImage", image_first()) == (("image", "is missing"),)
        [(field, _)] = await encoder.refused("EncodeImage", image_first(), [from_torch("picture", PICTURE)])
        assert field == "picture"
        violations = await encoder.refused(
            "EncodeImage", image_first(resize=9), [from_torch("image", torch.zeros(0, 0, 3, dtype=torch.uint8))]
        )
        assert violations == (("resize", "is not known: 9"), ("image", f"{SIDES}0x0"))


async def test_speech_is_not_there_yet(bundle: Bundle) -> None:
    first = pb.EncodeAudioRequest(parameters=pb.EncodeAudioParameters(frames_per_second=25))
    speech = WireTensor.from_numpy("audio", np.zeros(16_000, np.float32))
    async with stage(bundle) as encoder:
        with pytest.raises(NotThereYet, match="EncodeAudio is in the contract, but not in this version yet"):
            await encoder.ask("EncodeAudio", first, [speech])


async def test_a_bundle_without_an_image_encoder_encodes_prompts_only(bundle: Bundle) -> None:
    components = {name: component for name, component in bundle.components.items() if name != "image_encoder"}
    async with stage(replace(bundle, components=components)) as encoder:
        assert (await encode_text(encoder, "a dancer")).one("prompt_embeds").shape == (1, 12, 24)
        with pytest.raises(NotThereYet, match="bundle test has no image encoder") as error:
            await encode_image(encoder)
        assert error.value.reason == "NO_IMAGE_ENCODER"


async def test_a_bundle_that_cannot_be_served_says_why(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="bundle test: image_resize nearest is not known"):
        async with stage(replace(bundle, presets={"official": Quirks(image_resize="nearest")})):
            pass
    wordless = replace(bundle.component("text_encoder"), tokenizer=None)
    with pytest.raises(BundleError, match="text_encoder: needs a tokenizer"):
        async with stage(replace(bundle, components={"text_encoder": wordless})):
            pass


async def test_calls_at_the_same_time_do_not_mix(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        texts = ["a red dancer", "a blue robot jumps", ""]
        picture = asyncio.create_task(encode_image(encoder))
        together = await asyncio.gather(*(encode_text(encoder, prompt) for prompt in texts))
        alone = [await encode_text(encoder, prompt) for prompt in texts]
        assert torch.equal(await picture, await encode_image(encoder))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(to_torch(a.one("prompt_embeds")), to_torch(b.one("prompt_embeds")))


async def test_shared_memory_changes_no_bit_and_leaves_nothing_behind(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.shared_memory.MIN_BYTES", 1)
    async with stage(bundle, shared_memory=tmp_path) as encoder:
        embeds = await encode_image(encoder)
        answers = await encode_text(encoder, "a red dancer", "blurry")
        memory = encoder.runtime.shared_memory
        assert memory is not None
        assert memory.own_bytes > 0
        assert torch.equal(embeds, image_embeds(bundle, "official"))
        assert torch.equal(to_torch(answers.one("negative_prompt_embeds")), prompt_embeds(bundle, "blurry"))
        del embeds, answers
    assert os.listdir(tmp_path) == []


async def test_status_tells_of_both_models(bundle: Bundle) -> None:
    async with stage(bundle) as encoder:
        status = await encoder.status()
    assert (status.stage, status.state) == ("encoder", stage_pb2.STAGE_STATE_SERVING)
    assert [component.name for component in status.components] == ["text_encoder", "image_encoder"]
    weights = encoder.service._text.model.state_dict().values()
    [of_text, of_image] = status.components
    assert (of_text.parameters, of_text.dtype) == (sum(weight.numel() for weight in weights), "float32")
    assert of_text.size_bytes == 4 * of_text.parameters
    assert of_image.parameters > 10_000


async def test_on_a_cpu_there_is_no_vram_to_keep_to(bundle: Bundle) -> None:
    async with serving("encoder", partial(EncoderService, vram_bytes=1), bundle) as encoder:  # type: ignore[abstract]
        assert encoder.runtime.memory_mode == stage_pb2.MEMORY_MODE_GPU_ONLY
        await encode_text(encoder, "a red jacket")


async def test_layers_that_do_not_fit_are_streamed_and_give_the_same_embeddings(bundle: Bundle) -> None:
    class Streamed(EncoderService):
        """As on a GPU that is too small."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._vram_bytes, self._pictures_on = 0, CPU

        def _place(self, device: torch.device, budget: int) -> None:
            weights = weights_of(self._text.model, self._image["wan2gp"].model)
            super()._place(device, least_bytes(weights, self._text.config))

    def make(*given: Any) -> EncoderService:
        return Streamed(*given)  # type: ignore[abstract]  # no EncodeAudio yet

    async with serving("encoder", make, bundle) as encoder:
        assert encoder.runtime.memory_mode == stage_pb2.MEMORY_MODE_HYBRID
        for _ in range(2):
            [embeds] = (await encode_text(encoder, "a red jacket")).tensors
            assert torch.equal(to_torch(embeds), prompt_embeds(bundle, "a red jacket"))
            assert torch.equal(await encode_image(encoder), image_embeds(bundle, "official"))
