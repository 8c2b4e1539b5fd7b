"""EncoderService: prompts and pictures in, embeddings out."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import torch

from bunraku.errors import NotThereYet
from bunraku.v1 import encoder_pb2 as pb
from bunraku.v1 import encoder_pb2_grpc, stage_pb2
from runtime.bundles import Bundle, BundleError, configuration, require_files
from runtime.checks import Checks
from runtime.stage import StageRuntime
from runtime.tensors import UINT8, require
from runtime.torch_stage import compute_dtype, loaded_component, require_finite, warming_up
from runtime.torch_tensors import from_torch, to_torch
from services.encoder import image, text
from services.encoder.image import ImageEncoder, Preprocessing
from services.encoder.placement import place_encoders
from services.encoder.text import EncodedPrompts, TextEncoder
from services.encoder.weights import load_image_encoder, load_text_encoder

_log = logging.getLogger(__name__)
MAX_PROMPT_CHARACTERS = 10_000
_MAX_SIDE = 4096
_WARM_UP_PROMPT, _WARM_UP_SIDE = "a person dances", 64
_RESIZE: dict[int, Preprocessing] = {
    pb.ImageResize.IMAGE_RESIZE_LANCZOS: "wan2gp",
    pb.ImageResize.IMAGE_RESIZE_BICUBIC: "official",
}
_RESIZE_OF_BUNDLE: dict[str, Preprocessing] = {"lanczos": "wan2gp", "bicubic": "official"}
Context = grpc.aio.ServicerContext[Any, Any]


class EncoderService(encoder_pb2_grpc.EncoderServiceServicer):
    """The encoders of one bundle."""

    full_name = pb.DESCRIPTOR.services_by_name["EncoderService"].full_name

    def __init__(
        self,
        runtime: StageRuntime,
        bundle: Bundle,
        *,
        vram_bytes: int | None = None,
        offload_folder: Path | None = None,
    ) -> None:
        """vram_bytes: that the process may use of its GPU; None: all that there is. offload_folder: as for the placement."""
        if bundle.quirks.image_resize not in _RESIZE_OF_BUNDLE:
            raise BundleError(f"bundle {bundle.name}: image_resize {bundle.quirks.image_resize} is not known")
        self._runtime, self._bundle = runtime, bundle
        self._offload_folder = offload_folder
        self._vram_bytes = vram_bytes if runtime.device.startswith("cuda") else None
        # a large picture takes 0.5 GB while it is made smaller
        self._pictures_on = torch.device(runtime.device if self._vram_bytes is None else "cpu")
        self._text: TextEncoder
        self._image: dict[Preprocessing, ImageEncoder] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)

    def load(self) -> None:
        device = torch.device(self._runtime.device)
        dtype = compute_dtype(device)
        home = device if self._vram_bytes is None else torch.device("cpu")
        self._load_text(home, dtype)
        if "image_encoder" in self._bundle.components:
            self._load_image(home, dtype)
        self._runtime.memory_mode = stage_pb2.MEMORY_MODE_GPU_ONLY
        if self._vram_bytes is not None:
            self._place(device, self._vram_bytes)
        with warming_up(self._runtime):
            self.warm_up()

    def _place(self, device: torch.device, budget: int) -> None:
        image_model = next((encoder.model for encoder in self._image.values()), None)
        plan = place_encoders(self._text.model, image_model, self._text.config, device, budget, self._offload_folder)
        if not plan.is_whole:
            self._runtime.memory_mode = stage_pb2.MEMORY_MODE_HYBRID
        _log.info("%s", plan)

    def warm_up(self) -> None:
        """Encodes a prompt and a picture."""
        self._text.encode([_WARM_UP_PROMPT])
        for encoder in self._image.values():
            encoder.encode([torch.zeros(_WARM_UP_SIDE, _WARM_UP_SIDE, 3, dtype=torch.uint8, device=self._pictures_on)])

    def _load_text(self, device: torch.device, dtype: torch.dtype) -> None:
        component = self._bundle.component("text_encoder")
        require_files(component)
        config = configuration(component, text.PRESETS, text.TextEncoderConfig)
        if component.tokenizer is None:
            raise BundleError(f"{component.name}: needs a tokenizer")
        self._text = load_text_encoder(component.files, config, component.tokenizer, device=device, dtype=dtype)
        self._runtime.components.append(loaded_component(component, self._text.model))

    def _load_image(self, device: torch.device, dtype: torch.dtype) -> None:
        component = self._bundle.component("image_encoder")
        require_files(component)
        config = configuration(component, image.PRESETS, image.ImageEncoderConfig)
        encoder = load_image_encoder(component.files, config, device=device, dtype=dtype)
        for preprocessing in _RESIZE.values():
            self._image[preprocessing] = ImageEncoder(replace(config, preprocessing=preprocessing), encoder.model)
        self._runtime.components.append(loaded_component(component, encoder.model))

    async def EncodeText(self, request: pb.EncodeTextRequest, context: Context) -> AsyncIterator[Any]:
        checks = Checks()
        for field in ("prompt", "negative_prompt"):
            length = len(getattr(request, field))
            text = f"must have at most {MAX_PROMPT_CHARACTERS} characters, got {length}"
            checks.that(length <= MAX_PROMPT_CHARACTERS, field, text)
        checks.done()
        prompts = [request.prompt]
        if request.HasField("negative_prompt"):
            prompts.append(request.negative_prompt)
        encoded = await self._runtime.gpu.run(lambda: self._encoded_texts(prompts))
        yield pb.EncodeTextResponse(info=_text_info(encoded))
        names = ("prompt_embeds", "negative_prompt_embeds")[: len(prompts)]
        tensors = [from_torch(name, encoded.prompt_embeds[row : row + 1]) for row, name in enumerate(names)]
        for message in self._runtime.send(pb.EncodeTextResponse, tensors, context):
            yield message

    def _encoded_texts(self, prompts: list[str]) -> EncodedPrompts:
        encoded = self._text.encode(prompts)
        return replace(encoded, prompt_embeds=require_finite("prompt_embeds", encoded.prompt_embeds.to("cpu")))

    async def EncodeImage(self, requests: AsyncIterator[pb.EncodeImageRequest], context: Context) -> AsyncIterator[Any]:
        first, tensors = await self._runtime.receive_call(requests, context, ["image"])
        if not self._image:
            raise NotThereYet(f"bundle {self._bundle.name} has no image encoder", reason="NO_IMAGE_ENCODER")
        picture = require(tensors, "image", (None, None, 3), (UINT8,))
        resize, checks = first.parameters.resize, Checks()
        checks.that(resize in pb.ImageResize.values(), "resize", f"is not known: {resize}")
        height, width = picture.shape[:2]
        fits = 1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE
        checks.that(fits, "image", f"must have sides of 1 to {_MAX_SIDE} pixels, got {width}x{height}")
        checks.done()
        encoder = self._image[_RESIZE.get(resize, _RESIZE_OF_BUNDLE[self._bundle.quirks.image_resize])]
        embeds = await self._runtime.gpu.run(
            lambda: require_finite("image_embeds", encoder.encode([to_torch(picture).to(self._pictures_on)]).to("cpu"))
        )
        for message in self._runtime.send(pb.EncodeImageResponse, [from_torch("image_embeds", embeds)], context):
            yield message


def _text_info(encoded: EncodedPrompts) -> pb.TextInfo:
    info = pb.TextInfo(prompt_tokens=encoded.num_tokens[0], prompt_truncated=encoded.truncated[0])
    if len(encoded.num_tokens) > 1:
        info.negative_prompt_tokens = encoded.num_tokens[1]
        info.negative_prompt_truncated = encoded.truncated[1]
    return info
