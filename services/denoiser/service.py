"""DenoiserService: conditioning in; events of each step, previews, checkpoints and at last latents out."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from bunraku.errors import InvalidRequest, NotReady, StageBroken, WrongState
from bunraku.v1 import denoiser_pb2 as pb
from bunraku.v1 import denoiser_pb2_grpc, stage_pb2
from runtime import telemetry
from runtime.budget import DoesNotFit
from runtime.bundles import Bundle, BundleError, configuration, require_files
from runtime.checks import Checks
from runtime.fingerprint import fingerprint
from runtime.gpu import gate_blocks, raise_if_cancelled
from runtime.stage import StageRuntime
from runtime.tensors import FLOAT32, FLOATS, WireTensor, require
from runtime.torch_stage import compute_dtype, loaded_component, warming_up
from runtime.torch_tensors import from_torch, to_torch
from services.denoiser.attention import AUTO, attention_backend
from services.denoiser.conditioning import Conditioning, animation, seeded_noise
from services.denoiser.denoise import (
    Expert,
    Forwards,
    Options,
    Prompt,
    Step,
    check_reuse,
    denoise,
    plan_steps,
    preview_rgb,
)
from services.denoiser.group import Leader, Worker
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig
from services.denoiser.placement import CPU_ONLY, GPU_ONLY, HYBRID, Placement, free_budget, place
from services.denoiser.plan import animation_tokens
from services.denoiser.precision import (
    arithmetic_of,
    attention_of,
    default_precision,
    use_attention,
)
from services.denoiser.sampling import SOLVERS, Solver, SolverState, make_solver
from services.denoiser.step_cache import DEFAULT_SPEEDUP, MAG, STEP_CACHES, TEA, StepCache
from services.denoiser.warm_up import warm_up
from services.denoiser.weights import load_transformer

_log = logging.getLogger(__name__)
AUTO_PRECISION = "auto"
_MEMORY_MODES = {
    GPU_ONLY: stage_pb2.MEMORY_MODE_GPU_ONLY,
    HYBRID: stage_pb2.MEMORY_MODE_HYBRID,
    CPU_ONLY: stage_pb2.MEMORY_MODE_CPU_ONLY,
}
CHECKPOINT_PREFIX = "checkpoint."
_TENSORS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "image_embeds",
    "reference_latents",
    "pose_latents",
    "history_latents",
    CHECKPOINT_PREFIX,
)
_LATENT_CHANNELS, _PIXELS_PER_LATENT = 16, 8
_SIZE_MULTIPLE = 32  # of SCAIL: pose tokens stand for 32 x 32 pixels
_MAX_SIDE, _MAX_FRAMES, _MAX_STEPS, _MAX_SEED = 4096, 257, 100, 2**63 - 1
_MAX_IMAGE_ROWS = 1024  # CLIP ViT-H/14 gives 257
_SOLVER_NAMES = {
    pb.Solver.SOLVER_UNIPC: "unipc",
    pb.Solver.SOLVER_DPMPP: "dpm++",
    pb.Solver.SOLVER_EULER: "euler",
}
_STEP_CACHE_NAMES = {pb.StepCache.STEP_CACHE_TEA: TEA, pb.StepCache.STEP_CACHE_MAG: MAG}
_UNUSED_WHEN = {"image_embeds": "the model has no image branch", "history_latents": "history_frames is 0"}
Context = grpc.aio.ServicerContext[Any, Any]


class DenoiserService(denoiser_pb2_grpc.DenoiserServiceServicer):
    """The diffusion transformer of one bundle."""

    full_name = pb.DESCRIPTOR.services_by_name["DenoiserService"].full_name

    def __init__(
        self,
        runtime: StageRuntime,
        bundle: Bundle,
        *,
        precision: str = AUTO_PRECISION,
        attention: str = AUTO.name,
        memory_mode: str = GPU_ONLY,
        vram_bytes: int | None = None,
        offload_folder: Path | None = None,
        step_cache: bool = False,
        group: Leader | Worker | None = None,
    ) -> None:
        """precision: of `precision.PRECISIONS`, or `auto`. memory_mode: of `placement.MEMORY_MODES`. group: None: alone.

        attention: of `attention.BACKENDS`, for attention of the video to itself; `auto`: what the precision stands for.
        offload_folder: of hybrid, as for `placement.place`. step_cache: leaves room for one in its budget.
        """
        if bundle.task != "animate":
            raise BundleError(f"bundle {bundle.name}: this version serves animate, not {bundle.task}")
        if memory_mode == HYBRID and vram_bytes is None and not runtime.device.startswith("cuda"):
            _log.warning("memory mode hybrid without a GPU is cpu_only: the weights are in host memory as it is")
            memory_mode = CPU_ONLY
        if memory_mode == CPU_ONLY:
            runtime.device = "cpu"
        runtime.memory_mode = _MEMORY_MODES[memory_mode]
        self._runtime, self._bundle, self._precision = runtime, bundle, precision
        self._attention = attention_backend(attention)
        self._memory_mode, self._vram_bytes, self._offload_folder = memory_mode, vram_bytes, offload_folder
        self._cached_branches = 2 if step_cache else 0
        self._group, self._leader = group, group if isinstance(group, Leader) else None
        self._placement: Placement
        self._model: DiffusionTransformer
        self._weights: str  # what tells their files from others

    def add_to(self, server: grpc.aio.Server) -> None:
        denoiser_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    def load(self) -> None:
        component = self._bundle.component("transformer")
        require_files(component)
        device = torch.device(self._runtime.device)
        hybrid = self._memory_mode == HYBRID
        config = configuration(component, PRESETS, TransformerConfig)
        if self._group is not None:
            self._group.join(device, config.num_heads)
        self._model = load_transformer(
            component.files,
            config,
            device=torch.device("cpu") if hybrid else device,
            compute_dtype=compute_dtype(device),
            attention=AUTO,
            loras=component.loras,
            folder=self._offload_folder if hybrid else None,
        )
        self._weights = fingerprint(component)
        self._runtime.components.append(loaded_component(component, self._model))
        if self._precision == AUTO_PRECISION:
            self._precision = default_precision(device)
        self._runtime.decisive["precision"] = self._precision
        budget = (self._vram_bytes or free_budget(device)) if hybrid else None
        self._placement = place(
            self._model, device, budget, self._longest(), self._cached_branches, self._precision, self._offload_folder
        )
        if self._attention is not AUTO:
            use_attention(self._model, self._attention)
        with warming_up(self._runtime):
            self.warm_up()
        check = raise_if_cancelled
        if self._group is not None:
            self._runtime.decisive["ranks"] = str(self._group.place.world_size)
            check = self._group.ready(self._model, self._computes)
        gate_blocks(self._model.blocks, device, check)
        self._runtime.attention_backend = attention_of(self._model)
        _log.info(
            "precision %s: %s, attention %s; %s",
            self._precision, arithmetic_of(self._model), self._runtime.attention_backend, self._placement,
        )  # fmt: skip

    def warm_up(self) -> None:
        """Computes something of what an animation of the bundle's size will; of a group, each process by itself."""
        video = self._bundle.video
        warm_up(self._model, torch.device(self._runtime.device), video.height, video.width, video.window_frames)

    @property
    def _computes(self) -> str:
        """What decides the bits of a result besides parameters and inputs."""
        ranks = "" if self._group is None else f" {self._group.place.world_size} ranks"
        return f"{self._bundle.revision} {self._weights} {self._precision} {attention_of(self._model)}{ranks}"

    def _longest(self) -> int:
        """Tokens of the longest clip that the bundle has as a default: a window of its size."""
        video = self._bundle.video
        return animation_tokens(video.height, video.width, video.window_frames)

    async def Denoise(self, requests: AsyncIterator[pb.DenoiseRequest], context: Context) -> AsyncIterator[Any]:
        first, tensors = await self._runtime.receive_call(requests, context, _TENSORS)
        plan = Plan.of(first.parameters, self._bundle)
        run = await self._runtime.gpu.run(lambda: self._prepare(plan, tensors))
        yield pb.DenoiseResponse(plan=plan.message(run.state.step, run.forwards))
        steps = self._runtime.gpu.stream(lambda: self._steps(run, plan, first.parameters, tensors))
        async for outcome in steps if self._leader is None else self._leader.watched(steps):
            for message in self._outcome_messages(outcome, run.digest, context):
                yield message
            if self._runtime.draining and outcome.latents is None:
                # the next step has begun already; what it computes would be lost
                await steps.aclose()
                for message in await self._give_back(outcome, run.digest, context):
                    yield message
                raise NotReady("the denoiser stage is draining; go on from the checkpoint", reason="STAGE_DRAINING")
        if excess := self._placement.excess(torch.device(self._runtime.device)):
            _log.error(
                "the budget was exceeded by %d MiB, which is a bug; the plan was: %s", excess >> 20, self._placement
            )

    def _steps(
        self, run: Run, plan: Plan, parameters: pb.DenoiseParameters, tensors: Mapping[str, WireTensor]
    ) -> Iterator[Outcome]:
        """Of a run, with the rest of the group."""
        if self._leader is None:
            return run.steps(plan)
        return self._leader.steps(parameters.SerializeToString(), tensors, run.steps(plan))

    def follow(self, parameters: bytes, tensors: Mapping[str, WireTensor]) -> Iterator[Outcome]:
        """The steps of a call that the leader of the group was given."""
        given = pb.DenoiseParameters.FromString(parameters)
        plan = replace(Plan.of(given, self._bundle), preview_every_steps=0, checkpoint_every_steps=0)
        return self._prepare(plan, tensors).steps(plan)

    def _prepare(self, plan: Plan, tensors: Mapping[str, WireTensor]) -> Run:
        """Everything on the device that a run needs."""
        expects = Expectations(self._model.config, plan)
        try:
            tokens = animation_tokens(plan.height, plan.width, plan.num_frames)
            self._placement.check(tokens, plan.cached_branches)
        except DoesNotFit as error:
            raise InvalidRequest(("num_frames", str(error))) from error
        device = torch.device(self._runtime.device)
        wired = expects.inputs(tensors)
        # another precision or number of ranks gives other bits, so its checkpoints are no others' to go on from
        digest = run_digest(plan, wired, self._computes)
        inputs = {name: to_torch(tensor).to(device) for name, tensor in wired.items()}
        solver = make_solver(plan.solver, plan.num_inference_steps, plan.shift)
        start = solver.start(seeded_noise(expects.state_shape, plan.seed).to(device))
        experts = [Expert(self._model, plan.guidance_scale)]
        steps = plan_steps(experts, solver, plan.options, start.latents)
        conditioning = animation(
            inputs["reference_latents"].float(),
            inputs["pose_latents"].float(),
            self._model.config.head_dim,
            pose_time_origin=plan.pose_time_origin,
            history_latents=inputs["history_latents"].float() if "history_latents" in inputs else None,
            frames_given=plan.history_frames,
        )
        if plan.start_from is not None:
            state = restored(plan.start_from, tensors, digest, solver, steps, expects.state_shape, device)
        else:
            state = start
        prompt = Prompt(inputs["prompt_embeds"], inputs.get("negative_prompt_embeds"), inputs.get("image_embeds"))
        return Run(experts, solver, state, conditioning, prompt, digest, Forwards.of(steps))

    def _outcome_messages(self, outcome: Outcome, digest: str, context: Context) -> Iterator[Any]:
        telemetry.STEP_SECONDS.record(outcome.seconds)
        telemetry.event(
            telemetry.EVENT_STEP,
            {
                telemetry.ATTRIBUTE_STEP: outcome.state.step,
                telemetry.ATTRIBUTE_SIGMA: outcome.sigma,
                telemetry.ATTRIBUTE_SECONDS: outcome.seconds,
            },
        )
        yield pb.DenoiseResponse(
            step=pb.DenoiseStep(completed_steps=outcome.state.step, sigma=outcome.sigma, seconds=outcome.seconds)
        )
        if outcome.preview is not None:
            yield from self._runtime.send(pb.DenoiseResponse, [from_torch("preview", outcome.preview)], context)
        if outcome.checkpoint is not None:
            yield from self._checkpoint_messages(outcome.checkpoint, digest, context)
        if outcome.latents is not None:
            yield from self._runtime.send(pb.DenoiseResponse, [from_torch("latents", outcome.latents)], context)

    def _checkpoint_messages(self, checkpoint: StoredState, digest: str, context: Context) -> Iterator[Any]:
        yield pb.DenoiseResponse(
            checkpoint=pb.Checkpoint(
                completed_steps=checkpoint.counters["step"],
                run_digest=digest,
                state=checkpoint.counters,
                tensors=sorted(checkpoint.tensors),
            )
        )
        named = [from_torch(CHECKPOINT_PREFIX + name, tensor) for name, tensor in sorted(checkpoint.tensors.items())]
        yield from self._runtime.send(pb.DenoiseResponse, named, context)

    async def _give_back(self, outcome: Outcome, digest: str, context: Context) -> list[Any]:
        """The checkpoint of a run that another replica will go on with; nothing if it was sent with the step."""
        if outcome.checkpoint is not None:
            return []
        checkpoint = await self._runtime.gpu.run(lambda: StoredState.of(outcome.state))
        return list(self._checkpoint_messages(checkpoint, digest, context))


