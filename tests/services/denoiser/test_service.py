"""DenoiserService over real gRPC: plan, steps, latents, previews, checkpoints, refusals, stopping."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bunraku.errors import DeadlineExceeded, InvalidRequest, NotReady, StageBroken, WrongState
from bunraku.v1 import denoiser_pb2 as pb
from bunraku.v1 import stage_pb2
from runtime.budget import DoesNotFit
from runtime.bundles import Bundle, BundleError, configuration
from runtime.gpu import WorkCancelled, raise_if_cancelled
from runtime.tensors import FLOAT32, UINT8, WireTensor
from runtime.torch_tensors import from_torch, to_torch
from services.denoiser import __main__ as program
from services.denoiser.conditioning import animation, seeded_noise
from services.denoiser.denoise import Expert, Prompt, denoise, preview_rgb
from services.denoiser.model import PRESETS, TransformerConfig
from services.denoiser.placement import weights_of
from services.denoiser.plan import DEVICE_OVERHEAD_BYTES, animation_tokens, plan_memory
from services.denoiser.sampling import SOLVERS, make_solver
from services.denoiser.service import DenoiserService, Plan
from services.denoiser.weights import load_transformer
from tests.services.serving import Answers, Served, serving, until, write_bundle

# h and w differ, so that a mix-up cannot fit
HEIGHT, WIDTH, FRAMES = 64, 32, 9
SHAPE = (1, 16, 3, 8, 4)
LAYERS = 2
BLOCKS_PER_STEP = 2 * LAYERS  # with guidance
SOLVER_NUMBERS = {"unipc": pb.SOLVER_UNIPC, "dpm++": pb.SOLVER_DPMPP, "euler": pb.SOLVER_EULER}
Stage = Served[DenoiserService]


def stage(bundle: Bundle, **options: Any) -> AbstractAsyncContextManager[Stage]:
    return serving("denoiser", DenoiserService, bundle, **options)


def first(**changes: Any) -> pb.DenoiseRequest:
    fields: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "seed": 7}
    return pb.DenoiseRequest(parameters=pb.DenoiseParameters(**(fields | changes)))


def normal(*shape: int, seed: int) -> Tensor:
    return seeded_noise(shape, seed)


CONDITIONING: dict[str, Tensor] = {
    "prompt_embeds": normal(1, 12, 24, seed=1),
    "negative_prompt_embeds": normal(1, 12, 24, seed=2),
    "image_embeds": normal(1, 5, 16, seed=3),
    "reference_latents": normal(1, 16, 1, 8, 4, seed=4),
    "pose_latents": normal(1, 16, 3, 4, 2, seed=5),
}
HISTORY = {"history_latents": normal(1, 16, 2, 8, 4, seed=6)}


def wired(tensors: dict[str, Tensor]) -> list[WireTensor]:
    return [from_torch(name, tensor) for name, tensor in tensors.items()]


def without(name: str) -> list[WireTensor]:
    return [tensor for tensor in wired(CONDITIONING) if tensor.name != name]


async def run(of: Stage, tensors: list[WireTensor] | None = None, **changes: Any) -> Answers:
    return await of.ask("Denoise", first(**changes), wired(CONDITIONING) if tensors is None else tensors)


def latents(answers: Answers) -> Tensor:
    return to_torch(answers.one("latents"))


@dataclass(frozen=True)
class Stored:
    """A checkpoint as a client keeps it."""

    message: pb.Checkpoint
    tensors: list[WireTensor]


def checkpoints(answers: Answers) -> list[Stored]:
    """Each with the tensors that follow it."""
    found: list[Stored] = []
    for item in answers.items:
        if isinstance(item, WireTensor):
            if item.name.startswith("checkpoint."):
                found[-1].tensors.append(item)
        elif item.WhichOneof("message") == "checkpoint":
            found.append(Stored(item.checkpoint, []))
    for stored in found:
        assert [f"checkpoint.{name}" for name in stored.message.tensors] == [t.name for t in stored.tensors]
    return found


async def resume(of: Stage, stored: Stored, tensors: list[WireTensor] | None = None, **changes: Any) -> Answers:
    conditioning = wired(CONDITIONING) if tensors is None else tensors
    return await run(of, [*conditioning, *stored.tensors], start_from=stored.message, **changes)


def direct(
    bundle: Bundle,
    solver_name: str,
    num_inference_steps: int,
    guidance_scale: float,
    shift: float,
    *,
    pose_time_origin: int = 1,
    history: Tensor | None = None,
    frames_given: int = 0,
) -> Tensor:
    """The latents without the service."""
    component = bundle.component("transformer")
    config = configuration(component, PRESETS, TransformerConfig)
    model = load_transformer(component.files, config, device=torch.device("cpu"), compute_dtype=torch.float32)
    inputs = animation(
        CONDITIONING["reference_latents"],
        CONDITIONING["pose_latents"],
        config.head_dim,
        pose_time_origin=pose_time_origin,
        history_latents=history,
        frames_given=frames_given,
    )
    prompt = Prompt(*(CONDITIONING[name] for name in ("prompt_embeds", "negative_prompt_embeds", "image_embeds")))
    solver = make_solver(solver_name, num_inference_steps, shift)
    start = solver.start(seeded_noise((1, 16, 4, 8, 4), 7))
    *_, last = denoise([Expert(model, guidance_scale)], solver, start, inputs, prompt)
    return inputs.result(last.latents)


class Blocks:
    """Counts the blocks of the stage's model that ran, and holds the model while so many have run.

    A block that is held goes on when its run is cancelled: the device had already begun with it.
    """

    def __init__(self, service: DenoiserService, hold_at: int = -1) -> None:
        self.ran = 0
        self.hold_at = hold_at
        self.held = threading.Event()
        for block in service._model.blocks:
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after)

    def _before(self, module: nn.Module, arguments: Any) -> None:
        while self.ran == self.hold_at:
            self.held.set()
            try:
                raise_if_cancelled()
            except WorkCancelled:
                return
            time.sleep(0.001)

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.ran += 1


async def test_a_run_tells_its_plan_its_steps_and_gives_latents(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        answers = await run(
            denoiser, num_inference_steps=3, guidance_scale=1.5, shift=5.0, solver=pb.SOLVER_UNIPC, history_frames=0
        )
    kinds = ["tensor" if isinstance(item, WireTensor) else item.WhichOneof("message") for item in answers.items]
    assert kinds == ["plan", "step", "step", "step", "tensor"]
    [plan] = answers.messages("plan")
    assert (plan.num_inference_steps, plan.completed_steps, plan.solver) == (3, 0, pb.SOLVER_UNIPC)
    assert (plan.guidance_scale, plan.shift) == (1.5, 5.0)
    steps = answers.messages("step")
    assert [step.completed_steps for step in steps] == [1, 2, 3]
    assert [step.sigma for step in steps] == make_solver("unipc", 3, 5.0).sigmas[1:].tolist()
    assert 1 > steps[0].sigma > steps[1].sigma > steps[2].sigma == 0
    assert all(0 < step.seconds < 60 for step in steps)
    result = answers.one("latents")
    assert (result.dtype, result.shape) == (FLOAT32, SHAPE)
    assert bool(torch.isfinite(to_torch(result)).all())


async def test_what_is_not_set_comes_from_the_bundle(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        implied = await run(denoiser, checkpoint_every_steps=3)
        [plan] = implied.messages("plan")
        assert (plan.num_inference_steps, plan.guidance_scale, plan.shift) == (4, 2.0, 3.0)
        assert plan.solver == pb.SOLVER_DPMPP
        said: dict[str, Any] = {
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "shift": 3.0,
            "solver": pb.SOLVER_DPMPP,
        }
        assert torch.equal(latents(await run(denoiser, **said)), latents(implied))
        # it is the same run, so its checkpoint will do
        [stored] = checkpoints(implied)
        resumed = await resume(denoiser, stored, **said, pose_time_origin=1)
    assert torch.equal(latents(resumed), latents(implied))


async def test_same_seed_gives_same_bits_and_another_seed_does_not(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        once, again, other = [latents(await run(denoiser, seed=seed)) for seed in (2**63 - 1, 2**63 - 1, 0)]
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)


@pytest.mark.parametrize("solver", SOLVERS)
async def test_the_service_gives_what_denoise_gives(bundle: Bundle, solver: str) -> None:
    async with stage(bundle) as denoiser:
        answers = await run(denoiser, solver=SOLVER_NUMBERS[solver], num_inference_steps=4)
        origin = await run(denoiser, solver=SOLVER_NUMBERS[solver], num_inference_steps=2, pose_time_origin=0)
    assert torch.equal(latents(answers), direct(bundle, solver, 4, 2.0, 3.0))
    assert torch.equal(latents(origin), direct(bundle, solver, 2, 2.0, 3.0, pose_time_origin=0))


async def test_a_later_window_keeps_the_frames_that_it_is_given(bundle: Bundle) -> None:
    tensors = wired(CONDITIONING | HISTORY)
    async with stage(bundle) as denoiser:
        windowed = latents(await run(denoiser, tensors, history_frames=5))
        fresh = latents(await run(denoiser))
    known = HISTORY["history_latents"]
    assert torch.equal(windowed[:, :, :2], known)
    assert not torch.allclose(windowed[:, :, 2:], fresh[:, :, 2:])
    assert torch.equal(windowed, direct(bundle, "dpm++", 4, 2.0, 3.0, history=known, frames_given=5))


async def test_without_guidance_no_negative_prompt_is_needed_or_used(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        blocks = Blocks(denoiser.service)
        plain = await run(
            denoiser,
            without("negative_prompt_embeds"),
            guidance_scale=1,
            num_inference_steps=2,
            checkpoint_every_steps=1,
        )
        assert blocks.ran == LAYERS * 2
        [stored] = checkpoints(plain)
        # a negative prompt that is not used does not make it another run
        with_negative = await resume(denoiser, stored, guidance_scale=1, num_inference_steps=2)
        await run(denoiser, num_inference_steps=2)
        assert blocks.ran == LAYERS * (2 + 1 + 2 * 2)
    assert torch.equal(latents(with_negative), latents(plain))
    assert torch.equal(latents(plain), direct(bundle, "dpm++", 2, 1.0, 3.0))


async def test_any_other_guidance_needs_a_negative_prompt(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        for guidance_scale in (0, 0.5, 1.5):
            request = first(guidance_scale=guidance_scale)
            violations = await denoiser.refused("Denoise", request, without("negative_prompt_embeds"))
            assert violations == (("negative_prompt_embeds", "is missing"),)


async def test_the_smallest_video_can_be_made(bundle: Bundle) -> None:
    tensors = {
        **CONDITIONING,
        "reference_latents": normal(1, 16, 1, 4, 4, seed=1),
        "pose_latents": normal(1, 16, 1, 2, 2, seed=1),
        "prompt_embeds": normal(1, 1, 24, seed=1),
        "image_embeds": normal(1, 1, 16, seed=1),
    }
    async with stage(bundle) as denoiser:
        answers = await run(denoiser, wired(tensors), height=32, width=32, num_frames=1, num_inference_steps=1)
    assert answers.one("latents").shape == (1, 16, 1, 4, 4)


async def test_conditioning_may_come_in_half_precision(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        for dtype in (torch.float16, torch.bfloat16):
            halves = {name: tensor.to(dtype) for name, tensor in CONDITIONING.items()}
            widened = {name: tensor.float() for name, tensor in halves.items()}
            got = latents(await run(denoiser, wired(halves), num_inference_steps=2))
            assert torch.equal(got, latents(await run(denoiser, wired(widened), num_inference_steps=2)))
            assert not torch.equal(got, latents(await run(denoiser, num_inference_steps=2)))


async def test_previews_come_when_they_are_asked_for(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        answers = await run(denoiser, preview_every_steps=2)
        plain = await run(denoiser)
    kinds = [item.name if isinstance(item, WireTensor) else item.WhichOneof("message") for item in answers.items]
    assert kinds == ["plan", "step", "step", "preview", "step", "step", "preview", "latents"]
    previews = answers.named("preview")
    assert [(preview.dtype, preview.shape) for preview in previews] == [(UINT8, (3, 8, 4, 3))] * 2
    assert torch.equal(to_torch(previews[-1]), preview_rgb(latents(answers)))
    assert torch.equal(latents(answers), latents(plain))
    assert plain.named("preview") == []


@pytest.mark.parametrize("solver", SOLVERS)
async def test_a_run_from_any_checkpoint_gives_the_same_bits(bundle: Bundle, solver: str) -> None:
    sampling = {"solver": SOLVER_NUMBERS[solver], "num_inference_steps": 5, "history_frames": 5}
    tensors = wired(CONDITIONING | HISTORY)
    async with stage(bundle) as one:
        whole = await run(one, tensors, **sampling, checkpoint_every_steps=1)
        plain = await run(one, tensors, **sampling)
    assert torch.equal(latents(plain), latents(whole))
    assert checkpoints(plain) == []
    assert [stored.message.completed_steps for stored in checkpoints(whole)] == [1, 2, 3, 4]
    async with stage(bundle) as another:
        for stored in checkpoints(whole):
            done = stored.message.completed_steps
            resumed = await resume(another, stored, tensors, **sampling, checkpoint_every_steps=2)
            assert resumed.messages("plan")[0].completed_steps == done
            assert [step.completed_steps for step in resumed.messages("step")] == list(range(done + 1, 6))
            assert torch.equal(latents(resumed), latents(whole))
            # and so does one from a checkpoint of the run that was taken up
            for later in checkpoints(resumed):
                assert torch.equal(latents(await resume(another, later, tensors, **sampling)), latents(whole))


CACHED: dict[str, Any] = {
    "num_inference_steps": 8,
    "step_cache": pb.STEP_CACHE_MAG,
    "step_cache_speedup": 2,
    "guidance_start": 0.25,
    "cfg_zero_star": True,
}


async def test_a_run_with_a_step_cache_says_what_it_computes_and_computes_no_more(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        blocks = Blocks(denoiser.service)
        full = await run(denoiser, num_inference_steps=8)
        assert blocks.ran == LAYERS * 16
        cached = await run(denoiser, **CACHED)
    [of_full], [of_cached] = ([plan.forward_passes for plan in answers.messages("plan")] for answers in (full, cached))
    assert (of_full.computed, of_full.reused, of_full.omitted) == (16, 0, 0)
    assert blocks.ran == LAYERS * (16 + of_cached.computed)
    assert (of_cached.computed + of_cached.reused, of_cached.omitted) == (14, 2)
    assert of_cached.reused >= 4
    assert not torch.equal(latents(cached), latents(full))


async def test_a_run_with_a_step_cache_gives_the_same_bits_from_any_checkpoint(bundle: Bundle) -> None:
    async with stage(bundle) as one:
        whole = await run(one, **CACHED, checkpoint_every_steps=1)
    stored = checkpoints(whole)
    holding = ["reused_latents" in each.message.tensors for each in stored]
    assert True in holding
    assert False in holding
    async with stage(bundle) as another:
        for each in stored:
            resumed = await resume(another, each, **CACHED)
            assert torch.equal(latents(resumed), latents(whole))
            assert resumed.messages("plan")[0].forward_passes == whole.messages("plan")[0].forward_passes
        # what the next step needs is asked for by name
        reusing = stored[holding.index(True)]
        reusing.message.tensors.remove("reused_latents")
        kept = [tensor for tensor in reusing.tensors if tensor.name != "checkpoint.reused_latents"]
        request = first(**CACHED, start_from=reusing.message)
        [(field, text)] = await another.refused("Denoise", request, [*wired(CONDITIONING), *kept])
        assert field == "start_from"
        assert text.startswith("checkpoint reused_latents must be given after step")


async def test_each_of_these_changes_the_latents(bundle: Bundle) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"step_cache": pb.STEP_CACHE_MAG},
        {"step_cache": pb.STEP_CACHE_MAG, "step_cache_speedup": 2.5},
        {"step_cache": pb.STEP_CACHE_MAG, "step_cache_start": 0.5},
        {"guidance_start": 0.5},
        {"guidance_end": 0.5},
        {"cfg_zero_star": True},
        {"zero_init_steps": 1},
    ]
    async with stage(bundle) as denoiser:
        made = [latents(await run(denoiser, num_inference_steps=8, **change)) for change in changes]
    assert len({tensor.numpy().tobytes() for tensor in made}) == len(changes)


async def test_checkpoints_come_every_so_many_steps_but_not_with_the_last(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        answers = await run(denoiser, num_inference_steps=6, checkpoint_every_steps=2)
    assert [stored.message.completed_steps for stored in checkpoints(answers)] == [2, 4]
    for stored in checkpoints(answers):
        assert stored.message.state["step"] == stored.message.completed_steps
        assert all((t.dtype, t.shape) == (FLOAT32, (1, 16, 4, 8, 4)) for t in stored.tensors)
    digests = {stored.message.run_digest for stored in checkpoints(answers)}
    assert len(digests) == 1
    assert len(digests.pop()) == 64


OTHER_RUNS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 8},
    "steps": {"num_inference_steps": 5},
    "guidance": {"guidance_scale": 2.5},
    "shift": {"shift": 3.5},
    "solver": {"solver": pb.SOLVER_UNIPC},
    "origin of the pose": {"pose_time_origin": 0},
    "step cache": {"step_cache": pb.STEP_CACHE_MAG},
    "end of guidance": {"guidance_end": 0.5},
    "zero init": {"zero_init_steps": 1},
}


async def test_a_checkpoint_of_another_run_is_refused(bundle: Bundle) -> None:
    text = "start_from is the checkpoint of another run: its parameters, inputs or weights differ"
    async with stage(bundle) as denoiser:
        [stored, *_] = checkpoints(await run(denoiser, checkpoint_every_steps=1))
        for case, changes in OTHER_RUNS.items():
            with pytest.raises(WrongState, match=text) as error:
                await resume(denoiser, stored, **changes)
            assert error.value.reason == "CHECKPOINT_OF_ANOTHER_RUN", case
        for name in CONDITIONING:
            others = wired(CONDITIONING | {name: CONDITIONING[name] + 0.5})
            with pytest.raises(WrongState, match=text):
                await resume(denoiser, stored, others)
        with pytest.raises(WrongState, match=text):
            await resume(denoiser, stored, wired(CONDITIONING | HISTORY), history_frames=5)
    async with stage(replace(bundle, revision="0123456789ab")) as denoiser:
        with pytest.raises(WrongState, match=text):
            await resume(denoiser, stored)


async def test_a_checkpoint_that_is_not_whole_is_refused_by_name(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        [stored, *_] = checkpoints(await run(denoiser, checkpoint_every_steps=2, solver=pb.SOLVER_UNIPC))

        async def violations(message: pb.Checkpoint, tensors: list[WireTensor]) -> tuple[tuple[str, str], ...]:
            request = first(start_from=message, solver=pb.SOLVER_UNIPC)
            return await denoiser.refused("Denoise", request, [*wired(CONDITIONING), *tensors])

        names = [tensor.name for tensor in stored.tensors]
        assert names == [f"checkpoint.{n}" for n in ("latents", "previous_latents", "previous_x0.0", "previous_x0.1")]
        for left_out in stored.tensors:
            rest = [tensor for tensor in stored.tensors if tensor is not left_out]
            assert await violations(stored.message, rest) == ((left_out.name, "is missing"),)
        wrong = [from_torch(names[0], torch.zeros(1, 16, 4, 4, 8)), *stored.tensors[1:]]
        [(field, text)] = await violations(stored.message, wrong)
        assert (field, text) == (names[0], "must have the shape [1, 16, 4, 8, 4], got [1, 16, 4, 4, 8]")
        wrong = [from_torch(names[0], to_torch(stored.tensors[0]).double().half()), *stored.tensors[1:]]
        assert await violations(stored.message, wrong) == ((names[0], "must be float32, got float16"),)
        extra = from_torch("checkpoint.previous_x0.2", torch.zeros(1, 16, 4, 8, 4))
        [(field, text)] = await violations(stored.message, [*stored.tensors, extra])
        assert (field, text) == (extra.name, "came although start_from does not list it")
        assert len(await denoiser.refused("Denoise", first(), [*wired(CONDITIONING), *stored.tensors])) == len(names)


async def test_a_checkpoint_whose_state_cannot_be_is_refused(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        early, late, *_ = checkpoints(await run(denoiser, checkpoint_every_steps=1, solver=pb.SOLVER_UNIPC))

        async def violation(stored: Stored, **changes: Any) -> tuple[str, str]:
            message = pb.Checkpoint()
            message.CopyFrom(stored.message)
            for name, value in changes.pop("state", {}).items():
                message.state[name] = value
            for name, value in changes.items():
                setattr(message, name, value)
            listed = [t for t in stored.tensors if t.name.removeprefix("checkpoint.") in message.tensors]
            request = first(start_from=message, solver=pb.SOLVER_UNIPC)
            [found] = await denoiser.refused("Denoise", request, [*wired(CONDITIONING), *listed])
            return found

        assert await violation(early, completed_steps=2) == (
            "start_from.completed_steps",
            "must be the step of its state, 1, got 2",
        )
        field, text = await violation(early, state={"step": 3}, completed_steps=3)
        assert (field, text) == ("start_from", "the checkpoint's history is not that of unipc after step 3")
        field, text = await violation(late, state={"step": 5}, completed_steps=5)
        assert (field, text) == ("start_from", "checkpoint step must be 0 to 4, got 5")
        # a step of the second order needs two clean predictions, which are not there after the first step
        field, text = await violation(early, state={"last_order": 2})
        assert (field, text) == ("start_from", "checkpoint last_order must be 1 after step 1, got 2")
        assert "unknown ['age']" in (await violation(late, state={"age": 1}))[1]
        late.message.tensors.remove("latents")
        assert "missing ['latents']" in (await violation(late))[1]


WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "height": ({"height": 33}, "must be a multiple of 32, got 33"),
    "width": ({"width": 4128}, "must be 32 to 4096, got 4128"),
    "num_frames": ({"num_frames": 10**9}, "must be 1 to 257, got 1e+09"),
    "history_frames": ({"history_frames": 9}, "must be 0, or 4k + 1 and less than num_frames, got 9"),
    "num_inference_steps": ({"num_inference_steps": 0}, "must be 1 to 100, got 0"),
    "guidance_scale": ({"guidance_scale": float("nan")}, "must be 0 to 30, got nan"),
    "shift": ({"shift": float("inf")}, "must be 0.1 to 100, got inf"),
    "solver": ({"solver": 9}, "must be unipc, dpm++, euler or not set, got 9"),
    "seed": ({"seed": 2**63}, "must be 0 to 2^63 - 1, got 9223372036854775808"),
    "pose_time_origin": ({"pose_time_origin": 7}, "must be 0 to 1, got 7"),
    "step_cache": ({"step_cache": 9}, "must be tea, mag or not set, got 9"),
    "step_cache_speedup": ({"step_cache_speedup": 3.5}, "must be 1 to 3, got 3.5"),
    "step_cache_start": ({"step_cache_start": float("nan")}, "must be 0 to 1, got nan"),
    "guidance_end": ({"guidance_start": 0.5, "guidance_end": 0.5}, "must be above guidance_start, up to 1, got 0.5"),
}
MORE_WRONG_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("height", {"height": 0}),
    ("width", {"width": 2**32 - 1}),
    ("num_frames", {"num_frames": 6}),
    ("num_frames", {"num_frames": 0}),
    ("num_frames", {"num_frames": 261}),
    ("history_frames", {"history_frames": 4}),
    ("history_frames", {"num_frames": 257, "history_frames": 257}),
    ("num_inference_steps", {"num_inference_steps": 101}),
    ("guidance_scale", {"guidance_scale": -0.1}),
    ("guidance_scale", {"guidance_scale": 30.1}),
    ("shift", {"shift": 0.05}),
    ("step_cache_speedup", {"step_cache_speedup": 0.99}),
    ("step_cache_start", {"step_cache_start": 1.01}),
    ("guidance_start", {"guidance_start": -0.5}),
    ("guidance_start", {"guidance_start": float("nan")}),
    ("guidance_end", {"guidance_end": 1.1}),
    ("guidance_end", {"guidance_end": float("nan")}),
    ("zero_init_steps", {"zero_init_steps": 4}),
    ("zero_init_steps", {"num_inference_steps": 9, "zero_init_steps": 9}),
    ("seed", {"seed": 2**64 - 1}),
]


async def test_a_wrong_field_is_named(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        for field, (changes, text) in WRONG_FIELDS.items():
            assert await denoiser.refused("Denoise", first(**changes), wired(CONDITIONING)) == ((field, text),)
        for field, changes in MORE_WRONG_FIELDS:
            [(named, _)] = await denoiser.refused("Denoise", first(**changes))
            assert named == field, changes


async def test_all_wrong_fields_are_named_at_once(bundle: Bundle) -> None:
    everything: dict[str, Any] = {}
    for changes, _ in WRONG_FIELDS.values():
        everything |= changes
    async with stage(bundle) as denoiser:
        violations = await denoiser.refused("Denoise", first(**everything), wired(CONDITIONING))
    expected = {field: text for field, (_, text) in WRONG_FIELDS.items()}
    # less than 10^9 frames
    del expected["history_frames"]
    everything["history_frames"] = 9
    assert dict(violations) == expected


async def test_the_outermost_values_are_allowed(bundle: Bundle) -> None:
    for changes in (
        {"height": 4096, "width": 4096, "num_frames": 257, "history_frames": 253, "seed": 2**63 - 1},
        {"height": 32, "width": 32, "num_frames": 1, "guidance_scale": 30, "shift": 100, "num_inference_steps": 100},
        {"guidance_scale": 0, "shift": 0.1, "num_inference_steps": 1, "pose_time_origin": 0},
    ):
        Plan.of(first(**changes).parameters, bundle)


WRONG_TENSORS: dict[str, tuple[Tensor, str]] = {
    "prompt_embeds": (torch.zeros(1, 13, 24), "must have 1 to 12 rows, got 13"),
    "negative_prompt_embeds": (torch.zeros(1, 0, 24), "must have 1 to 12 rows, got 0"),
    "image_embeds": (torch.zeros(1, 1025, 16), "must have 1 to 1024 rows, got 1025"),
    "reference_latents": (torch.zeros(1, 16, 1, 4, 8), "must have the shape [1, 16, 1, 8, 4], got [1, 16, 1, 4, 8]"),
    "pose_latents": (torch.zeros(1, 16, 3, 8, 4), "must have the shape [1, 16, 3, 4, 2], got [1, 16, 3, 8, 4]"),
}


async def test_a_wrong_tensor_is_named(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        for name, (tensor, text) in WRONG_TENSORS.items():
            assert await denoiser.refused("Denoise", first(), without(name)) == ((name, "is missing"),)
            wrong = [*without(name), from_torch(name, tensor)]
            assert await denoiser.refused("Denoise", first(), wrong) == ((name, text),)
            wrong = [*without(name), from_torch(name, CONDITIONING[name].to(torch.int32))]
            [(field, text)] = await denoiser.refused("Denoise", first(), wrong)
            assert (field, text) == (name, "must be float32 or bfloat16 or float16, got int32")
        batch = torch.zeros(2, 12, 24)
        [(field, _)] = await denoiser.refused(
            "Denoise", first(), [*without("prompt_embeds"), from_torch("prompt_embeds", batch)]
        )
        assert field == "prompt_embeds"


async def test_tensors_that_do_not_belong_are_named(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        everything = wired(CONDITIONING | HISTORY)
        violation = ("history_latents", "came although history_frames is 0")
        assert await denoiser.refused("Denoise", first(), everything) == (violation,)
        violation = ("history_latents", "is missing")
        assert await denoiser.refused("Denoise", first(history_frames=5), wired(CONDITIONING)) == (violation,)
        violation = ("history_latents", "must have the shape [1, 16, 1, 8, 4], got [1, 16, 2, 8, 4]")
        assert await denoiser.refused("Denoise", first(history_frames=1), everything) == (violation,)
        [(field, text)] = await denoiser.refused(
            "Denoise", first(), [*wired(CONDITIONING), from_torch("depth_latents", torch.zeros(1))]
        )
        assert field == "depth_latents"
        assert text.startswith("is not a tensor of this rpc (it takes prompt_embeds, ")
        [(field, text)] = await denoiser.refused("Denoise", first(), [*wired(CONDITIONING), *wired(CONDITIONING)])
        assert (field, text) == ("prompt_embeds", "came twice")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_schedule_that_is_allowed_can_be_run(solver: str) -> None:
    for shift in (0.1, 1.0, 100.0):
        for steps in (1, 2, 100):
            sigmas = make_solver(solver, steps, shift).sigmas
            assert bool((sigmas.diff() < 0).all())


async def test_latents_that_are_not_finite_are_an_error_and_the_stage_goes_on(bundle: Bundle) -> None:
    poisoned = [*without("prompt_embeds"), from_torch("prompt_embeds", torch.full((1, 12, 24), torch.nan))]
    async with stage(bundle) as denoiser:
        answers = Answers()
        with pytest.raises(StageBroken, match="latents are not finite after step 1") as error:
            await denoiser.ask("Denoise", first(), poisoned, into=answers)
        assert error.value.reason == "LATENTS_NOT_FINITE"
        assert answers.messages("step") == []
        assert (await denoiser.status()).state == stage_pb2.STAGE_STATE_SERVING
        assert bool(torch.isfinite(latents(await run(denoiser))).all())


@asynccontextmanager
async def begun(of: Stage, blocks: Blocks, **changes: Any) -> AsyncIterator[asyncio.Task[Answers]]:
    """A run that is held in the middle of a step."""
    task = asyncio.create_task(run(of, **changes))
    await until(blocks.held.is_set)
    yield task


async def test_a_client_that_cancels_stops_the_device_within_one_block(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        blocks = Blocks(denoiser.service, hold_at=5)
        async with begun(denoiser, blocks) as task:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: not denoiser.runtime.status().work)
        await until(lambda: blocks.ran == 6)
        # the device is free: the next run is served, and the one that was cancelled ran no further block
        blocks.hold_at = -1
        await run(denoiser, num_inference_steps=1)
        assert blocks.ran == 6 + 2 * LAYERS


async def test_a_deadline_stops_the_device_within_one_block(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        await run(denoiser, num_inference_steps=1)
        blocks = Blocks(denoiser.service, hold_at=5)
        with pytest.raises(DeadlineExceeded):
            await denoiser.ask("Denoise", first(), wired(CONDITIONING), seconds=0.5)
        await until(lambda: not denoiser.runtime.status().work)
        blocks.hold_at = -1
        await run(denoiser, num_inference_steps=1)
        assert blocks.ran <= 6 + 2 * LAYERS


@pytest.mark.parametrize("checkpoint_every_steps", [0, 2])
async def test_a_stage_that_drains_hands_out_a_checkpoint(bundle: Bundle, checkpoint_every_steps: int) -> None:
    sampling = {"num_inference_steps": 5, "checkpoint_every_steps": checkpoint_every_steps}
    answers = Answers()
    async with stage(bundle) as ending:
        # in the second step
        blocks = Blocks(ending.service, hold_at=BLOCKS_PER_STEP + 1)
        call = asyncio.create_task(
            ending.ask("Denoise", first(**sampling), wired(CONDITIONING), seconds=20, into=answers)
        )
        await until(blocks.held.is_set)
        draining = asyncio.create_task(ending.server.drain(60))
        await until(lambda: ending.runtime.draining)
        # held again in the step after this one, which only giving it up can end
        blocks.hold_at = 2 * BLOCKS_PER_STEP + 1
        with pytest.raises(NotReady, match="the denoiser stage is draining; go on from the checkpoint") as error:
            await call
        await draining
        assert error.value.reason == "STAGE_DRAINING"
        assert blocks.ran <= 2 * BLOCKS_PER_STEP + 2
    assert [step.completed_steps for step in answers.messages("step")] == [1, 2]
    assert answers.named("latents") == []
    [stored] = checkpoints(answers)
    assert stored.message.completed_steps == 2
    async with stage(bundle) as other:
        whole = await run(other, num_inference_steps=5)
        assert torch.equal(latents(await resume(other, stored, num_inference_steps=5)), latents(whole))


async def test_a_stage_that_drains_finishes_a_run_at_its_last_step(bundle: Bundle) -> None:
    async with stage(bundle) as ending:
        blocks = Blocks(ending.service, hold_at=BLOCKS_PER_STEP + 1)
        async with begun(ending, blocks, num_inference_steps=2) as call:
            draining = asyncio.create_task(ending.server.drain(60))
            await until(lambda: ending.runtime.draining)
            blocks.hold_at = -1
            answers = await call
        await draining
    assert answers.one("latents").shape == SHAPE
    assert checkpoints(answers) == []


async def test_a_stage_that_loads_says_so(bundle: Bundle) -> None:
    async with stage(bundle, load=False) as loading:
        with pytest.raises(NotReady, match="the denoiser stage is loading"):
            await run(loading)
        status = await loading.status()
        assert (status.state, list(status.components)) == (stage_pb2.STAGE_STATE_LOADING, [])
        await loading.server.load()
        assert latents(await run(loading)).shape == SHAPE


async def test_status_tells_of_the_model_and_of_the_run_in_work(bundle: Bundle) -> None:
    async with stage(bundle) as denoiser:
        blocks = Blocks(denoiser.service, hold_at=0)
        named = denoiser.ask("Denoise", first(), wired(CONDITIONING), generation="generations/7")
        call = asyncio.create_task(named)
        await until(blocks.held.is_set)
        status = await denoiser.status()
        blocks.hold_at = -1
        await call
        await until(lambda: not denoiser.runtime.status().work)
    assert (status.stage, status.state) == ("denoiser", stage_pb2.STAGE_STATE_SERVING)
    assert (status.bundle, status.bundle_revision, status.attention_backend) == ("test", bundle.revision, "auto")
    [component] = status.components
    weights = denoiser.service._model.state_dict().values()
    assert (component.name, component.sha256, component.dtype) == ("transformer", "ab12", "float32+int8")
    assert component.parameters == sum(weight.numel() for weight in weights) > 50_000
    assert component.size_bytes == sum(weight.nbytes for weight in weights)
    assert component.size_bytes < 2.5 * component.parameters
    [work] = status.work
    assert (work.rpc, work.generation) == ("Denoise", "generations/7")


@pytest.mark.parametrize(
    ("settings", "attention"),
    [({"precision": "fast"}, "fp8"), ({"precision": "fast", "attention": "math"}, "math"), ({}, "auto")],
    ids=str,
)
async def test_status_tells_how_the_video_attends_to_itself(
    bundle: Bundle, settings: dict[str, Any], attention: str
) -> None:
    async with serving("denoiser", partial(DenoiserService, **settings), bundle) as denoiser:
        assert (await denoiser.status()).attention_backend == attention
        assert latents(await run(denoiser)).shape == SHAPE


def test_settings_of_the_environment_reach_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"PRECISION": "fast", "ATTENTION": "flash", "MEMORY_MODE": "hybrid", "VRAM": "4GiB", "STEP_CACHE": "true"}
    given["OFFLOAD_FOLDER"] = "/offload"
    for name, value in given.items():
        monkeypatch.setenv(f"BUNRAKU_{name}", value)
    for name in ("WORLD_SIZE", "LWS_GROUP_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(program, "serve_stage", lambda stage, make_service: made.append(make_service.keywords))
    program.main()
    assert made == [
        {
            "precision": "fast",
            "attention": "flash",
            "memory_mode": "hybrid",
            "vram_bytes": 4 * 1024**3,
            "offload_folder": Path("/offload"),
            "step_cache": True,
        }
    ]


def test_an_offload_folder_is_refused_where_nothing_is_streamed() -> None:
    with pytest.raises(ValueError, match="offload_folder is of memory_mode hybrid, got gpu_only"):
        program.DenoiserSettings(offload_folder=Path("/offload"))


async def test_a_step_takes_the_time_of_the_step_and_not_of_whoever_waits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    async with stage(bundle) as denoiser:
        service = denoiser.service
        plan = Plan.of(first(num_inference_steps=3, guidance_scale=1).parameters, bundle)
        monkeypatch.setattr("services.denoiser.service.time", SimpleNamespace(perf_counter=lambda: now))

        def a_second_passes(module: nn.Module, arguments: Any, output: Any) -> None:
            nonlocal now
            now += 1

        for block in service._model.blocks:
            block.register_forward_hook(a_second_passes)
        seconds = []
        for outcome in service._prepare(plan, {tensor.name: tensor for tensor in wired(CONDITIONING)}).steps(plan):
            seconds.append(outcome.seconds)
            now += 1000
    assert seconds == [LAYERS] * 3


@pytest.mark.parametrize("min_bytes", [1, 10**9])
async def test_shared_memory_changes_no_bit_and_leaves_nothing_behind(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_bytes: int
) -> None:
    monkeypatch.setattr("runtime.shared_memory.MIN_BYTES", min_bytes)
    async with stage(bundle) as plain:
        expected = await run(plain, checkpoint_every_steps=1, preview_every_steps=1)
    async with stage(bundle, shared_memory=tmp_path) as sharing:
        assert sharing.runtime.shared_memory is not None
        got = await run(sharing, checkpoint_every_steps=1, preview_every_steps=1)
        assert (sharing.runtime.shared_memory.own_bytes > 0) == (min_bytes == 1)
        resumed = await resume(sharing, checkpoints(got)[1])
        names = [tensor.name for tensor in expected.tensors]
        assert [tensor.name for tensor in got.tensors] == names
        assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(got.tensors, expected.tensors, strict=True))
        assert torch.equal(latents(resumed), latents(expected))
        del got, resumed
    assert os.listdir(tmp_path) == []


async def test_a_bundle_of_another_task_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="bundle test: this version serves animate, not text_to_video"):
        async with stage(replace(bundle, task="text_to_video")):
            pass


def tightest(bundle: Bundle) -> int:
    """The fewest bytes that the bundle's default clip is placed in."""
    model = load_transformer(
        bundle.component("transformer").files,
        configuration(bundle.component("transformer"), PRESETS, TransformerConfig),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )
    video = bundle.video
    tokens = animation_tokens(video.height, video.width, video.window_frames)
    weights, budget = weights_of(model), DEVICE_OVERHEAD_BYTES
    while True:
        try:
            return plan_memory(weights, model.config, tokens, budget).device_bytes
        except DoesNotFit:
            budget += 4096


