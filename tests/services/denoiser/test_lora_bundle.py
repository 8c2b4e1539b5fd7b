"""A bundle that names LoRAs: from bundle.toml through the real service to latents, status, revision and checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bunraku.errors import WrongState
from bunraku.v1 import denoiser_pb2 as pb
from runtime.bundles import Bundle, BundleError, configuration, load_bundle
from runtime.fingerprint import fingerprint
from runtime.weights import CheckpointMismatch, build_on_meta
from services.denoiser.model import PRESETS, DiffusionTransformer, TransformerConfig
from services.denoiser.quantisation import block_linears
from services.denoiser.service import DenoiserService
from services.denoiser.weights import load_transformer
from tests.services.denoiser.test_service import (
    CONDITIONING,
    Blocks,
    checkpoints,
    latents,
    resume,
    run,
    stage,
    tightest,
    wired,
    without,
)
from tests.services.denoiser.tiny import normal
from tests.services.serving import serving, write_bundle
from training.random_bundle import random_tensors, shapes_of

LAYERS = 4
ENTRY = """
[[components.transformer.loras]]
file = "loras/one.safetensors"
multiplier = {multiplier}
"""


def few_steps(directory: Path, multiplier: float = 0.5, seed: int = 1) -> Bundle:
    """The bundle of a directory with a LoRA of all linears of the blocks, and settings of few steps."""
    if not (directory / "bundle.toml").exists():
        write_bundle(directory, num_layers=LAYERS)
    path = directory / "bundle.toml"
    text = path.read_text().partition("\n[[components")[0]
    for old, new in (
        ("num_inference_steps = 4", "num_inference_steps = 3"),
        ("guidance_scale = 2", "guidance_scale = 1"),
        ('solver = "dpm++"', 'solver = "unipc"'),
    ):
        text = text.replace(old, new)
    path.write_text(text + ENTRY.format(multiplier=multiplier))
    bundle = load_bundle(directory)
    write_lora(bundle, seed)
    return bundle


def write_lora(bundle: Bundle, seed: int) -> None:
    component = bundle.component("transformer")
    config = configuration(component, PRESETS, TransformerConfig)
    model = build_on_meta(lambda: DiffusionTransformer(config))
    tensors = {
        "diffusion_model.patch_embedding.diff": torch.ones(config.dim, 36, 1, 2, 2),
        "diffusion_model.patch_embedding.diff_b": torch.ones(config.dim),
    }
    for number, name in enumerate(block_linears(model)):
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        tensors[f"diffusion_model.{name}.lora_down.weight"] = normal(4, in_features, seed=seed + number) / 8
        tensors[f"diffusion_model.{name}.lora_up.weight"] = normal(out_features, 4, seed=-seed - number) / 8
        tensors[f"diffusion_model.{name}.diff_b"] = normal(out_features, seed=number) / 16
    [lora] = component.loras
    lora.file.parent.mkdir(exist_ok=True)
    save_file(tensors, lora.file)


async def test_a_lora_of_the_bundle_is_what_the_stage_computes_with_and_tells_of(tmp_path: Path) -> None:
    bundle = few_steps(tmp_path)
    plain = load_bundle(write_plain(tmp_path))
    async with stage(plain) as denoiser:
        other = latents(await run(denoiser, guidance_scale=1))
        [component] = (await denoiser.status()).components
        assert component.dtype == "float32+int8"
    async with stage(bundle) as denoiser:
        blocks = Blocks(denoiser.service)
        answers = await run(denoiser, without("negative_prompt_embeds"))
        [component] = (await denoiser.status()).components
        assert component.loras == ["one.safetensors x 0.5"]
    [plan] = answers.messages("plan")
    assert (plan.num_inference_steps, plan.guidance_scale, plan.solver) == (3, 1, pb.SOLVER_UNIPC)
    passes = plan.forward_passes
    assert (passes.computed, passes.reused, passes.omitted) == (3, 0, 0)  # one branch a step
    assert blocks.ran == LAYERS * 3
    assert float((latents(answers) - other).norm() / other.norm()) > 0.01


def write_plain(directory: Path) -> Path:
    """The same bundle without the LoRA, beside it."""
    plain = directory / "plain"
    plain.mkdir()
    (plain / "bundle.toml").write_text((directory / "bundle.toml").read_text().partition("\n[[components")[0])
    (plain / "transformer.safetensors").symlink_to(directory / "transformer.safetensors")
    return plain


@pytest.mark.parametrize(("precision", "floats"), [("exact", False), ("balanced", False), ("exact", True)])
async def test_hybrid_computes_with_the_lora_what_gpu_only_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, floats: bool
) -> None:
    bundle = few_steps(tmp_path)
    folders: list[Path | None] = []

    def noted(*given: Any, folder: Path | None, **more: Any) -> DiffusionTransformer:
        folders.append(folder)
        return load_transformer(*given, folder=folder, **more)

    monkeypatch.setattr("services.denoiser.service.load_transformer", noted)
    if floats:
        write_floats(bundle)
    async with serving("denoiser", partial(DenoiserService, precision=precision), bundle) as whole:
        expected = latents(await run(whole))
    folder = tmp_path / "offload"
    folder.mkdir()
    for offload_folder in (None, folder):
        make = partial(
            DenoiserService,
            precision=precision,
            memory_mode="hybrid",
            vram_bytes=tightest(bundle),
            offload_folder=offload_folder,
        )
        async with serving("denoiser", make, bundle) as hybrid:
            assert hybrid.service._placement.plan.resident == 0
            for _ in range(2):
                torch.testing.assert_close(latents(await run(hybrid)), expected, rtol=1e-4, atol=1e-4)
    assert folders == [None, None, folder]


def write_floats(bundle: Bundle) -> None:
    """The transformer's weights in bfloat16, none of them quantised."""
    component = bundle.component("transformer")
    config = configuration(component, PRESETS, TransformerConfig)
    shapes = shapes_of(build_on_meta(lambda: DiffusionTransformer(config)))
    save_file(random_tensors(shapes, torch.bfloat16), component.files[0])


