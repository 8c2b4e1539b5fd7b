"""Cases of the denoiser: transformer, rotary tables, masks, solvers, whole loops, int8 checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.weights import build_on_meta, load_weights, read_metadata
from services.denoiser.conditioning import Conditioning, animation, known_frames_mask, text_to_video
from services.denoiser.denoise import Expert, Prompt, denoise
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig, sinusoid
from services.denoiser.quantisation import DATA, SCALE, Int8Linear, check_quantization, quantize_state_dict
from services.denoiser.rope import scail_rope
from services.denoiser.sampling import Solver, make_solver
from services.denoiser.weights import checkpoint_problems
from tests.parity.cases import Case, Comparison, recipe_weight
from tests.parity.families import family
from tests.parity.manifests import manifest


def config_of(case: Case, weights: dict[str, Tensor]) -> TransformerConfig:
    """The case's sizes; the optional branches are those that have weights."""
    sizes = (
        "in_dim",
        "out_dim",
        "dim",
        "ffn_dim",
        "num_heads",
        "num_layers",
        "freq_dim",
        "text_dim",
        "text_len",
        "eps",
    )
    clip_norm = weights.get("img_emb.proj.0.weight")
    return TransformerConfig(
        **{size: case.config[size] for size in sizes},
        image_dim=None if clip_norm is None else len(clip_norm),
        pose="pose_patch_embedding.weight" in weights,
        patch=tuple(case.config["patch_size"]),
    )


def transformer_of(case: Case, prefix: str = "") -> DiffusionTransformer:
    """The case's model; `prefix` tells two models of one case apart in the recipe's names."""
    weights = case.weights(prefix)
    model = build_on_meta(lambda: DiffusionTransformer(config_of(case, weights)))
    load_weights(model, weights, source=case.name)
    return model.eval()


class Intermediates:
    """What the model's parts gave in the last forward pass, under the names that the cases have for them."""

    def __init__(self, model: DiffusionTransformer) -> None:
        self.values: dict[str, Tensor] = {}
        for name, module in model.named_children():
            self.watch(name, module)
        for index, block in enumerate(model.blocks):
            self.watch(f"block{index}", block)

    def watch(self, name: str, module: nn.Module) -> None:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.values[name] = output

        module.register_forward_hook(keep)

    def compared(self, case: Case, time_row: int) -> Iterator[Comparison]:
        """The case's intermediate values of one sample; of tokens those that both sides have."""
        for name in case.expected_names("mid."):
            part = re.sub(r"_first\d+$", "", name.removeprefix("mid."))
            expected = case.expected(name)
            if part not in self.values:
                continue
            actual = self.values[part]
            if part == "time_projection":  # a row per distinct timestep here; the case has that of the first token
                actual = actual[time_row].view(expected.shape)
            elif part == "pose_patch_embedding":  # tokens here, a convolution's output in the case
                actual = actual.transpose(1, 2).reshape(expected.shape)
            else:
                tokens = min(actual.shape[1], expected.shape[1])
                actual, expected = actual[:, :tokens], expected[:, :tokens]
            yield Comparison.within(name, actual, expected, case.tolerance)


@family("dit-t2v", "dit-ti2v", "dit-i2v", "dit-i2v21", "dit-i2v22", on_any_device=True)
def transformer(case: Case) -> Iterator[Comparison]:
    model = transformer_of(case)
    intermediates = Intermediates(model)
    outputs = [name for name in case.expected_names("out") if re.fullmatch(r"out\d+", name)]
    for index, name in enumerate(outputs):
        number = name.removeprefix("out")
        latents = case.input(f"x{number}")
        if f"y{number}" in case.spec["inputs"]:
            latents = torch.cat((latents, case.input(f"y{number}")))
        rope = text_to_video(latents.shape[1:], model.config.head_dim, case.device).rope
        timestep = timesteps_of(case, index, len(rope.cos))
        context = model.embed_context(case.input(f"context{number}")[None], image_embeds_of(case, model, index))
        velocity = model(latents[None], timestep, context, rope)
        yield Comparison.within(name, velocity[0], case.expected(name), case.tolerance)
        if len(outputs) == 1:
            time = model.embed_timestep(timestep, latents.device)
            yield from intermediates.compared(case, int(time.row[0, 0]))