async def test_a_tight_budget_has_room_for_a_step_cache_only_if_that_was_planned(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, num_layers=12)
    budget = tightest(bundle)
    cached = {"height": 64, "width": 64, "num_frames": 17, "step_cache": pb.STEP_CACHE_MAG}
    tensors = wired(
        CONDITIONING
        | {"reference_latents": normal(1, 16, 1, 8, 8, seed=4), "pose_latents": normal(1, 16, 5, 4, 4, seed=5)}
    )
    async with serving("denoiser", partial(DenoiserService, memory_mode="hybrid", vram_bytes=budget), bundle) as tight:
        assert latents(await run(tight, tensors, **(cached | {"step_cache": 0}))).isfinite().all()
        with pytest.raises(InvalidRequest, match=r"num_frames: \d+ tokens need .* GiB"):
            await run(tight, tensors, **cached)
    for more in (0, 10**5):
        make = partial(DenoiserService, memory_mode="hybrid", vram_bytes=budget + more, step_cache=True)
        if more:
            async with serving("denoiser", make, bundle) as roomy:
                assert latents(await run(roomy, tensors, **cached)).isfinite().all()
        else:
            with pytest.raises(DoesNotFit):
                async with serving("denoiser", make, bundle):
                    pass


async def test_hybrid_gives_the_latents_of_gpu_only_and_refuses_clips_that_exceed_its_budget(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, num_layers=12)
    async with stage(bundle) as whole:
        expected = latents(await run(whole))
        assert whole.runtime.memory_mode == stage_pb2.MEMORY_MODE_GPU_ONLY
    make = partial(DenoiserService, memory_mode="hybrid", vram_bytes=tightest(bundle))
    async with serving("denoiser", make, bundle) as hybrid:
        assert hybrid.runtime.memory_mode == stage_pb2.MEMORY_MODE_HYBRID
        assert hybrid.service._placement.plan.resident == 0
        torch.testing.assert_close(latents(await run(hybrid)), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(InvalidRequest, match=r"num_frames: \d+ tokens need .* GiB"):
            await run(hybrid, num_frames=257, height=512, width=512)


async def test_a_budget_that_was_exceeded_is_a_bug_that_the_log_tells(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with stage(bundle) as denoiser:
        await run(denoiser)
        assert "budget" not in caplog.text
        monkeypatch.setattr("services.denoiser.placement.Placement.excess", lambda placed, device: 3 * 2**20)
        await run(denoiser)
        assert "the budget was exceeded by 3 MiB, which is a bug; the plan was: " in caplog.text


async def test_hybrid_with_a_folder_gives_the_latents_of_hybrid_without(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, num_layers=12)
    make = partial(DenoiserService, memory_mode="hybrid", vram_bytes=tightest(bundle))
    async with serving("denoiser", make, bundle) as hybrid:
        expected = latents(await run(hybrid))
    folder = tmp_path / "offload"
    folder.mkdir()
    async with serving("denoiser", partial(make, offload_folder=folder), bundle) as hybrid:
        assert torch.equal(latents(await run(hybrid)), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_hybrid_without_a_gpu_and_a_number_of_bytes_is_cpu_only(bundle: Bundle) -> None:
    async with serving("denoiser", partial(DenoiserService, memory_mode="hybrid"), bundle) as served:
        assert served.runtime.memory_mode == stage_pb2.MEMORY_MODE_CPU_ONLY
        assert latents(await run(served)).isfinite().all()


async def test_cpu_only_computes_on_the_cpu_whatever_there_is(bundle: Bundle) -> None:
    async with serving("denoiser", partial(DenoiserService, memory_mode="cpu_only"), bundle) as served:
        assert served.runtime.device == "cpu"
        assert served.runtime.memory_mode == stage_pb2.MEMORY_MODE_CPU_ONLY
