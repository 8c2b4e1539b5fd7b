"""LoRAs in all their spellings change the weights as they would change each layer's output; misfits are refused by name."""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime import offload
from runtime.bundles import Lora
from runtime.mapped import MappedPages
from runtime.weights import CheckpointMismatch
from services.denoiser import lora as lora_module
from services.denoiser.lora import Changes, Difference, Product, read_loras
from services.denoiser.model import DiffusionTransformer, Linear, TransformerConfig
from services.denoiser.quantisation import (
    DATA,
    SCALE,
    Int8Linear,
    block_linears,
    quantize_state_dict,
    quantize_weight,
    write_quanto,
)
from services.denoiser.weights import load_transformer
from tests.services.denoiser.tiny import SCAIL, normal, predict_animation, transformer

CPU = torch.device("cpu")
I2V = replace(SCAIL, pose=False)
RANK, MULTIPLIER = 4, 0.7
Q, FFN = "blocks.0.self_attn.q", "blocks.1.ffn.2"
Q_SHAPE, FFN_SHAPE = (48, 48), (48, 64)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file(transformer(SCAIL).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def int8_checkpoint(tmp_path: Path) -> Path:
    model = transformer(SCAIL)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    modules = block_linears(model)
    write_quanto(tmp_path / "int8.safetensors", quantize_state_dict(state, modules), modules, {})
    return tmp_path / "int8.safetensors"


def load(path: Path, *loras: Lora, device: torch.device = CPU) -> DiffusionTransformer:
    return load_transformer([path], SCAIL, device=device, compute_dtype=torch.float32, loras=loras)


def written(
    directory: Path, tensors: Mapping[str, Tensor], multiplier: float = 1.0, name: str = "lora", header: str = ""
) -> Lora:
    file = directory / f"{name}.safetensors"
    metadata = {"lora_adapter_metadata": header} if header else None
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
    return Lora(file, multiplier)


def factors(module: str, shape: tuple[int, ...], seed: int = 1, rank: int = RANK) -> dict[str, Tensor]:
    """B A is about as large as the weights of the tiny model, and no row or column of it is like another."""
    return {
        f"{module}.lora_A.weight": normal(rank, *shape[1:], seed=seed) / 8,
        f"{module}.lora_B.weight": normal(shape[0], rank, seed=seed + 1) / 8,
    }


def of_all_linears(alpha: float | None = None) -> dict[str, Tensor]:
    """A LoRA of every linear but the head, under plain released names."""
    tensors: dict[str, Tensor] = {}
    modules = [(name, each) for name, each in transformer(SCAIL).named_modules() if isinstance(each, Linear)]
    for number, (name, module) in enumerate(modules):
        tensors |= factors(name, tuple(module.weight.shape), seed=2 * number)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def added_on_the_fly(model: DiffusionTransformer, tensors: Mapping[str, Tensor], scale: float) -> DiffusionTransformer:
    """The model with scale * (x A^T) B^T added to what each linear gives, as the methods that do not merge have it."""

    def add(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, given, output: output + scale * F.linear(F.linear(given[0], down), up)

    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            module.register_forward_hook(add(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]))
    return model


def product(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    return tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double()


def dequantised(linear: nn.Module) -> Tensor:
    assert isinstance(linear, Int8Linear)
    return linear.weight._data.double() * linear.weight._scale.double()


@pytest.mark.parametrize(("alpha", "part"), [(None, 1.0), (1.0, 1 / RANK), (8.0, 2.0)])
def test_a_merged_lora_predicts_what_one_beside_each_layer_does(
    checkpoint: Path, tmp_path: Path, alpha: float | None, part: float
) -> None:
    tensors = of_all_linears(alpha)
    merged = predict_animation(load(checkpoint, written(tmp_path, tensors, MULTIPLIER)))
    beside = predict_animation(added_on_the_fly(transformer(SCAIL), tensors, MULTIPLIER * part))
    torch.testing.assert_close(merged, beside, rtol=1e-5, atol=1e-5)
    assert float((merged - predict_animation(transformer(SCAIL))).norm() / merged.norm()) > 0.05


def test_int8_weights_are_quantised_again_to_within_half_a_step(int8_checkpoint: Path, tmp_path: Path) -> None:
    tensors = of_all_linears()
    before, after = load(int8_checkpoint), load(int8_checkpoint, written(tmp_path, tensors, MULTIPLIER))
    changed = block_linears(transformer(SCAIL))
    assert len(changed) == 2 * 12
    for name in changed:
        linear = after.get_submodule(name)
        wanted = dequantised(before.get_submodule(name)) + MULTIPLIER * product(tensors, name)
        error = (dequantised(linear) - wanted).abs()
        assert isinstance(linear, Int8Linear)
        assert linear.weight._data.dtype == torch.int8
        scale = linear.weight._scale
        assert bool((error <= scale.double() * 0.5001).all()), name
        assert torch.equal(scale, scale.bfloat16().float()), name  # the dtype that the file has it in
        largest = linear.weight._data.abs().amax(dim=1)
        assert 120 <= int(largest.min()) <= int(largest.max()) <= 126  # the range is used but for the offset


@pytest.mark.parametrize("steps", [0.1, 0.3, 1, 3])
@pytest.mark.parametrize("tails", [100, 4])
def test_a_lora_that_is_smaller_than_a_step_is_not_rounded_away(steps: float, tails: int) -> None:
    weight = normal(64, 2048, seed=1) / normal(tails, 64, 2048, seed=2).square().mean(0).sqrt()
    data, scale = quantize_weight(weight.bfloat16())
    up, down = normal(64, 8, seed=3), normal(8, 2048, seed=4)
    added = up @ down
    part = float(steps * scale.float().mean() / added.square().mean().sqrt())  # so many steps
    tensors = {f"{Q}{DATA}": data, f"{Q}{SCALE}": scale}
    merged = Changes({f"{Q}.weight": [Product(up, down, part)]}).merged(f"{Q}{DATA}", tensors)
    before, after = (each[f"{Q}{DATA}"].float() * each[f"{Q}{SCALE}"].float() for each in (tensors, merged))
    arrived = float(((after - before) * added).sum() / (part * added.square().sum()))
    assert 0.95 < arrived < 1.05  # of the LoRA; with the smallest scales 0.03 to 0.8 where it is below a step
    assert float((merged[f"{Q}{SCALE}"] / scale).float().mean()) < 1.1 * (1 + 0.1 * (steps == 3))


def test_rows_of_zeros_and_rows_that_one_number_dominates_keep_what_they_are() -> None:
    weight = torch.zeros(3, 4096)
    weight[1, 5], weight[2] = 3.0, 0.5
    data, scale = quantize_weight(weight.bfloat16())
    tensors = {f"{Q}{DATA}": data, f"{Q}{SCALE}": scale}
    nothing = Changes({f"{Q}.weight": [Difference(torch.zeros(3, 4096), 1.0)]}).merged(f"{Q}{DATA}", tensors)
    found = nothing[f"{Q}{DATA}"].float() * nothing[f"{Q}{SCALE}"].float()
    torch.testing.assert_close(found, weight, rtol=0.01, atol=0)
    assert float(nothing[f"{Q}{SCALE}"][1] / scale[1]) == pytest.approx(1.25, abs=0.01)


def test_int8_weights_without_a_lora_stay_the_bytes_of_the_file(int8_checkpoint: Path, tmp_path: Path) -> None:
    before, after = load(int8_checkpoint), load(int8_checkpoint, written(tmp_path, factors(Q, Q_SHAPE)))
    differing = {
        name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])
    }
    assert differing == {Q + DATA, Q + SCALE}
    mapped = {name for name, tensor in after.state_dict().items() if MappedPages([tensor])._spans}
    assert FFN + DATA in mapped
    assert Q + DATA not in mapped
    # pages of its own, which the system gets back as soon as the weights are elsewhere
    assert after.get_buffer(Q + DATA).data_ptr() % mmap.PAGESIZE == 0