async def test_another_lora_under_the_same_name_is_another_stage_and_another_run(tmp_path: Path) -> None:
    bundle = few_steps(tmp_path)
    before = fingerprint(bundle.component("transformer"))
    async with stage(bundle) as denoiser:
        [stored, *_] = checkpoints(await run(denoiser, checkpoint_every_steps=1))
        revision = denoiser.runtime.revision
    write_lora(bundle, seed=5)
    assert fingerprint(bundle.component("transformer")) != before
    async with stage(bundle) as denoiser:
        assert denoiser.runtime.revision != revision
        with pytest.raises(WrongState, match="its parameters, inputs or weights differ"):
            await resume(denoiser, stored)
    write_lora(bundle, seed=1)
    async with stage(bundle) as denoiser:
        assert denoiser.runtime.revision == revision
        resumed = await resume(denoiser, stored)
        assert torch.equal(latents(resumed), latents(await run(denoiser, wired(CONDITIONING))))


def test_another_multiplier_is_another_revision_of_the_bundle(tmp_path: Path) -> None:
    half, whole = few_steps(tmp_path, 0.5), few_steps(tmp_path, 1.0)
    assert half.revision != whole.revision
    assert [str(lora) for lora in whole.component("transformer").loras] == ["one.safetensors x 1"]


async def test_a_lora_that_is_not_there_or_does_not_fit_keeps_the_stage_from_loading(tmp_path: Path) -> None:
    bundle = few_steps(tmp_path)
    [lora] = bundle.component("transformer").loras
    save_file({"blocks.0.self_attn.q.diff": torch.zeros(3, 3)}, lora.file)
    with pytest.raises(CheckpointMismatch, match=r"one\.safetensors .* 1 of another shape \(blocks\.0\.self_attn\.q"):
        async with stage(bundle):
            pass
    lora.file.unlink()
    with pytest.raises(BundleError, match=r"transformer: not there: .*loras/one\.safetensors"):
        async with stage(bundle):
            pass