def image_embeds_of(case: Case, model: DiffusionTransformer, index: int) -> Tensor | None:
    """The CLIP tokens of one sample [1, n, image_dim]; a case may have one picture for all."""
    if model.config.image_dim is None:
        return None
    image_embeds = case.input("clip_fea")
    return image_embeds[min(index, len(image_embeds) - 1)][None]


def timesteps_of(case: Case, index: int, tokens: int) -> Tensor:
    """The timestep of one sample, [1], or of its tokens, [1, L]; a case may have more for padding."""
    if "in.t" in case.stored:
        timestep = case.stored["in.t"]
        timestep = timestep[min(index, len(timestep) - 1)]
        return timestep[None, :tokens] if timestep.ndim else timestep[None]
    stated = case.call["t"]
    return torch.tensor([stated[min(index, len(stated) - 1)] if isinstance(stated, list) else stated])


@family("dit-scail", on_any_device=True)
def scail_transformer(case: Case) -> Iterator[Comparison]:
    model = transformer_of(case)
    intermediates = Intermediates(model)
    latents = case.input("x")
    conditioning = scail_conditioning(case, model, latents[:, :, :1], latents[:, :, 1:])
    yield from stored_conditioning(case, conditioning)
    context = model.embed_context(case.input("context0")[None], case.input("clip_fea"))
    velocity = model(
        conditioning.model_input(latents),
        torch.tensor([case.call["t"]]),
        context,
        conditioning.rope,
        conditioning.pose_latents,
    )
    yield Comparison.within("out", velocity, case.expected("out"), case.tolerance)
    yield from intermediates.compared(case, 0)