@dataclass(frozen=True)
class Plan:
    """Checked parameters, with the bundle's defaults filled in."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    solver: str
    seed: int
    history_frames: int
    pose_time_origin: int
    step_cache: str  # empty: none
    step_cache_speedup: float
    step_cache_start: float
    guidance_start: float
    guidance_end: float
    cfg_zero_star: bool
    zero_init_steps: int
    preview_every_steps: int
    checkpoint_every_steps: int
    start_from: pb.Checkpoint | None

    @classmethod
    def of(cls, parameters: pb.DenoiseParameters, bundle: Bundle) -> Plan:
        """Raises InvalidRequest naming every field that is wrong."""
        p, sampling = parameters, bundle.sampling
        plan = cls(
            height=p.height,
            width=p.width,
            num_frames=p.num_frames,
            num_inference_steps=_given(p, "num_inference_steps", sampling.num_inference_steps),
            guidance_scale=float(_given(p, "guidance_scale", sampling.guidance_scale)),
            shift=float(_given(p, "shift", sampling.shift)),
            solver=_SOLVER_NAMES.get(p.solver, str(p.solver)) if p.solver else sampling.solver,
            seed=p.seed,
            history_frames=p.history_frames,
            pose_time_origin=_given(p, "pose_time_origin", bundle.quirks.pose_time_origin),
            step_cache=_STEP_CACHE_NAMES.get(p.step_cache, str(p.step_cache)) if p.step_cache else "",
            step_cache_speedup=_given(p, "step_cache_speedup", DEFAULT_SPEEDUP),
            step_cache_start=p.step_cache_start,
            guidance_start=p.guidance_start,
            guidance_end=_given(p, "guidance_end", 1.0),
            cfg_zero_star=p.cfg_zero_star,
            zero_init_steps=p.zero_init_steps,
            preview_every_steps=p.preview_every_steps,
            checkpoint_every_steps=p.checkpoint_every_steps,
            start_from=p.start_from if p.HasField("start_from") else None,
        )
        plan.check()
        return plan

    def check(self) -> None:
        checks = Checks()
        for field in ("height", "width"):
            value = getattr(self, field)
            if checks.between(field, value, _SIZE_MULTIPLE, _MAX_SIDE):
                checks.multiple(field, value, _SIZE_MULTIPLE)
        if checks.between("num_frames", self.num_frames, 1, _MAX_FRAMES):
            checks.that(self.num_frames % 4 == 1, "num_frames", f"must be 4k + 1, got {self.num_frames}")
        given = self.history_frames
        fits = given == 0 or (given % 4 == 1 and given < self.num_frames)
        checks.that(fits, "history_frames", f"must be 0, or 4k + 1 and less than num_frames, got {given}")
        if checks.between("num_inference_steps", self.num_inference_steps, 1, _MAX_STEPS):
            checks.between("zero_init_steps", self.zero_init_steps, 0, self.num_inference_steps - 1)
        checks.between("guidance_scale", self.guidance_scale, 0, 30)
        checks.between("shift", self.shift, 0.1, 100)
        checks.that(self.solver in SOLVERS, "solver", f"must be {', '.join(SOLVERS)} or not set, got {self.solver}")
        checks.that(self.seed <= _MAX_SEED, "seed", f"must be 0 to 2^63 - 1, got {self.seed}")
        checks.between("pose_time_origin", self.pose_time_origin, 0, 1)
        methods = ("", *STEP_CACHES)
        checks.that(self.step_cache in methods, "step_cache", f"must be tea, mag or not set, got {self.step_cache}")
        checks.between("step_cache_speedup", self.step_cache_speedup, 1, 3)
        checks.between("step_cache_start", self.step_cache_start, 0, 1)
        if checks.between("guidance_start", self.guidance_start, 0, 1):
            above = self.guidance_start < self.guidance_end <= 1
            checks.that(above, "guidance_end", f"must be above guidance_start, up to 1, got {self.guidance_end:g}")
        checks.done()

    @property
    def options(self) -> Options:
        cache = StepCache(self.step_cache, self.step_cache_speedup, self.step_cache_start) if self.step_cache else None
        return Options(self.guidance_start, self.guidance_end, self.cfg_zero_star, self.zero_init_steps, cache)

    @property
    def cached_branches(self) -> int:
        """Guidance branches whose residual a step cache keeps."""
        return 1 + (self.guidance_scale != 1) if self.step_cache else 0

    def message(self, completed_steps: int, forwards: Forwards) -> pb.DenoisePlan:
        solver = next(number for number, name in _SOLVER_NAMES.items() if name == self.solver)
        return pb.DenoisePlan(
            num_inference_steps=self.num_inference_steps,
            completed_steps=completed_steps,
            guidance_scale=self.guidance_scale,
            shift=self.shift,
            solver=solver,
            forward_passes=pb.ForwardPasses(
                computed=forwards.computed, reused=forwards.reused, omitted=forwards.omitted
            ),
        )


@dataclass(frozen=True)
class Expectations:
    """Shapes of the tensors of one run."""

    config: TransformerConfig
    plan: Plan

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of the latents while they are denoised: the reference's frame, then the video's."""
        return (1, _LATENT_CHANNELS, 1 + _latent_frames(self.plan.num_frames), *self._size)

    @property
    def _size(self) -> tuple[int, int]:
        return self.plan.height // _PIXELS_PER_LATENT, self.plan.width // _PIXELS_PER_LATENT

    def inputs(self, tensors: Mapping[str, WireTensor]) -> dict[str, WireTensor]:
        """The conditioning that the run uses, checked.

        Raises InvalidRequest naming the tensors that are missing, do not fit or are too much.
        """
        self._refuse_unused(tensors)
        checked = {name: require(tensors, name, shape, FLOATS) for name, shape in self._shapes().items()}
        text_len = self.config.text_len
        most_rows = {"prompt_embeds": text_len, "negative_prompt_embeds": text_len, "image_embeds": _MAX_IMAGE_ROWS}
        checks = Checks()
        for name, most in most_rows.items():
            rows = checked[name].shape[1] if name in checked else 1
            checks.that(1 <= rows <= most, name, f"must have 1 to {most} rows, got {rows}")
        checks.done()
        return checked

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Of the conditioning that the run needs, by name; None where any length will do."""
        config, plan, (height, width) = self.config, self.plan, self._size
        text = (1, None, config.text_dim)
        shapes: dict[str, tuple[int | None, ...]] = {
            "prompt_embeds": text,
            "reference_latents": (1, _LATENT_CHANNELS, 1, height, width),
            "pose_latents": (1, _LATENT_CHANNELS, _latent_frames(plan.num_frames), height // 2, width // 2),
        }
        if plan.guidance_scale != 1:
            shapes["negative_prompt_embeds"] = text
        if config.image_dim is not None:
            shapes["image_embeds"] = (1, None, config.image_dim)
        if plan.history_frames:
            shapes["history_latents"] = (1, _LATENT_CHANNELS, _latent_frames(plan.history_frames), height, width)
        return shapes

    def _refuse_unused(self, tensors: Mapping[str, WireTensor]) -> None:
        """A tensor that the run would ignore is a mistake; but a negative prompt may come without guidance."""
        stored = self.plan.start_from.tensors if self.plan.start_from is not None else ()
        used = {*self._shapes(), "negative_prompt_embeds", *(CHECKPOINT_PREFIX + name for name in stored)}
        checks = Checks()
        for name in sorted(tensors.keys() - used):
            reason = "start_from does not list it" if name.startswith(CHECKPOINT_PREFIX) else _UNUSED_WHEN[name]
            checks.that(False, name, f"came although {reason}")
        checks.done()


@dataclass(frozen=True)
class StoredState:
    """A solver's state on the CPU."""

    tensors: dict[str, Tensor]
    counters: dict[str, int]

    @classmethod
    def of(cls, state: SolverState) -> StoredState:
        tensors, counters = state.to_tensors()
        return cls({name: tensor.to("cpu") for name, tensor in tensors.items()}, dict(counters))


