"""VaeService: frames in, latents out, and back; both as streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Literal

import grpc
import torch
from torch import Tensor

from bunraku.errors import InvalidRequest, NotThereYet, OutOfMemory
from bunraku.v1 import vae_pb2 as pb
from bunraku.v1 import vae_pb2_grpc
from runtime.budget import DoesNotFit
from runtime.bundles import Bundle, configuration, require_files
from runtime.checks import Checks
from runtime.gpu import raise_if_cancelled
from runtime.stage import StageRuntime
from runtime.tensors import FLOAT16, FLOATS, UINT8, WireTensor, require
from runtime.torch_stage import loaded_component, require_finite, warming_up, where_it_fits
from runtime.torch_tensors import from_torch, to_torch
from runtime.vram import cap_memory, outside_allocator, use_growing_blocks
from services.vae.channels_last import best_glue, walk_channels_last
from services.vae.color import match_colors
from services.vae.glue import PLAIN
from services.vae.model import PRESETS, Past, Vae, VaeConfig, from_uint8, to_uint8
from services.vae.plan import WHOLE, Direction, Machine, Tiling, plan_tiles
from services.vae.transfer import OneBehind, to_device
from services.vae.warm_up import warm_up
from services.vae.weights import load_vae

AUTO_PRECISION, EXACT = "auto", "exact"
_MIN_SIDE, _MAX_SIDE, _MAX_FRAMES = 16, 4096, 10_000
_ROUNDING: dict[int, Literal["round", "truncate"]] = {
    pb.PixelRounding.PIXEL_ROUNDING_UNSPECIFIED: "round",
    pb.PixelRounding.PIXEL_ROUNDING_NEAREST: "round",
    pb.PixelRounding.PIXEL_ROUNDING_TRUNCATE: "truncate",
}
Context = grpc.aio.ServicerContext[Any, Any]


class VaeService(vae_pb2_grpc.VaeServiceServicer):
    """The VAE of one bundle."""

    full_name = pb.DESCRIPTOR.services_by_name["VaeService"].full_name

    def __init__(
        self,
        runtime: StageRuntime,
        bundle: Bundle,
        *,
        precision: str = AUTO_PRECISION,
        vram_bytes: int | None = None,
    ) -> None:
        """precision: `exact`, or `auto`, `balanced` or `fast`, which are the same here.

        vram_bytes: that the process may use; None: what its device has.
        """
        self._runtime, self._bundle = runtime, bundle
        self._precision, self._vram_bytes = precision, vram_bytes
        self._vae: Vae
        self._machine: Machine
        self._budget: int | None

    def add_to(self, server: grpc.aio.Server) -> None:
        vae_pb2_grpc.add_VaeServiceServicer_to_server(self, server)

    def load(self) -> None:
        component = self._bundle.component("vae")
        require_files(component)
        config = configuration(component, PRESETS, VaeConfig)
        device = torch.device(self._runtime.device)
        dtype, glue = dtype_of(self._precision, device), best_glue(device)
        self._machine = Machine(config, dtype, device.type, is_fused=glue is not PLAIN)
        self._budget = _budget(device, self._vram_bytes)
        self._vae = load_vae(component.files, config, device=device, dtype=dtype)
        walk_channels_last(self._vae, glue=glue)
        self._runtime.components.append(loaded_component(component, self._vae))
        with warming_up(self._runtime):
            self.warm_up()

    def warm_up(self) -> None:
        """Computes something of what an animation of the bundle's size will."""
        video = self._bundle.video
        with where_it_fits(f"frames of {video.width}x{video.height}"):
            warm_up(self._vae, video.height, video.width, self._planned)

    async def Encode(self, requests: AsyncIterator[pb.EncodeRequest], context: Context) -> AsyncIterator[Any]:
        incoming = self._runtime.receive(requests, context)
        parameters = self._checked(await anext(incoming, None))
        tiling = await self._tiling("encode", parameters.height, parameters.width)
        encoder = _ClipEncoder(self._vae, parameters, self._runtime.device, tiling.past())
        latents: list[Tensor] = []
        async for item in incoming:
            frames = encoder.checked(item)
            del item  # frames that are encoded are not kept while further ones arrive
            latents += await self._runtime.gpu.run(partial(encoder.add, frames))
            del frames
            yield pb.EncodeResponse(
                progress=pb.VaeProgress(completed_frames=encoder.received, total_frames=parameters.num_frames)
            )
        encoder.finish()
        latents += await self._runtime.gpu.run(encoder.rest)
        tensor = from_torch("latents", torch.cat(latents, dim=2))
        for message in self._runtime.send(pb.EncodeResponse, [tensor], context):
            yield message

    async def Decode(self, requests: AsyncIterator[pb.DecodeRequest], context: Context) -> AsyncIterator[Any]:
        first, tensors = await self._runtime.receive_call(requests, context, ["latents", "color_reference"])
        parameters = first.parameters
        if parameters.format == pb.FrameFormat.FRAME_FORMAT_H264:
            raise NotThereYet("format FRAME_FORMAT_H264 is not there yet: frames are given raw")
        latents = require(tensors, "latents", (1, self._vae.config.z_dim, None, None, None), FLOATS)
        self._check_decode(parameters, latents)
        color_reference = self._color_reference(parameters, latents, tensors)
        side = self._vae.config.pixels_per_latent
        tiling = await self._tiling("decode", latents.shape[3] * side, latents.shape[4] * side)
        frames = self._runtime.gpu.stream(lambda: self._decoded(parameters, latents, color_reference, tiling))
        async for portion in frames:
            for message in self._runtime.send(pb.DecodeResponse, [portion], context):
                yield message

    @torch.inference_mode()
    def _decoded(
        self, parameters: pb.DecodeParameters, latents: WireTensor, color_reference: Tensor | None, tiling: Tiling
    ) -> Iterator[WireTensor]:
        """Frames of the latents, uint8 [n, H, W, 3], without those to be skipped."""
        clip = to_torch(latents).to(self._runtime.device)
        if not bool(torch.isfinite(clip).all()):
            raise InvalidRequest(("latents", "must be finite"))
        skip = parameters.skip_frames
        if skip == _frames_of(latents, self._vae.config):
            return
        leaving = OneBehind()
        for decoded in self._vae.decode_stream(torch.split(clip, 1, dim=2), tiling.past()):
            raise_if_cancelled()
            kept = decoded[:, :, min(skip, decoded.shape[2]) :]
            skip -= decoded.shape[2] - kept.shape[2]
            frames = to_uint8(kept, _ROUNDING[parameters.rounding])
            if color_reference is not None and len(frames):
                frames = match_colors(frames, color_reference, parameters.color_correction_strength)
            # as bytes NaN would look like any others, but no sum of it is finite
            yield from _checked_frames(leaving.add(frames, decoded.sum()))
        yield from _checked_frames(leaving.rest())

    async def _tiling(self, direction: Direction, height: int, width: int) -> Tiling:
        """As `_planned`, which counts for seconds where a size is new."""
        return await asyncio.to_thread(self._planned, direction, height, width)

    def _planned(self, direction: Direction, height: int, width: int) -> Tiling:
        """How frames of this size are computed within the budget.

        Raises:
            OutOfMemory: not at all.
        """
        if self._budget is None:
            return WHOLE
        clips = self._runtime.limits.max_concurrent
        try:
            return plan_tiles(self._machine, direction, height, width, self._budget, clips=clips)
        except DoesNotFit as error:
            raise OutOfMemory(str(error)) from error

    def _checked(self, item: Any) -> pb.EncodeParameters:
        if not isinstance(item, pb.EncodeRequest):
            raise InvalidRequest(("parameters", "must be the first message"))
        parameters, checks = item.parameters, Checks()
        side = self._vae.config.pixels_per_latent
        for field in ("height", "width"):
            value = getattr(parameters, field)
            if checks.between(field, value, _MIN_SIDE, _MAX_SIDE):
                checks.multiple(field, value, side)
        checks.between("num_frames", parameters.num_frames, 1, _MAX_FRAMES)
        checks.done()
        return parameters

    def _check_decode(self, parameters: pb.DecodeParameters, latents: WireTensor) -> None:
        checks, config = Checks(), self._vae.config
        checks.that(parameters.rounding in _ROUNDING, "rounding", f"is not known: {parameters.rounding}")
        checks.that(parameters.format in pb.FrameFormat.values(), "format", f"is not known: {parameters.format}")
        checks.between("color_correction_strength", parameters.color_correction_strength, 0, 1)
        most = (_MAX_SIDE // config.pixels_per_latent,) * 2
        most_latents = (_MAX_FRAMES - 1) // config.frames_per_latent + 1
        fits = all(1 <= n <= limit for n, limit in zip(latents.shape[2:], (most_latents, *most), strict=True))
        text = f"must have 1 to {most_latents} frames of 1x1 to {most[0]}x{most[1]}, got {list(latents.shape)}"
        if checks.that(fits, "latents", text):
            frames, skip = _frames_of(latents, config), parameters.skip_frames
            text = f"must be at most the {frames} frames of the latents, got {skip}"
            checks.that(skip <= frames, "skip_frames", text)
        checks.done()

    def _color_reference(
        self, parameters: pb.DecodeParameters, latents: WireTensor, tensors: dict[str, WireTensor]
    ) -> Tensor | None:
        if parameters.color_correction_strength == 0:
            return None
        side = self._vae.config.pixels_per_latent
        shape = (latents.shape[3] * side, latents.shape[4] * side, 3)
        return to_torch(require(tensors, "color_reference", shape, (UINT8,))).to(self._runtime.device)


def _checked_frames(groups: list[tuple[Tensor, ...]]) -> Iterator[WireTensor]:
    for frames, total in groups:
        require_finite("frames", total)
        if len(frames):
            yield from_torch("frames", frames)


class _ClipEncoder:
    """Encodes the frames of one clip as they come, in groups of 1, 4, 4, ...; holds at most one group of frames."""

    def __init__(self, vae: Vae, parameters: pb.EncodeParameters, device: str, past: Past) -> None:
        self._vae, self._parameters, self._device, self._past = vae, parameters, torch.device(device), past
        self._group: list[Tensor] = []
        self._leaving = OneBehind()
        self.received = 0

    def checked(self, item: Any) -> Tensor:
        """The frames of an item of the request, uint8 or float16 levels [n, H, W, 3]."""
        if not isinstance(item, WireTensor):
            raise InvalidRequest(("parameters", "came twice"))
        if item.name != "frames":
            raise InvalidRequest((item.name, "is not a tensor of this rpc (it takes frames)"))
        shape = (None, self._parameters.height, self._parameters.width, 3)
        frames = require({"frames": item}, "frames", shape, (UINT8, FLOAT16))
        self.received += frames.shape[0]
        if self.received > self._parameters.num_frames:
            raise InvalidRequest(("frames", f"must be {self._parameters.num_frames} in all, got more"))
        return to_torch(frames)

    def finish(self) -> None:
        """Says that no frame will come; frames short of a group are dropped, as the released code does."""
        if self.received != self._parameters.num_frames:
            raise InvalidRequest(("frames", f"must be {self._parameters.num_frames} in all, got {self.received}"))

    @torch.inference_mode()
    def add(self, frames: Tensor) -> list[Tensor]:
        """The latents [1, C, 1, h, w] on the CPU that are there by now."""
        latents: list[Tensor] = []
        for frame in frames:
            self._group.append(frame.clone())
            if len(self._group) == (1 if self._past.at_start else self._vae.config.frames_per_latent):
                raise_if_cancelled()
                levels = to_device(torch.stack(self._group), self._device)
                if levels.is_floating_point() and not bool(((levels >= 0) & (levels <= 255)).all()):
                    raise InvalidRequest(("frames", "must be levels 0 to 255"))
                group = from_uint8(levels)
                latents += _checked_latents(self._leaving.add(self._vae.encode_group(group, self._past)))
                self._group.clear()
        return latents

    def rest(self) -> list[Tensor]:
        """The latents that were not there yet."""
        return _checked_latents(self._leaving.rest())


def _checked_latents(groups: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [require_finite("latents", latents) for (latents,) in groups]


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """What a VAE computes in. float16 and not bfloat16: as fast, with a tenth of the error.

    Not on a CPU, whatever the precision: convolutions in float16 take a hundred times as long there.
    """
    return torch.float16 if device.type == "cuda" and precision != EXACT else torch.float32


def _budget(device: torch.device, vram_bytes: int | None) -> int | None:
    """Bytes that the process may use, which it then keeps to; None: nobody says, which is so on a CPU only."""
    if device.type != "cuda":
        return vram_bytes
    free, total = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    most = free + (outside_allocator(device) or 0)
    if vram_bytes is None and fraction == 1:
        use_growing_blocks()
        return most
    budget = min(vram_bytes or most, int(total * fraction))
    cap_memory(device, budget)
    return budget


def _frames_of(latents: WireTensor, config: VaeConfig) -> int:
    """Pixel frames that latents [1, C, T, h, w] stand for."""
    return config.frames_per_latent * (latents.shape[2] - 1) + 1