def scail_conditioning(
    case: Case, model: DiffusionTransformer, reference_latents: Tensor, video_latents: Tensor
) -> Conditioning:
    """As the case calls it; the given frames are the first of `video_latents`."""
    frames_given = case.call["prefix_frames"]
    history = video_latents[:, :, : (frames_given + 3) // 4] if frames_given else None
    return animation(
        reference_latents,
        case.input("pose_latents"),
        model.config.head_dim,
        pose_time_origin=case.call["pose_t0"],
        history_latents=history,
        frames_given=frames_given,
    )


def stored_conditioning(case: Case, conditioning: Conditioning) -> Iterator[Comparison]:
    """The inputs that the case stores although they follow from its sizes."""
    assert conditioning.channels is not None
    yield Comparison("y_mask", conditioning.channels[0], case.input("y_mask"))
    for part in ("cos", "sin"):
        if f"in.rope_{part}" in case.stored:
            table = getattr(conditioning.rope, part)
            yield Comparison(f"rope_{part}", table, case.input(f"rope_{part}"), atol=2e-5)  # as rope-scail allows


@family("i2v-mask")
def mask(case: Case) -> Iterator[Comparison]:
    for index, sizes in enumerate(case.config["cases"]):
        name = f"mask_{index}"
        folded = known_frames_mask(sizes["frames_given"], sizes["lat_t"], sizes["lat_h"], sizes["lat_w"])
        yield Comparison(name, folded, case.expected(name))


@family("rope-scail")
def scail_rotary(case: Case) -> Iterator[Comparison]:
    frames, height, width = case.config["latent"]
    rows = case.expected("rows")
    for suffix, origin in (("", 0), ("1", 1)):
        rope = scail_rope(frames - 1, height // 2, width // 2, case.config["head_dim"], pose_time_origin=origin)
        yield Comparison(f"tokens{suffix}", len(rope.cos), case.config["all_tokens"])
        for part in ("cos", "sin"):
            table = getattr(rope, part)[rows]
            yield Comparison.within(part + suffix, table, case.expected(part + suffix), case.tolerance)


@family("time-embedding")
def time_embedding(case: Case) -> Iterator[Comparison]:
    embedding = sinusoid(torch.tensor(case.config["t"]), case.config["dim"])
    yield Comparison.within("exact", embedding, case.expected("exact"), case.tolerance)
    apart = case.spec["cross_check"]["max_abs_diff"] + case.tolerance["atol"]
    yield Comparison("float32_variant", embedding, case.expected("float32_variant"), atol=apart)


def sampler(name: str, case: Case) -> Iterator[Comparison]:
    """Tables of every stated number of steps and shift, and whole runs with a velocity in closed form."""
    (start,) = (case.input(name) for name in case.spec["inputs"])
    for expected_name in case.expected_names():
        what, steps, shift = expected_name.split("_")
        solver = make_solver(name, int(steps), float(shift))
        expected = case.expected(expected_name)
        if what == "timesteps":
            yield Comparison("dtype of " + expected_name, solver.timesteps.dtype, expected.dtype)
            yield Comparison(expected_name, solver.timesteps, expected)
        elif what == "sigmas":
            yield Comparison.within(expected_name, solver.sigmas, expected, case.tolerance)
        else:
            yield Comparison.within(expected_name, trajectory(solver, start), expected, case.tolerance)


def trajectory(solver: Solver, start: Tensor) -> Tensor:
    """Start and state after every step with the velocity 0.3 x + sin(t / 100), [steps + 1, ...]."""
    state = solver.start(start)
    states = [state.latents]
    for timestep in solver.timesteps:
        state = solver.step(state, 0.3 * state.latents + math.sin(float(timestep) / 100))
        states.append(state.latents)
    return torch.stack(states)


family("sampler-unipc")(partial(sampler, "unipc"))
family("sampler-dpmpp")(partial(sampler, "dpm++"))
family("sampler-euler")(partial(sampler, "euler"))


@family("e2e-t2v", on_any_device=True)
def text_to_video_loop(case: Case) -> Iterator[Comparison]:
    call = case.call
    boundary = call.get("boundary")
    if boundary is None:
        (guidance_scale,) = guidance_scales(case)
        experts = [Expert(transformer_of(case), guidance_scale)]
    else:
        guidance = dict(zip(call["guide_order"].strip("[]").split(", "), guidance_scales(case), strict=True))
        experts = [
            Expert(transformer_of(case, "high_noise_model."), guidance["high"], boundary * 1000),
            Expert(transformer_of(case, "low_noise_model."), guidance["low"]),
        ]
    noise = case.input("noise")[None]
    conditioning = text_to_video(noise.shape[2:], experts[0].model.config.head_dim, case.device)
    prompt = Prompt(case.input("context")[None], case.input("context_null")[None])
    solver = solver_of(case)
    velocities = recorded_velocities(solver)
    states = [state.latents for state in denoise(experts, solver, solver.start(noise), conditioning, prompt)]
    yield Comparison("timesteps", solver.timesteps, case.expected("timesteps"))
    yield Comparison.within("states", torch.cat([noise, *states]), case.expected("states"), case.tolerance)
    yield Comparison.within("velocity", torch.cat(velocities), case.expected("velocity"), case.tolerance)


@family("e2e-scail", on_any_device=True)
def animation_loop(case: Case) -> Iterator[Comparison]:
    model = transformer_of(case)
    noise = case.input("noise")
    conditioning = scail_conditioning(case, model, case.input("ref_latents"), history_of(case, noise))
    yield from stored_conditioning(case, conditioning)
    prompt = Prompt(case.input("context")[None], case.input("context_null")[None], case.input("clip_fea"))
    solver = solver_of(case)
    (guidance_scale,) = guidance_scales(case)
    experts = [Expert(model, guidance_scale)]
    states = [state.latents for state in denoise(experts, solver, solver.start(noise), conditioning, prompt)]
    yield Comparison("timesteps", solver.timesteps, case.expected("timesteps"))
    yield Comparison.within("states", torch.stack(states), case.expected("states"), case.tolerance)
    yield Comparison.within("final", conditioning.result(states[-1]), case.expected("final"), case.tolerance)


def history_of(case: Case, noise: Tensor) -> Tensor:
    """The latents that begin with the given frames: the one input that is not named after its part in the first window."""
    first_window = {"noise", "ref_latents", "pose_latents", "clip_fea", "context", "context_null", "y_mask"}
    stored = {name.removeprefix("in.") for name in case.stored if name.startswith("in.")}
    others = sorted((set(case.spec["inputs"]) | stored) - first_window)
    return case.input(others[0]) if others else noise[:, :, 1:]


def guidance_scales(case: Case) -> list[float]:
    stated = case.call["guide_scale"]
    return stated if isinstance(stated, list) else [stated]


def solver_of(case: Case) -> Solver:
    return make_solver(case.call.get("solver", "unipc"), case.call["steps"], case.call["shift"])


def recorded_velocities(solver: Solver) -> list[Tensor]:
    """A list that every later step adds its velocity to."""
    velocities: list[Tensor] = []
    step = solver.step

    def recording(state: Any, velocity: Tensor) -> Any:
        velocities.append(velocity)
        return step(state, velocity)

    solver.step = recording  # type: ignore[method-assign]  # the loop gives the velocity to nobody else
    return velocities


@family("quanto-int8")
def quantized_checkpoint(case: Case) -> Iterator[Comparison]:
    path = case.directory / case.spec["file"]
    tensors, metadata = load_file(path), read_metadata(path)
    modules = check_quantization(tensors, [metadata])
    yield Comparison("modules", modules, set(case.spec["quantised_modules"]))
    yield Comparison("metadata", sorted(metadata), sorted(case.spec["metadata_keys"]))
    dtype = getattr(torch, case.spec["dtype"].removeprefix("torch."))
    for name in case.expected_names():
        module, _, what = name.rpartition(".")
        yield compared_linear(case, tensors, module, what, dtype)
    if "weights_before" in case.spec:
        before = {n: recipe_weight(n, shape).to(dtype) for n, shape in case.spec["weights_before"]["shapes"]}
        yield from requantized(quantize_state_dict(before, modules), tensors)


def compared_linear(case: Case, tensors: dict[str, Tensor], module: str, what: str, dtype: torch.dtype) -> Comparison:
    """One stored value of one quantised linear."""
    name, expected = f"{module}.{what}", case.expected(f"{module}.{what}")
    linear = int8_linear(tensors, module, torch.float32 if what == "out32" else dtype)
    if what == "dequantised":
        return Comparison(name, linear.weight(), expected)
    actual = linear(case.input(f"x:{module}").to(dtype))
    if what == "out32":
        return Comparison(name, actual, expected, atol=case.tolerance["out32"])
    # The library scales the products, we the weights: where products cancel only the last place of the largest counts.
    last_place = torch.finfo(dtype).eps * 2 ** math.floor(math.log2(float(expected.abs().max())))
    allowed = int(case.tolerance["out_library"].split()[0])  # "2 units in the last place of the model dtype"
    return Comparison(name, actual, expected, atol=allowed * last_place)


def int8_linear(tensors: dict[str, Tensor], module: str, dtype: torch.dtype) -> Int8Linear:
    data = tensors[module + DATA]
    linear = build_on_meta(lambda: Int8Linear(data.shape[1], data.shape[0], bias=f"{module}.bias" in tensors))
    state = {"weight._data": data, "weight._scale": tensors[module + SCALE].to(dtype)}
    if f"{module}.bias" in tensors:
        state["bias"] = tensors[f"{module}.bias"].to(dtype)
    load_weights(linear, state, source=module)
    return linear


def requantized(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[Comparison]:
    """Our quantiser's file beside theirs: names, dtypes, shapes and every number."""
    yield Comparison("names", sorted(ours), sorted(theirs))
    for name in sorted(ours.keys() & theirs.keys()):
        layout = (ours[name].dtype, tuple(ours[name].shape))
        if layout != (expected := (theirs[name].dtype, tuple(theirs[name].shape))):
            yield Comparison(f"layout of {name}", layout, expected)
    differing = [name for name in sorted(ours.keys() & theirs.keys()) if not torch.equal(ours[name], theirs[name])]
    yield Comparison("tensors that differ", differing, [])


def map_onto(preset: str) -> Callable[[dict[str, tuple[int, ...]]], list[str]]:
    return lambda shapes: checkpoint_problems(PRESETS[preset], shapes)


manifest("Wan2.1-I2V-14B")(map_onto("wan2.1-i2v-14b"))
manifest("Wan2.2-I2V-A14B")(map_onto("wan2.2-i2v-a14b"))
manifest("Wan2.2-T2V-A14B")(map_onto("wan2.2-t2v-a14b"))
manifest("Wan2.2-TI2V-5B")(map_onto("wan2.2-ti2v-5b"))
manifest("wan2.1_scail_preview_14B_bf16.safetensors", "wan2.1_scail_preview_14B_quanto_bf16_int8.safetensors")(
    map_onto("scail-14b")
)
