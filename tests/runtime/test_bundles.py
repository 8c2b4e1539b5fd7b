"""What bundle.toml may say, and what the bundles of this repository do say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bunraku.cli import app
from runtime.bundles import BundleError, Lora, load_bundle, require_files

BUNDLES = Path(__file__).parents[2] / "bundles"
TOML = """
name = "test"
task = "animate"
family = "scail"
description = ""
preset = "official"
[components.transformer]
files = ["model.safetensors"]
{loras}
[components.vae]
files = ["vae.pth"]
{other}
[sampling]
num_inference_steps = 4
guidance_scale = 1
shift = 7
solver = "unipc"
[video]
height = 64
width = 64
window_frames = 17
window_overlap_frames = 5
max_pixels = 4096
max_frames = 81
size_multiple = 32
frames_per_second = 16
[presets.official]
"""


def written(directory: Path, loras: str = "", other: str = "") -> Path:
    (directory / "bundle.toml").write_text(TOML.format(loras=loras, other=other))
    return directory


@pytest.mark.parametrize("name", sorted(path.parent.name for path in BUNDLES.glob("*/bundle.toml")))
def test_bundles_of_this_repository_can_be_read_and_planned(name: str) -> None:
    assert load_bundle(BUNDLES / name).name == name
    shown = CliRunner().invoke(app, ["plan", "--bundle", str(BUNDLES / name)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(name)


@pytest.mark.parametrize(
    ("name", "steps", "file"),
    [
        ("scail-14b-4-steps", 4, "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"),
        ("scail-14b-10-steps", 10, "Wan2.1_I2V_14B_FusionX_LoRA.safetensors"),
    ],
)
def test_few_step_bundles_are_the_released_one_with_a_lora_and_its_settings(name: str, steps: int, file: str) -> None:
    released, few = load_bundle(BUNDLES / "scail-14b"), load_bundle(BUNDLES / name)
    [lora] = few.component("transformer").loras
    assert (lora.file.name, lora.multiplier) == (file, 1)
    assert few.sampling == replace(released.sampling, num_inference_steps=steps, guidance_scale=1)
    assert (few.sampling.shift, few.sampling.solver) == (7, "unipc")
    assert (few.video, few.pose, few.preset, few.presets) == (
        released.video, released.pose, released.preset, released.presets,
    )  # fmt: skip
    transformer = replace(few.component("transformer"), loras=())

    def relative(files: tuple[Path, ...], to: Path) -> list[Path]:
        return [file.relative_to(to) for file in files]

    for component in released.components.values():
        own = transformer if component.name == "transformer" else few.component(component.name)
        assert relative(own.files, BUNDLES / name) == relative(component.files, BUNDLES / "scail-14b")
        assert replace(own, files=(), tokenizer=None) == replace(component, files=(), tokenizer=None)
    assert few.components.keys() == released.components.keys()


def test_loras_are_files_of_the_models_directory_with_a_multiplier(tmp_path: Path) -> None:
    entries = """
    [[components.transformer.loras]]
    file = "loras/a.safetensors"
    [[components.transformer.loras]]
    file = "b.safetensors"
    multiplier = 0.5
    licence = "MIT"
    """
    bundle = load_bundle(written(tmp_path, entries), models=tmp_path / "models")
    one, other = Lora(tmp_path / "models/loras/a.safetensors"), Lora(tmp_path / "models/b.safetensors", 0.5, "MIT")
    assert bundle.component("transformer").loras == (one, other)
    assert one.multiplier == 1
    assert bundle.component("vae").loras == ()


@pytest.mark.parametrize(
    ("loras", "other", "message"),
    [
        ("[[components.transformer.loras]]\nmultiplier = 1", "", "entry 'file' is missing"),
        ('[[components.transformer.loras]]\nfile = "a"\nstrength = 1', "", "unexpected keyword argument 'strength'"),
        ('[[components.transformer.loras]]\nfile = "a"\nmultiplier = nan', "", "must be a finite number"),
        ('[[components.transformer.loras]]\nfile = "a"\nmultiplier = "1"', "", "must be a finite number"),
        ('[[components.transformer.loras]]\nfile = "a"\nmultiplier = true', "", "must be a finite number"),
        ('loras = ["a.safetensors"]', "", r"transformer\.loras must be tables.*\[\[components\.transformer\.loras\]\]"),
        ('loras = "a.safetensors"', "", r"transformer\.loras must be tables.*, got 'a\.safetensors'"),
        ('[components.transformer.loras]\nfile = "a"', "", r"transformer\.loras must be tables"),
        ("", '[[components.vae.loras]]\nfile = "a"', "loras are of the transformer alone"),
    ],
)
def test_what_a_lora_cannot_be_is_refused(tmp_path: Path, loras: str, other: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load_bundle(written(tmp_path, loras, other))


def test_loras_are_among_the_files_that_have_to_be_there(tmp_path: Path) -> None:
    component = load_bundle(written(tmp_path, '[[components.transformer.loras]]\nfile = "a.safetensors"')).component(
        "transformer"
    )
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BundleError, match=r"^transformer: not there: [^,]*a\.safetensors$"):
        require_files(component)
    (tmp_path / "a.safetensors").touch()
    require_files(component)