@dataclass(frozen=True)
class Outcome:
    """What a step leaves; `latents` only after the last."""

    state: SolverState
    sigma: float
    seconds: float
    preview: Tensor | None
    checkpoint: StoredState | None
    latents: Tensor | None


@dataclass(frozen=True)
class Run:
    """A denoise that is ready to begin, or to go on."""

    experts: list[Expert]
    solver: Solver
    state: SolverState
    conditioning: Conditioning
    prompt: Prompt
    digest: str
    forwards: Forwards

    @torch.inference_mode()
    def steps(self, plan: Plan) -> Iterator[Outcome]:
        """Takes the steps that are left. Raises StageBroken when latents are no longer finite."""
        begun = time.perf_counter()
        if self.state.step == plan.num_inference_steps:
            yield self._outcome(self.state, plan, begun)
        states = denoise(self.experts, self.solver, self.state, self.conditioning, self.prompt, plan.options)
        for state in states:
            yield self._outcome(state, plan, begun)
            begun = time.perf_counter()  # now: whoever takes the steps may have let the last one wait

    def _outcome(self, state: SolverState, plan: Plan, begun: float) -> Outcome:
        last = state.step == plan.num_inference_steps
        # reading one value waits for the device, so the time is that of the step
        if not bool(torch.isfinite(state.latents).all()):
            raise StageBroken(f"latents are not finite after step {state.step}", reason="LATENTS_NOT_FINITE")
        return Outcome(
            state,
            sigma=float(self.solver.sigmas[state.step]),
            seconds=time.perf_counter() - begun,
            preview=preview_rgb(self.conditioning.result(state.latents)).to("cpu")
            if _is_due(state.step, plan.preview_every_steps)
            else None,
            checkpoint=StoredState.of(state) if _is_due(state.step, plan.checkpoint_every_steps) and not last else None,
            latents=self.conditioning.result(state.latents).to("cpu") if last else None,
        )


