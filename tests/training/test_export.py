"""Trained models are written so that the services read back what was trained."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest
import torch

from runtime.bundles import Bundle, configuration, load_bundle
from services.denoiser.model import TransformerConfig
from services.denoiser.weights import load_transformer
from services.encoder.image import ImageEncoderConfig
from services.encoder.text import TextEncoderConfig
from services.encoder.weights import load_image_encoder, load_text_encoder
from services.vae.model import Vae, VaeConfig
from services.vae.weights import load_vae
from training.conditions import Learners, encode_tokens
from training.export import set_entry, write_learners, write_vae
from training.figures.clips import sample_stories
from training.tiny_tokenizer import write_tokenizer
from training.train_transformer import build_learners, prepared_tokenizer

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parent.parent.parent / "bundles" / "tiny"
SMALLER = {"num_layers = 8": "num_layers = 1", "ffn_dim = 704": "ffn_dim = 96", "dim = 256\n": "dim = 96\n"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    text = (TINY / "bundle.toml").read_text(encoding="utf-8")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (directory / "bundle.toml").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def bundle(directory: Path) -> Bundle:
    return load_bundle(directory)


@pytest.fixture(scope="module")
def learners(directory: Path, bundle: Bundle) -> Learners:
    """Already written."""
    learners = build_learners(bundle, seed=0)
    prepared_tokenizer(bundle)
    write_learners(directory, bundle, learners)
    return learners


def test_transformer_is_read_back_as_int8(bundle: Bundle, learners: Learners) -> None:
    component = bundle.component("transformer")
    config = configuration(component, {}, TransformerConfig)
    model = load_transformer(component.files, config, device=CPU, compute_dtype=torch.float32)
    names = dict(learners.transformer.named_parameters())
    for name, tensor in model.state_dict().items():
        if name.endswith("._data"):
            continue
        if name.endswith("._scale"):
            weight = names[name.removesuffix("._scale")]
            read = model.get_buffer(name) * model.get_buffer(name.replace("._scale", "._data"))
            assert (read - weight).abs().max() < 0.02 * weight.abs().max()
        else:
            torch.testing.assert_close(tensor, names[name].detach().bfloat16().float(), rtol=0, atol=0)


def test_text_encoder_is_read_back(bundle: Bundle, learners: Learners) -> None:
    component = bundle.component("text_encoder")
    config = configuration(component, {}, TextEncoderConfig)
    assert component.tokenizer is not None
    encoder = load_text_encoder(component.files, config, component.tokenizer, device=CPU, dtype=torch.float32)
    ids, _ = encoder.tokenizer.tokenize("a person waves at night")
    tokens = torch.tensor([ids + [0] * (config.text_len - len(ids))])
    with torch.no_grad():
        trained = encode_tokens(learners.text, tokens)
    served = encoder.encode(["a person waves at night"]).prompt_embeds
    torch.testing.assert_close(served, trained, rtol=0.05, atol=0.05)


def test_image_encoder_is_read_back(bundle: Bundle, learners: Learners) -> None:
    component = bundle.component("image_encoder")
    config = configuration(component, {}, ImageEncoderConfig)
    encoder = load_image_encoder(component.files, config, device=CPU, dtype=torch.float32)
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(encoder.model(pixels), learners.image(pixels), rtol=0.02, atol=0.02)


def test_vae_is_read_back_with_the_statistics_of_its_latents(directory: Path, bundle: Bundle) -> None:
    torch.manual_seed(0)
    vae = Vae(VaeConfig(dim=16))
    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    write_vae(directory, bundle, vae, mean, std)
    component = load_bundle(directory).component("vae")
    config = configuration(component, {}, VaeConfig)
    read = load_vae(component.files, config, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(read.conv1.weight, vae.conv1.weight.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(config.latents_mean), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(config.latents_std), std, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("learners")
def test_digests_are_those_of_the_files(directory: Path) -> None:
    bundle = load_bundle(directory)
    for name in ("transformer", "text_encoder", "image_encoder"):
        component = bundle.component(name)
        assert component.sha256 == tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in component.files)


def test_an_entry_is_set_and_nothing_else_changes(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text('# comment\nname = "x"\n\n[a.b]\nsha = "old"  # why\nsize = 3\n\n[c]\nsha = "other"\n')
    set_entry(path, "a.b", "sha", '"new"')
    set_entry(path, "c", "list", "[1, 2]")
    assert tomllib.loads(path.read_text()) == {
        "name": "x",
        "a": {"b": {"sha": "new", "size": 3}},
        "c": {"sha": "other", "list": [1, 2]},
    }
    assert path.read_text().startswith('# comment\nname = "x"\n\n[a.b]\nsize = 3\nsha = "new"\n\n[c]\n')
    with pytest.raises(ValueError, match="nowhere"):
        set_entry(path, "nowhere", "x", "1")


def test_committed_bundle_is_whole_and_small() -> None:
    bundle = load_bundle(TINY)
    files = [file for component in bundle.components.values() for file in component.files]
    for component in bundle.components.values():
        assert component.sha256 == tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in component.files)
    tokenizer = bundle.component("text_encoder").tokenizer
    assert tokenizer is not None
    assert sum(file.stat().st_size for file in (*files, *tokenizer.glob("*.json"))) <= 24e6


def test_committed_latents_have_unit_deviation(bundle: Bundle) -> None:
    """The statistics in bundle.toml are those of the weights beside it."""
    component = load_bundle(TINY).component("vae")
    vae = load_vae(component.files, configuration(component, {}, VaeConfig), device=CPU, dtype=torch.float32)
    stories = sample_stories(4, torch.Generator().manual_seed(3), frames=5, held_out=True)
    clips = stories.draw_target(bundle.video.height, bundle.video.width).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(clips)
    assert abs(float(latents.mean())) < 0.25
    assert 0.75 < float(latents.std()) < 1.25


def test_committed_tokenizer_is_what_is_written_today(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 1024)
    for file in tmp_path.iterdir():
        assert (TINY / "umt5" / file.name).read_bytes() == file.read_bytes()
