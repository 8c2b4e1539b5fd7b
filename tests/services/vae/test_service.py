"""VaeService over real gRPC: streams in portions, colours, refusals, memory, stopping."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bunraku.errors import InvalidRequest, NotThereYet, OutOfMemory, StageBroken
from bunraku.v1 import stage_pb2
from bunraku.v1 import vae_pb2 as pb
from runtime.bundles import Bundle, BundleError
from runtime.client import Budget
from runtime.stage import Limits
from runtime.tensors import FLOAT32, UINT8, WireTensor
from runtime.torch_tensors import from_torch, to_torch
from runtime.weights import CheckpointMismatch
from services.vae import service
from services.vae.color import match_colors
from services.vae.model import Decoder, Encoder, Grid, Past, Vae, from_uint8, to_uint8
from services.vae.plan import Tiling
from services.vae.service import VaeService, dtype_of
from services.vae.tiles import Cut, cut_of
from tests.services.serving import Served, serving, until
from training.random_bundle import write_vae

# height and width differ, so that a mix-up cannot fit
HEIGHT, WIDTH = 32, 16
Stage = Served[VaeService]


def stage(
    bundle: Bundle, *, precision: str = "auto", vram_bytes: int | None = None, **options: Any
) -> AbstractAsyncContextManager[Stage]:
    return serving("vae", partial(VaeService, precision=precision, vram_bytes=vram_bytes), bundle, **options)


def clip(num_frames: int, seed: int = 0) -> Tensor:
    """Frames, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, HEIGHT, WIDTH, 3), generator=generator, dtype=torch.uint8)