def restored(
    checkpoint: pb.Checkpoint,
    tensors: Mapping[str, WireTensor],
    digest: str,
    solver: Solver,
    steps: Sequence[Step],
    shape: tuple[int, ...],
    device: torch.device,
) -> SolverState:
    """The solver's state of a checkpoint.

    Raises:
        WrongState: the checkpoint is of another run.
        InvalidRequest: its tensors are not those that it lists, or no run of this solver and these steps can have left
            its state.
    """
    if checkpoint.run_digest != digest:
        text = "start_from is the checkpoint of another run: its parameters, inputs or weights differ"
        raise WrongState(text, reason="CHECKPOINT_OF_ANOTHER_RUN")
    step = checkpoint.state.get("step", checkpoint.completed_steps)
    if step != checkpoint.completed_steps:
        text = f"must be the step of its state, {step}, got {checkpoint.completed_steps}"
        raise InvalidRequest(("start_from.completed_steps", text))
    stored = {
        name: to_torch(require(tensors, CHECKPOINT_PREFIX + name, shape, (FLOAT32,))).to(device)
        for name in checkpoint.tensors
    }
    try:
        state = SolverState.from_tensors(stored, dict(checkpoint.state))
        solver.check(state)
        check_reuse(steps, state)
        return state
    except ValueError as error:
        raise InvalidRequest(("start_from", str(error))) from error


def run_digest(plan: Plan, inputs: Mapping[str, WireTensor], revision: str) -> str:
    """Of everything that decides a run's result: parameters, conditioning, weights."""
    decisive = {
        name: value
        for name, value in vars(plan).items()
        if name not in ("preview_every_steps", "checkpoint_every_steps", "start_from")
    }
    digest = hashlib.sha256(repr((revision, sorted(decisive.items()))).encode())
    for name, tensor in sorted(inputs.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.data.data)
    return digest.hexdigest()


def _given(parameters: pb.DenoiseParameters, field: str, default: Any) -> Any:
    return getattr(parameters, field) if parameters.HasField(field) else default  # type: ignore[arg-type]


def _latent_frames(num_frames: int) -> int:
    return (num_frames - 1) // 4 + 1


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