def test_pages_of_large_changed_weights_are_dropped(
    int8_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(lora_module, "_LARGE_BYTES", 48 * 64)
    monkeypatch.setattr(MappedPages, "drop", lambda pages: dropped.append(sum(s.end - s.start for s in pages._spans)))
    load(int8_checkpoint, written(tmp_path, factors(Q, Q_SHAPE) | factors(FFN, FFN_SHAPE, seed=5)))
    assert dropped == [48 * 64]


@pytest.mark.parametrize("quantised", [True, False])
def test_with_a_folder_large_changed_weights_are_in_files_there(
    checkpoint: Path, int8_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    folder, name = tmp_path / "offload", Q + (DATA if quantised else ".weight")
    folder.mkdir()
    monkeypatch.setattr(offload, "_LARGE_BYTES", 48 * 48)
    file, lora = int8_checkpoint if quantised else checkpoint, written(tmp_path, factors(Q, Q_SHAPE), MULTIPLIER)
    model = load_transformer([file], SCAIL, device=CPU, compute_dtype=torch.float32, loras=[lora], folder=folder)
    for part, tensor in load(file, lora).state_dict().items():
        assert torch.equal(model.state_dict()[part], tensor), part
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    there = [[int(end, 16) for end in line[0].split("-")] for line in maps if len(line) == 6 and str(folder) in line[5]]
    inside = {
        part
        for part, tensor in model.state_dict().items()
        if any(start <= tensor.data_ptr() < end for start, end in there)
    }
    assert inside == {name}
    assert not list(folder.iterdir())


@pytest.mark.parametrize("at_once", [1, 100, 1000])
def test_in_how_many_pieces_a_weight_is_changed_does_not_matter(
    int8_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    lora = written(tmp_path, of_all_linears() | {f"{FFN}.diff": normal(*FFN_SHAPE, seed=9)}, MULTIPLIER)
    whole = predict_animation(load(int8_checkpoint, lora))
    monkeypatch.setattr(lora_module, "_NUMBERS_AT_ONCE", at_once)
    torch.testing.assert_close(predict_animation(load(int8_checkpoint, lora)), whole, rtol=1e-4, atol=1e-4)


def test_several_loras_are_added_up_before_weights_are_quantised_again(int8_checkpoint: Path, tmp_path: Path) -> None:
    large = {name: 10 * tensor for name, tensor in factors(Q, Q_SHAPE).items()}
    there, back = written(tmp_path, large, 1.0, "there"), written(tmp_path, large, -1.0, "back")
    small = factors(Q, Q_SHAPE, seed=7)
    together = load(int8_checkpoint, there, written(tmp_path, small, MULTIPLIER, "small"), back)
    alone = load(int8_checkpoint, written(tmp_path, small, MULTIPLIER, "small"))
    found, expected = (model.get_buffer(Q + DATA).int() for model in (together, alone))
    assert int((found - expected).abs().max()) <= 1
    assert float((found != expected).float().mean()) < 0.01  # float32 rounds what cancels
    assert int((found - load(int8_checkpoint).get_buffer(Q + DATA)).abs().max()) > 10


def test_a_multiplier_of_0_changes_nothing_but_has_to_fit(int8_checkpoint: Path, tmp_path: Path) -> None:
    before = load(int8_checkpoint).state_dict()
    after = load(int8_checkpoint, written(tmp_path, of_all_linears(), 0)).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(CheckpointMismatch, match=r"1 unknown \(blocks\.7\.diff_m\)"):
        load(int8_checkpoint, written(tmp_path, {"blocks.7.diff_m": torch.zeros(1)}, 0))


DIFFERENCES = {
    "blocks.0.norm3.diff": "blocks.0.norm3.weight",
    "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
    "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
    "blocks.1.cross_attn.norm_k_img.diff": "blocks.1.cross_attn.norm_k_img.weight",
    f"{FFN}.diff": f"{FFN}.weight",
    f"{FFN}.diff_b": f"{FFN}.bias",
    "blocks.0.diff_m": "blocks.0.modulation",
    "blocks.1.modulation.diff": "blocks.1.modulation",
    "head.diff_m": "head.modulation",
    "head.head.diff": "head.head.weight",
    "head.head.diff_b": "head.head.bias",
    "img_emb.proj.4.diff": "img_emb.proj.4.weight",
    "patch_embedding.diff": "patch_embedding.weight",
    "patch_embedding.diff_b": "patch_embedding.bias",
}


def test_whole_differences_are_added_to_weights_biases_and_modulation(checkpoint: Path, tmp_path: Path) -> None:
    before = transformer(SCAIL).state_dict()
    tensors = {
        f"diffusion_model.{key}": normal(*before[name].shape, seed=number)
        for number, (key, name) in enumerate(DIFFERENCES.items())
    }
    after = load(checkpoint, written(tmp_path, tensors | factors(Q, Q_SHAPE), MULTIPLIER)).state_dict()
    for key, name in DIFFERENCES.items():
        torch.testing.assert_close(after[name], before[name] + MULTIPLIER * tensors[f"diffusion_model.{key}"], msg=name)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {*DIFFERENCES.values(), f"{Q}.weight"}


def test_alpha_does_not_scale_whole_differences(checkpoint: Path, tmp_path: Path) -> None:
    difference = normal(*Q_SHAPE, seed=9)
    tensors = factors(Q, Q_SHAPE) | {f"{Q}.diff": difference, f"{Q}.alpha": torch.tensor(2 * RANK)}
    after = load(checkpoint, written(tmp_path, tensors, MULTIPLIER)).get_parameter(f"{Q}.weight")
    expected = transformer(SCAIL).get_parameter(f"{Q}.weight") + MULTIPLIER * (2 * product(tensors, Q) + difference)
    torch.testing.assert_close(after, expected.float())


def test_convolutions_have_loras_with_the_axes_of_their_kernel(checkpoint: Path, tmp_path: Path) -> None:
    down, up = normal(RANK, 20, 1, 2, 2, seed=1), normal(48, RANK, 1, 1, 1, seed=2)
    for name, factor in (("plain", up.flatten(1)), ("with axes", up)):
        tensors = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": factor}
        after = load(checkpoint, written(tmp_path, tensors, MULTIPLIER, name)).get_parameter("patch_embedding.weight")
        added = torch.einsum("or,rcthw->octhw", up.flatten(1), down)
        expected = transformer(SCAIL).get_parameter("patch_embedding.weight") + MULTIPLIER * added
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def renamed(key: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key


KOHYA_MODULES = {name.replace(".", "_"): name for name, _ in transformer(SCAIL).named_modules()}
DIFFUSERS = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("self_attn.o.", "attn1.to_out.0."),
    ("cross_attn.o.", "attn2.to_out.0."),
    ("cross_attn.k_img.", "attn2.add_k_proj."),
    ("cross_attn.v_img.", "attn2.add_v_proj."),
    ("self_attn.", "attn1.to_"),
    ("cross_attn.", "attn2.to_"),
    ("attn1.to_to_out", "attn1.to_out"),
    ("ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.net.2."),
)
DOWN_AND_UP = (("lora_A", "lora_down"), ("lora_B", "lora_up"))


def kohya(key: str, prefix: str = "lora_unet_") -> str:
    module, dot, part = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
    return prefix + module.replace(".", "_") + renamed(dot + part, *DOWN_AND_UP)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as released": lambda key: key,
    "ComfyUI": lambda key: f"diffusion_model.{key}",
    "LightX2V": lambda key: f"diffusion_model.{renamed(key, *DOWN_AND_UP)}",
    "checkpoint prefix": lambda key: f"model.diffusion_model.{key}",
    "diffusers": lambda key: f"transformer.{renamed(key, *DIFFUSERS)}",
    "diffusers without prefix": lambda key: renamed(key, *DIFFUSERS),
    "PEFT": lambda key: f"base_model.model.{key}",
    "DiffSynth": lambda key: f"pipe.dit.{renamed(key, ('.weight', '.default.weight'))}",
    "kohya": kohya,
    "kohya, two underscores": lambda key: kohya(key, "lora_unet__"),
    "LyCORIS": lambda key: kohya(key, "lycoris_"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(checkpoint: Path, tmp_path: Path, spelling: str) -> None:
    tensors = of_all_linears(alpha=2.0)
    spelled = {SPELLINGS[spelling](key): tensor for key, tensor in tensors.items()}
    assert (spelled.keys() == tensors.keys()) == (spelling == "as released")
    expected = load(checkpoint, written(tmp_path, tensors, MULTIPLIER, "plain")).state_dict()
    found = load(checkpoint, written(tmp_path, spelled, MULTIPLIER, "spelled")).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_norm2_of_diffusers_is_the_norm_before_cross_attention(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {"transformer.blocks.0.norm2.diff": normal(48, seed=3)}
    tensors |= {f"transformer.{renamed(key, *DIFFUSERS)}": each for key, each in factors(Q, Q_SHAPE).items()}
    after = load(checkpoint, written(tmp_path, tensors)).get_parameter("blocks.0.norm3.weight")
    torch.testing.assert_close(after, 1 + normal(48, seed=3))


def test_the_alpha_of_a_header_is_that_of_all_layers_without_one(checkpoint: Path, tmp_path: Path) -> None:
    tensors = factors(Q, Q_SHAPE) | factors(FFN, FFN_SHAPE, seed=5) | {f"{FFN}.alpha": torch.tensor(float(RANK))}
    header = json.dumps({"transformer.lora_alpha": 3 * RANK, "transformer.r": RANK, "transformer.alpha_pattern": {}})
    after = load(checkpoint, written(tmp_path, tensors, MULTIPLIER, header=header))
    for module, part in ((Q, 3), (FFN, 1)):
        expected = transformer(SCAIL).get_parameter(f"{module}.weight") + MULTIPLIER * part * product(tensors, module)
        torch.testing.assert_close(after.get_parameter(f"{module}.weight"), expected.float())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"transformer.use_rslora": true}', "the header asks for use_rslora, which is not supported"),
        ('{"lora_alpha": 4, "alpha_pattern": {"q": 8}}', "the header asks for alpha_pattern"),
        ('{"lora_alpha": "much"}', "lora_adapter_metadata cannot be read"),
        ("[1]", "lora_adapter_metadata cannot be read"),
        ("{", "lora_adapter_metadata cannot be read"),
    ],
)
def test_a_header_that_asks_for_what_is_not_done_is_refused(
    checkpoint: Path, tmp_path: Path, header: str, message: str
) -> None:
    with pytest.raises(CheckpointMismatch, match=rf"lora\.safetensors: .*{message}"):
        load(checkpoint, written(tmp_path, factors(Q, Q_SHAPE), header=header))


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown module": (factors("blocks.9.self_attn.q", Q_SHAPE), r"2 unknown \(blocks\.9\.self_attn\.q\.lora_A"),
    "unknown kind": ({f"{Q}.lokr_w1": torch.zeros(2, 2)}, r"1 unknown \(blocks\.0\.self_attn\.q\.lokr_w1\)"),
    "DoRA": ({f"{Q}.dora_scale": torch.zeros(48, 1)}, r"1 unknown \(blocks\.0\.self_attn\.q\.dora_scale\)"),
    "no bias": ({"blocks.0.self_attn.norm_q.diff_b": torch.zeros(48)}, r"1 unknown \(.*norm_q\.diff_b\)"),
    "no part": ({"lora_te_layer": torch.zeros(1)}, r"1 unknown \(lora_te_layer\)"),
    "kohya module": ({"lora_unet_blocks_0_self_attn_x.diff": torch.zeros(1)}, r"1 unknown \(lora_unet_blocks_0_self"),
    "wrong shape": (
        factors(FFN, (48, 48)),
        r"1 of another shape \(blocks\.1\.ffn\.2\.lora_B\.weight \[48, 4\] times \[4, 48\] instead of \[48, 64\]\)",
    ),
    "two ranks": (
        {f"{Q}.lora_A.weight": torch.zeros(4, 48), f"{Q}.lora_B.weight": torch.zeros(48, 8)},
        r"1 of another shape \(blocks\.0\.self_attn\.q\.lora_B\.weight \[48, 8\] times \[4, 48\]",
    ),
    "no rank": (
        {f"{Q}.lora_A.weight": torch.zeros(0, 48), f"{Q}.lora_B.weight": torch.zeros(48, 0)},
        r"1 of another shape",
    ),
    "difference": (
        {"blocks.0.diff_m": torch.zeros(6, 48)},
        r"1 of another shape \(blocks\.0\.diff_m \[6, 48\] instead of \[1, 6, 48\]\)",
    ),
    "alpha of many": (
        factors(Q, Q_SHAPE) | {f"{Q}.alpha": torch.zeros(2)},
        r"1 of another shape \(blocks\.0\.self_attn\.q\.alpha \[2\] instead of one number\)",
    ),
    "up alone": (
        {f"{Q}.lora_B.weight": torch.zeros(48, 4), f"{Q}.alpha": torch.tensor(1.0)},
        r"2 without their other half \(blocks\.0\.self_attn\.q\.alpha, blocks\.0\.self_attn\.q\.lora_B\.weight\)",
    ),
    "down alone": ({f"{Q}.lora_A.weight": torch.zeros(4, 48)}, r"1 without their other half \(.*lora_A"),
    "twice": (
        {f"{Q}.diff": torch.zeros(Q_SHAPE), f"diffusion_model.{Q}.diff": torch.zeros(Q_SHAPE)},
        r"1 under two names \(.*blocks\.0\.self_attn\.q\.diff\)",
    ),
    "not finite": ({f"{Q}.diff": torch.full(Q_SHAPE, torch.nan)}, r"1 not finite floats \(.*\.q\.diff\)"),
    "not floats": ({f"{Q}.diff": torch.zeros(Q_SHAPE, dtype=torch.int8)}, r"1 not finite floats \(.*\.q\.diff\)"),
    "nothing": ({}, r"lora\.safetensors holds nothing that could be added"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_moved(
    int8_checkpoint: Path, tmp_path: Path, case: str
) -> None:
    tensors, message = REFUSED[case]
    fits = written(tmp_path, factors(Q, Q_SHAPE), name="fits")
    # a machine without a GPU would fail with the first tensor that goes there
    with pytest.raises(CheckpointMismatch, match=message):
        load(int8_checkpoint, fits, written(tmp_path, tensors), device=torch.device("cuda"))


def test_only_safetensors_are_read(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(factors(Q, Q_SHAPE), tmp_path / "lora.pth")
    with pytest.raises(CheckpointMismatch, match=r"lora\.pth: a LoRA ends in \.safetensors"):
        load(checkpoint, Lora(tmp_path / "lora.pth"))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load(checkpoint, Lora(tmp_path / "gone.safetensors"))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"<!doctype html>" * 99, b"", None])
def test_a_file_that_is_not_whole_is_named(checkpoint: Path, tmp_path: Path, content: bytes | None) -> None:
    lora = written(tmp_path, factors(Q, Q_SHAPE))
    lora.file.write_bytes(lora.file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(CheckpointMismatch, match=r"^lora\.safetensors is no whole safetensors file: "):
        load(checkpoint, lora)


OF_36_CHANNELS = {
    "diffusion_model.patch_embedding.diff": torch.ones(48, 36, 1, 2, 2),
    "diffusion_model.patch_embedding.diff_b": torch.ones(48),
}
FACTORS_OF_36_CHANNELS = {
    "patch_embedding.lora_down.weight": torch.ones(RANK, 36, 1, 2, 2),
    "patch_embedding.lora_up.weight": torch.ones(48, RANK),
    "patch_embedding.diff_b": torch.ones(48),
}
BIAS_ALONE = {"patch_embedding.diff_b": torch.ones(48)}


@pytest.mark.parametrize("other", [OF_36_CHANNELS, FACTORS_OF_36_CHANNELS, BIAS_ALONE], ids=["diff", "factors", "bias"])
def test_scail_leaves_out_the_patch_embedding_of_other_channels(
    checkpoint: Path, tmp_path: Path, other: dict[str, Tensor]
) -> None:
    before = transformer(SCAIL).state_dict()
    after = load(checkpoint, written(tmp_path, factors(Q, Q_SHAPE) | other)).state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{Q}.weight"}


def test_only_scail_leaves_it_out_and_only_patch_embeddings(tmp_path: Path) -> None:
    lora = written(tmp_path, factors(Q, Q_SHAPE) | OF_36_CHANNELS)
    with pytest.raises(
        CheckpointMismatch, match=r"1 of another shape \(diffusion_model\.patch_embedding\.diff \[48, 36"
    ):
        read_loras([lora], I2V, shapes_of(I2V))
    pose = {name.replace("patch_", "pose_patch_"): tensor for name, tensor in OF_36_CHANNELS.items()}
    with pytest.raises(CheckpointMismatch, match=r"pose_patch_embedding\.diff \[48, 36"):
        read_loras([written(tmp_path, pose)], SCAIL, shapes_of(SCAIL))


def shapes_of(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in transformer(config).state_dict().items()}


LINEARS = [name for name, module in transformer(SCAIL).named_modules() if isinstance(module, nn.Linear)]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(LINEARS), st.sampled_from(["ComfyUI", "LightX2V", "kohya"]), min_size=1))
def test_any_layers_in_any_mixture_of_spellings_are_those_that_change(chosen: dict[str, str]) -> None:
    state = transformer(SCAIL).state_dict()
    tensors = {
        SPELLINGS[spelling](key): tensor
        for module, spelling in chosen.items()
        for key, tensor in factors(module, tuple(state[f"{module}.weight"].shape)).items()
    }
    with tempfile.TemporaryDirectory() as directory:
        changes = read_loras([written(Path(directory), tensors)], SCAIL, shapes_of(SCAIL))
    changed = {name for name in state if changes.merged(name, state)[name] is not state[name]}
    assert changed == {f"{module}.weight" for module in chosen}


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1))
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    key = f"{name}.diff"
    with tempfile.TemporaryDirectory() as directory, pytest.raises(CheckpointMismatch) as refused:
        read_loras([written(Path(directory), {key: torch.zeros(1)})], SCAIL, shapes_of(SCAIL))
    assert key in str(refused.value)