def some_latents(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 16, frames, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def encode_first(num_frames: int, **changes: Any) -> pb.EncodeRequest:
    fields = {"height": HEIGHT, "width": WIDTH, "num_frames": num_frames} | changes
    return pb.EncodeRequest(parameters=pb.EncodeParameters(**fields))


def decode_first(**fields: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(parameters=pb.DecodeParameters(**fields))


def portions(frames: Tensor, sizes: Sequence[int]) -> list[WireTensor]:
    return [from_torch("frames", portion) for portion in frames.split(list(sizes))]  # type: ignore[no-untyped-call]


async def encode(of: Stage, frames: Tensor, sizes: Sequence[int] = ()) -> Tensor:
    first = encode_first(len(frames), height=frames.shape[1], width=frames.shape[2])
    answers = await of.ask("Encode", first, portions(frames, sizes or [len(frames)]))
    return to_torch(answers.one("latents"))


async def decode(of: Stage, latents: Tensor, *further: WireTensor, **fields: Any) -> Tensor:
    answers = await of.ask("Decode", decode_first(**fields), [from_torch("latents", latents), *further])
    assert all(tensor.dtype == UINT8 for tensor in answers.named("frames"))
    return torch.cat([to_torch(tensor) for tensor in answers.named("frames")])


@torch.inference_mode()
def encoded(vae: Vae, frames: Tensor) -> Tensor:
    """Without the service."""
    return vae.encode(from_uint8(frames))


@torch.inference_mode()
def decoded(vae: Vae, latents: Tensor) -> Tensor:
    """Without the service: float frames [1, 3, n, H, W]."""
    return vae.decode(latents.float())


async def test_frames_in_any_portions_give_the_latents_of_the_clip(bundle: Bundle) -> None:
    frames = clip(9)
    async with stage(bundle) as vae:
        expected = encoded(vae.service._vae, frames)
        for sizes in ([9], [1] * 9, [2, 1, 5, 1], [4, 4, 1], [0, 3, 0, 6, 0]):
            answers = await vae.ask("Encode", encode_first(9), portions(frames, sizes))
            latents = answers.one("latents")
            assert (latents.dtype, latents.shape) == (FLOAT32, (1, 16, 3, HEIGHT // 8, WIDTH // 8))
            assert torch.equal(to_torch(latents), expected)
            progress = answers.messages("progress")
            assert [p.completed_frames for p in progress] == torch.tensor(sizes).cumsum(0).tolist()
            assert {p.total_frames for p in progress} == {9}
            assert answers.items[-1] is latents


async def test_frames_beyond_the_last_whole_group_are_dropped(bundle: Bundle) -> None:
    frames = clip(9)
    async with stage(bundle) as vae:
        by_length = {length: await encode(vae, frames[:length]) for length in (1, 2, 5, 6, 8, 9)}
    assert [latents.shape[2] for latents in by_length.values()] == [1, 1, 2, 2, 2, 3]
    assert torch.equal(by_length[2], by_length[1])
    assert torch.equal(by_length[6], by_length[5])
    assert torch.equal(by_length[8], by_length[5])


async def test_levels_between_whole_ones_come_as_float16(bundle: Bundle) -> None:
    levels = (clip(5).half() - 0.25).clamp(0, 255)
    async with stage(bundle) as vae:
        expected = encoded(vae.service._vae, levels)
        assert torch.equal(await encode(vae, levels, [2, 3]), expected)
        assert not torch.equal(await encode(vae, clip(5)), expected)
        # the means of 2x2 pixels may happen to be whole: portions of both types are one clip
        mixed = [*portions(clip(5), [2, 3])[:1], from_torch("frames", clip(5)[2:].half())]
        answers = await vae.ask("Encode", encode_first(5), mixed)
        assert torch.equal(to_torch(answers.one("latents")), await encode(vae, clip(5)))


async def test_latents_become_the_frames_of_the_model(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        expected = decoded(vae.service._vae, some_latents(3))
        answers = await vae.ask("Decode", decode_first(), [from_torch("latents", some_latents(3))])
        frames = answers.named("frames")
        assert len(answers.items) == len(frames)
        assert [tensor.shape for tensor in frames] == [(n, HEIGHT, WIDTH, 3) for n in (1, 4, 4)]
        assert torch.equal(torch.cat([to_torch(tensor) for tensor in frames]), to_uint8(expected))
        for dtype in (torch.float16, torch.bfloat16):
            halved = some_latents(2).to(dtype)
            assert torch.equal(await decode(vae, halved), to_uint8(decoded(vae.service._vae, halved)))


async def test_rounding_is_to_nearest_unless_it_is_to_be_towards_zero(bundle: Bundle) -> None:
    latents = some_latents(2)
    async with stage(bundle) as vae:
        frames = decoded(vae.service._vae, latents)
        for rounding in (pb.PIXEL_ROUNDING_UNSPECIFIED, pb.PIXEL_ROUNDING_NEAREST):
            assert torch.equal(await decode(vae, latents, rounding=rounding), to_uint8(frames, "round"))
        truncated = await decode(vae, latents, rounding=pb.PIXEL_ROUNDING_TRUNCATE, format=pb.FRAME_FORMAT_RAW)
        assert torch.equal(truncated, to_uint8(frames, "truncate"))
        assert not torch.equal(truncated, to_uint8(frames, "round"))


async def test_frames_of_the_window_before_can_be_skipped(bundle: Bundle) -> None:
    latents = some_latents(3)
    async with stage(bundle) as vae:
        whole = await decode(vae, latents)
        for skip in (1, 2, 4, 5, 8):
            assert torch.equal(await decode(vae, latents, skip_frames=skip), whole[skip:])
        # who has all frames already, and asks again after the call broke, is given none
        decoder = Calls(vae.service._vae.decoder)
        answers = await vae.ask("Decode", decode_first(skip_frames=9), [from_torch("latents", latents)])
    assert answers.items == []
    assert decoder.count == 0


async def test_colours_move_towards_those_of_the_reference(bundle: Bundle) -> None:
    latents, reference = some_latents(2), clip(1, seed=5)[0] // 4
    sent = from_torch("color_reference", reference)
    async with stage(bundle) as vae:
        plain = await decode(vae, latents)
        for strength in (0.5, 1.0):
            corrected = await decode(vae, latents, sent, color_correction_strength=strength)
            assert torch.equal(corrected, match_colors(plain, reference, strength))
            assert not torch.equal(corrected, plain)
        assert torch.equal(await decode(vae, latents, sent), plain)


class Calls:
    """Counts the calls of a module, and what its outputs hold in memory at the same time."""

    def __init__(self, module: nn.Module, before: Callable[[int], object] = lambda count: None) -> None:
        self.count, self.most_frames, self.most_alive = 0, 0, 0
        self._before_call = before
        self._outputs: list[weakref.ref[Tensor]] = []
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, arguments: Any) -> None:
        self._before_call(self.count)
        self.count += 1
        self.most_frames = max(self.most_frames, arguments[0].shape[2])

    def _after(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self._outputs.append(weakref.ref(output))
        self.most_alive = max(self.most_alive, sum(alive() is not None for alive in self._outputs))


async def test_first_frames_arrive_before_the_last_are_decoded(bundle: Bundle) -> None:
    arrived = threading.Event()
    async with stage(bundle) as vae:
        # the stage is one portion ahead of what it has sent
        decoder = Calls(vae.service._vae.decoder, lambda count: count < 2 or arrived.wait(20))
        async with vae.client.call(Budget.of(60)) as call:
            answers = call.stream(call.stub.Decode, decode_first(), [from_torch("latents", some_latents(4))])
            first = await anext(answers)
            assert decoder.count <= 2
            arrived.set()
            rest = [item async for item in answers]
    assert isinstance(first, WireTensor)
    assert first.shape == (1, HEIGHT, WIDTH, 3)
    assert len(rest) == 3


async def test_latents_of_the_first_frames_are_made_before_the_last_frames_come(bundle: Bundle) -> None:
    frames = clip(9)
    async with stage(bundle) as vae:
        encoder = Calls(vae.service._vae.encoder)

        async def as_they_are_encoded() -> AsyncIterator[WireTensor]:
            for number, portion in enumerate(portions(frames, [1, 4, 4])):
                await until(lambda: encoder.count == number)  # noqa: B023 (is waited for at once)
                yield portion

        answers = await vae.ask("Encode", encode_first(9), as_they_are_encoded())
        assert torch.equal(to_torch(answers.one("latents")), encoded(vae.service._vae, frames))


async def test_streams_at_the_same_time_do_not_mix(bundle: Bundle) -> None:
    clips, latents = [clip(9, seed) for seed in (1, 2)], [some_latents(3, seed) for seed in (1, 2)]
    async with stage(bundle, limits=Limits(max_concurrent=4)) as vae:
        one_by_one = [await encode(vae, frames) for frames in clips], [await decode(vae, each) for each in latents]
        turns = asyncio.Barrier(2)

        async def in_turns(frames: Tensor) -> AsyncIterator[WireTensor]:
            for portion in portions(frames, [3, 3, 3]):
                await turns.wait()
                yield portion

        async def encode_in_turns(frames: Tensor) -> Tensor:
            return to_torch((await vae.ask("Encode", encode_first(9), in_turns(frames))).one("latents"))

        all_at_once = threading.Event()
        decoder = Calls(vae.service._vae.decoder, lambda count: all_at_once.wait(20))
        decoding = [asyncio.create_task(decode(vae, each)) for each in latents]
        encoding = [asyncio.create_task(encode_in_turns(frames)) for frames in clips]
        await until(lambda: len(vae.runtime.status().work) == 4)
        all_at_once.set()
        together = await asyncio.gather(*encoding), await asyncio.gather(*decoding)
        assert decoder.count == 6
    for alone, beside in zip(one_by_one, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


async def test_a_longer_clip_takes_no_more_frames_in_memory_at_once(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[weakref.ref[Tensor]] = []
    most_received = 0

    def watched(tensor: WireTensor) -> Tensor:
        nonlocal most_received
        frames = to_torch(tensor)
        received.append(weakref.ref(frames))
        most_received = max(most_received, sum(alive() is not None for alive in received))
        return frames

    monkeypatch.setattr("services.vae.service.to_torch", watched)
    for latent_frames in (4, 16):
        async with stage(bundle) as vae:
            encoder, decoder = Calls(vae.service._vae.encoder), Calls(vae.service._vae.decoder)
            frames = clip(4 * latent_frames - 3)
            latents = await encode(vae, frames, [3] * (len(frames) // 3) + [len(frames) % 3])
            # the portion that is encoded, and for an instant the one before
            assert most_received <= 2
            await decode(vae, latents)
            assert encoder.count == decoder.count == latent_frames
            assert (encoder.most_frames, decoder.most_frames) == (4, 1)
            assert max(encoder.most_alive, decoder.most_alive) <= 2


WRONG_ENCODES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"height": 33}, [("height", "must be a multiple of 8, got 33")]),
    ({"height": 8}, [("height", "must be 16 to 4096, got 8")]),
    ({"width": 4104}, [("width", "must be 16 to 4096, got 4104")]),
    ({"num_frames": 0}, [("num_frames", "must be 1 to 10000, got 0")]),
    ({"num_frames": 10_001}, [("num_frames", "must be 1 to 10000, got 10001")]),
    (
        {"height": 0, "width": 17, "num_frames": 2**32 - 1},
        [
            ("height", "must be 16 to 4096, got 0"),
            ("width", "must be a multiple of 8, got 17"),
            ("num_frames", "must be 1 to 10000, got 4.29497e+09"),
        ],
    ),
]


async def test_wrong_fields_of_an_encode_are_named(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        for changes, violations in WRONG_ENCODES:
            request = encode_first(**({"num_frames": 5} | changes))
            assert await vae.refused("Encode", request, portions(clip(5), [5])) == tuple(violations)
        assert await vae.refused("Encode", pb.EncodeRequest(), []) == (("", "a message of the stream is empty"),)
        tensor_first = pb.EncodeRequest()
        tensor_first.tensor.name, tensor_first.tensor.dtype = "frames", UINT8
        tensor_first.tensor.shape.append(0)
        assert await vae.refused("Encode", tensor_first) == (("parameters", "must be the first message"),)


async def test_frames_that_are_not_those_announced_are_refused(bundle: Bundle) -> None:
    frames = clip(5)
    shape = f"[any, {HEIGHT}, {WIDTH}, 3]"
    cases: list[tuple[Iterable[WireTensor], tuple[str, str]]] = [
        ([], ("frames", "must be 5 in all, got 0")),
        (portions(frames, [2, 3])[:1], ("frames", "must be 5 in all, got 2")),
        (portions(clip(6), [5, 1]), ("frames", "must be 5 in all, got more")),
        ([from_torch("pictures", frames)], ("pictures", "is not a tensor of this rpc (it takes frames)")),
        ([from_torch("frames", frames.float())], ("frames", "must be uint8 or float16, got float32")),
        (
            [from_torch("frames", frames.transpose(1, 2))],
            ("frames", f"must have the shape {shape}, got [5, {WIDTH}, {HEIGHT}, 3]"),
        ),
        (
            [from_torch("frames", frames[..., :1])],
            ("frames", f"must have the shape {shape}, got [5, {HEIGHT}, {WIDTH}, 1]"),
        ),
        ([from_torch("frames", frames[0])], ("frames", f"must have the shape {shape}, got [{HEIGHT}, {WIDTH}, 3]")),
    ]
    cases += [
        ([from_torch("frames", (frames.half() / 2).index_fill(0, torch.tensor(4), level))], ("frames", text))
        for level in (float("nan"), -0.25, 256.0)
        for text in ["must be levels 0 to 255"]
    ]
    async with stage(bundle) as vae:
        for tensors, violation in cases:
            assert await vae.refused("Encode", encode_first(5), tensors) == (violation,)
        assert (await encode(vae, frames)).shape[2] == 2


async def test_parameters_in_the_middle_of_frames_are_refused(bundle: Bundle) -> None:
    async def requests() -> AsyncIterator[pb.EncodeRequest]:
        yield encode_first(1)
        yield encode_first(1)

    async with stage(bundle) as vae:
        with pytest.raises(InvalidRequest, match="parameters: came twice"):
            async with vae.client.call(Budget.of(20)) as call:
                await anext(aiter(call.stub.Encode(requests())))


WRONG_DECODES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"skip_frames": 10}, [("skip_frames", "must be at most the 9 frames of the latents, got 10")]),
    ({"rounding": 9}, [("rounding", "is not known: 9")]),
    ({"format": 9}, [("format", "is not known: 9")]),
    (
        {"color_correction_strength": float("nan")},
        [("color_correction_strength", "must be 0 to 1, got nan")],
    ),
    ({"color_correction_strength": 1.5}, [("color_correction_strength", "must be 0 to 1, got 1.5")]),
    ({"color_correction_strength": 1.0}, [("color_reference", "is missing")]),
    (
        {"rounding": -1, "color_correction_strength": -1.0, "skip_frames": 2**32 - 1},
        [
            ("rounding", "is not known: -1"),
            ("color_correction_strength", "must be 0 to 1, got -1"),
            ("skip_frames", "must be at most the 9 frames of the latents, got 4294967295"),
        ],
    ),
]


async def test_wrong_fields_of_a_decode_are_named(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        for fields, violations in WRONG_DECODES:
            latents = from_torch("latents", some_latents(3))
            assert await vae.refused("Decode", decode_first(**fields), [latents]) == tuple(violations)


LIMITS = "must have 1 to 2500 frames of 1x1 to 512x512, got "
WRONG_LATENTS: list[tuple[Tensor, str]] = [
    (torch.zeros(1, 15, 3, 4, 2), "must have the shape [1, 16, any, any, any], got [1, 15, 3, 4, 2]"),
    (torch.zeros(2, 16, 3, 4, 2), "must have the shape [1, 16, any, any, any], got [2, 16, 3, 4, 2]"),
    (torch.zeros(16, 3, 4, 2), "must have the shape [1, 16, any, any, any], got [16, 3, 4, 2]"),
    (torch.zeros(1, 16, 3, 4, 2, dtype=torch.int8), "must be float32 or bfloat16 or float16, got int8"),
    (torch.zeros(1, 16, 0, 4, 2), f"{LIMITS}[1, 16, 0, 4, 2]"),
    (torch.zeros(1, 16, 1, 4, 0), f"{LIMITS}[1, 16, 1, 4, 0]"),
    (torch.zeros(1, 16, 2501, 1, 1), f"{LIMITS}[1, 16, 2501, 1, 1]"),
    (torch.zeros(1, 16, 1, 513, 1), f"{LIMITS}[1, 16, 1, 513, 1]"),
    (torch.zeros(1, 16, 1, 1, 513), f"{LIMITS}[1, 16, 1, 1, 513]"),
    (torch.full((1, 16, 1, 4, 2), torch.nan), "must be finite"),
    (torch.full((1, 16, 1, 4, 2), torch.inf, dtype=torch.float16), "must be finite"),
]


async def test_latents_that_are_none_are_refused(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        assert await vae.refused("Decode", decode_first()) == (("latents", "is missing"),)
        for latents, text in WRONG_LATENTS:
            violations = await vae.refused("Decode", decode_first(), [from_torch("latents", latents)])
            assert violations == (("latents", text),)
        [(field, _)] = await vae.refused("Decode", decode_first(), [from_torch("mask", torch.zeros(1))])
        assert field == "mask"


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
async def test_frames_that_are_none_do_not_leave_as_bytes(
    bundle: Bundle, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(bundle) as vae:
        model, groups = vae.service._vae, iter([0.0, 0.0, number])
        decode_group = model.decode_group

        def spoilt(latents: Tensor, past: Past) -> Tensor:
            frames = decode_group(latents, past)
            frames[0, 0, -1, -1, -1] += next(groups)
            return frames

        monkeypatch.setattr(model, "decode_group", spoilt)
        with pytest.raises(StageBroken, match="frames are not finite"):
            await decode(vae, some_latents(3))


async def test_a_color_reference_of_another_size_is_refused(bundle: Bundle) -> None:
    wanted = f"[{HEIGHT}, {WIDTH}, 3]"
    async with stage(bundle) as vae:
        for reference, text in (
            (torch.zeros(16, 32, 3, dtype=torch.uint8), f"must have the shape {wanted}, got [16, 32, 3]"),
            (torch.zeros(HEIGHT, WIDTH, 3), "must be uint8, got float32"),
        ):
            tensors = [from_torch("latents", some_latents(1)), from_torch("color_reference", reference)]
            request = decode_first(color_correction_strength=0.5)
            assert await vae.refused("Decode", request, tensors) == (("color_reference", text),)


async def test_video_segments_are_not_there_yet(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        with pytest.raises(NotThereYet, match="format FRAME_FORMAT_H264 is not there yet: frames are given raw"):
            await decode(vae, some_latents(1), format=pb.FRAME_FORMAT_H264)


async def test_a_client_that_stops_reading_and_leaves_frees_the_stage(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0

    def quickly(latents: Tensor, past: object) -> Tensor:
        nonlocal made
        made += 1
        return torch.zeros(1, 3, 4, 256, 256)

    async with stage(bundle) as vae:
        with monkeypatch.context() as patched:
            patched.setattr(vae.service._vae, "decode_group", quickly)
            async with vae.client.call(Budget.of(20)) as call:
                latents = from_torch("latents", torch.zeros(1, 16, 500, 1, 1))
                answers = call.stream(call.stub.Decode, decode_first(), [latents])
                await anext(answers)
                before = -1
                while made != before:
                    before = made
                    await asyncio.sleep(0.1)
                # what lies in the buffers of the connection; the rest waits
                assert made < 100
                assert len(vae.runtime.status().work) == 1
                await answers.aclose()  # type: ignore[attr-defined]
            await until(lambda: not vae.runtime.status().work)
            assert made <= before + 2
        assert (await decode(vae, some_latents(1))).shape == (1, HEIGHT, WIDTH, 3)


async def test_a_client_that_leaves_between_frames_frees_the_stage(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        encoder = Calls(vae.service._vae.encoder)

        async def never_ending() -> AsyncIterator[WireTensor]:
            yield from_torch("frames", clip(5))
            await asyncio.Event().wait()

        call = asyncio.create_task(vae.ask("Encode", encode_first(9), never_ending()))
        await until(lambda: encoder.count == 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: not vae.runtime.status().work)
        assert (await encode(vae, clip(1))).shape[2] == 1


async def test_a_vae_of_2_2_folds_squares_of_sixteen_pixels(bundle: Bundle, tmp_path: Path) -> None:
    component = replace(
        bundle.component("vae"),
        files=(tmp_path / "vae22.pth",),
        config={"dim": 4, "patch_size": 2, "residual_stages": True},
    )
    folded = replace(bundle, components={"vae": component})
    write_vae(folded)
    async with stage(folded) as vae:
        latents = await encode(vae, clip(5), [2, 3])
        assert latents.shape == (1, 16, 2, HEIGHT // 16, WIDTH // 16)
        assert torch.equal(latents, encoded(vae.service._vae, clip(5)))
        frames = await decode(vae, latents)
        assert torch.equal(frames, to_uint8(decoded(vae.service._vae, latents)))
        assert frames.shape == (5, HEIGHT, WIDTH, 3)
        [violation] = await vae.refused("Encode", encode_first(1, height=24))
        assert violation == ("height", "must be a multiple of 16, got 24")


async def test_shared_memory_changes_no_bit_and_leaves_nothing_behind(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.shared_memory.MIN_BYTES", 1)
    async with stage(bundle) as plain:
        latents = await encode(plain, clip(9), [2, 4, 3])
        frames = await decode(plain, latents)
    async with stage(bundle, shared_memory=tmp_path) as sharing:
        assert torch.equal(await encode(sharing, clip(9), [2, 4, 3]), latents)
        assert torch.equal(await decode(sharing, latents), frames)
        memory = sharing.runtime.shared_memory
        assert memory is not None
        assert memory.own_bytes > 0
        # a caller that leaves in the middle leaves nothing either
        call = asyncio.create_task(decode(sharing, some_latents(8)))
        await until(lambda: sharing.runtime.status().work)
        call.cancel()
        await asyncio.wait([call])
    assert os.listdir(tmp_path) == []


async def test_tiles_of_the_plan_are_computed_and_change_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = clip(9).repeat(1, 2, 4, 1)  # 64x64
    async with stage(bundle) as plenty:
        latents = await encode(plenty, frames)
        whole = await decode(plenty, latents)
    asked: list[Any] = []
    cut: list[str] = []

    def planned(*arguments: Any, clips: int) -> Tiling:
        asked.append((*arguments[1:], clips))
        return Tiling(Grid(2, 2), is_hosted=True, device_bytes=0, host_bytes=0)

    def noted(half: Encoder | Decoder) -> Cut:
        cut.append(type(half).__name__)
        return cut_of(half)

    monkeypatch.setattr("services.vae.service.plan_tiles", planned)
    monkeypatch.setattr("services.vae.channels_last.cut_of", noted)
    async with stage(bundle, limits=Limits(max_concurrent=3), vram_bytes=2**30) as short:
        torch.testing.assert_close(await encode(short, frames), latents, atol=1e-5, rtol=1e-5)
        assert ((await decode(short, latents)).int() - whole.int()).abs().max() <= 1
    assert asked == [("encode", 64, 64, 2**30, 3), ("decode", 64, 64, 2**30, 3)]
    assert cut == ["Encoder"] * 3 + ["Decoder"] * 3


async def test_what_exceeds_the_budget_is_refused_with_the_numbers(bundle: Bundle) -> None:
    async with stage(bundle, vram_bytes=2**20) as vae:
        text = r"16x32 takes 0\.\d\d GiB with whole frames.*; the budget is 0\.00 GiB"
        with pytest.raises(OutOfMemory, match=f"to encode {text}"):
            await encode(vae, clip(1))
        with pytest.raises(OutOfMemory, match=f"to decode {text}"):
            await decode(vae, some_latents(1))
        assert not vae.runtime.status().work


class Holding:
    """Holds results as on a GPU."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, ...]] = []

    def add(self, *results: Tensor) -> list[tuple[Tensor, ...]]:
        before, self._held = self._held, [results]
        return before

    def rest(self) -> list[tuple[Tensor, ...]]:
        before, self._held = self._held, []
        return before


@pytest.mark.parametrize("skip", [0, 3])
async def test_results_that_come_one_behind_are_all_there(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, skip: int
) -> None:
    async with stage(bundle) as vae:
        latents, frames = await encode(vae, clip(9)), await decode(vae, some_latents(3), skip_frames=skip)
        monkeypatch.setattr(service, "OneBehind", Holding)
        assert torch.equal(await encode(vae, clip(9)), latents)
        assert torch.equal(await decode(vae, some_latents(3), skip_frames=skip), frames)


def test_budget_of_a_gpu_is_what_is_said_or_what_it_has_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capped = torch.device("cuda", 0), list[int]()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    monkeypatch.setattr(service, "outside_allocator", lambda device: 5)
    monkeypatch.setattr(service, "cap_memory", lambda device, budget: capped.append(budget))
    monkeypatch.setattr(service, "use_growing_blocks", lambda: capped.append(-1))
    for fraction, vram_bytes, expected, cap in (
        (1.0, None, 65, -1),  # nothing to keep to, but gaps would be lost here too
        (0.5, None, 50, 50),
        (0.9, None, 65, 65),
        (1.0, 40, 40, 40),
        (0.3, 40, 30, 30),
    ):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, value=fraction: value)
        assert service._budget(gpu, vram_bytes) == expected
        assert capped.pop() == cap
    assert service._budget(torch.device("cpu"), None) is None
    assert service._budget(torch.device("cpu"), 40) == 40
    assert capped == []


async def test_float16_is_near_float32(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage(bundle) as vae:
        expected = await encode(vae, clip(5))
    monkeypatch.setattr(service, "dtype_of", lambda precision, device: torch.float16)
    async with stage(bundle) as vae:
        found = await encode(vae, clip(5))
        [component] = (await vae.status()).components
    assert component.dtype == "float16"
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_precision_follows_the_device() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    presets = ("auto", "exact", "balanced", "fast")
    names = [(name, device.type, dtype_of(name, device)) for name in presets for device in (cpu, gpu)]
    assert [name[:2] for name in names if name[2] == torch.float16] == [
        ("auto", "cuda"),
        ("balanced", "cuda"),
        ("fast", "cuda"),
    ]


async def test_status_tells_of_the_model(bundle: Bundle) -> None:
    async with stage(bundle) as vae:
        status = await vae.status()
    assert (status.stage, status.state) == ("vae", stage_pb2.STAGE_STATE_SERVING)
    [component] = status.components
    weights = vae.service._vae.state_dict().values()
    # float32 although the file is float16
    assert (component.name, component.dtype) == ("vae", "float32")
    assert component.parameters == sum(weight.numel() for weight in weights) > 100_000
    assert component.size_bytes == 4 * component.parameters


async def test_a_file_that_is_not_there_or_does_not_fit_is_named(bundle: Bundle, tmp_path: Path) -> None:
    async def loading_fails(file: Path, error: type[Exception], text: str) -> None:
        component = replace(bundle.component("vae"), files=(file,))
        async with stage(replace(bundle, components={"vae": component}), load=False) as vae:
            with pytest.raises(error, match=text):
                await vae.server.load()
            status = await vae.status()
            assert (status.state, list(status.components)) == (stage_pb2.STAGE_STATE_LOADING, [])

    await loading_fails(tmp_path / "absent.pth", BundleError, r"vae: not there: .*/absent\.pth")
    tensors = torch.load(bundle.component("vae").files[0], weights_only=True)
    del tensors["conv1.bias"]
    torch.save(tensors | {"decoder.surplus": torch.zeros(1)}, tmp_path / "wrong.pth")
    text = r"wrong.pth does not fit Vae: 1 missing \(conv1.bias\); 1 unknown \(decoder.surplus\)"
    await loading_fails(tmp_path / "wrong.pth", CheckpointMismatch, text)
