"""Cases and inventories of the encoder stage: UMT5, prompt cleaning, CLIP and the ways to bring a picture to its size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from services.encoder import image, text
from services.encoder.image import ImageEncoderConfig, preprocess, resize_lanczos
from services.encoder.text import TextEncoderConfig, clean_prompt
from services.encoder.weights import image_encoder_mismatches, image_model, text_encoder_mismatches, text_model
from tests.parity.cases import Case, Comparison
from tests.parity.families import family
from tests.parity.manifests import manifest


@family("umt5", on_any_device=True)
def umt5(case: Case) -> Iterator[Comparison]:
    """Hidden states of the tokens; rows of padding are not compared (here they are zero)."""
    config = TextEncoderConfig(**case.config)
    model = text_model(case.weights(), config, device=case.device, dtype=torch.float32, source=case.name)
    mask = case.input("mask")
    hidden = model(case.input("ids"), mask)
    for name in case.expected_names():
        expected = case.expected(name)
        # stored either for every row of the batch, or for its tokens only
        tokens = expected[mask.bool().cpu()] if expected.shape == hidden.shape else expected
        yield Comparison.within(name, hidden[mask.bool()], tokens, case.tolerance)


@family("text-clean")
def text_clean(case: Case) -> Iterator[Comparison]:
    for raw, cleaned in case.spec["pairs"]:
        yield Comparison(ascii(raw), clean_prompt(raw), cleaned)


@family("clip-visual", on_any_device=True)
def clip_visual(case: Case) -> Iterator[Comparison]:
    """The official preprocessing of each picture, then the features of the last block but one."""
    settings = case.config
    config = ImageEncoderConfig(
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        dim=settings["dim"],
        num_heads=settings["num_heads"],
        num_layers=settings["num_layers"],
        mlp_ratio=settings["mlp_ratio"],
        activation=settings["activation"].split()[0],
        norm_eps=settings["norm_eps"],
        preprocessing="official",
    )
    model = image_model(case.weights(), config, device=case.device, dtype=torch.float32, source=case.name)
    # a picture is stored as a video of one frame, [3, 1, H, W]
    pixels = torch.stack([preprocess(case.input(name)[:, 0], config) for name in case.spec["inputs"]])
    actual = {"preprocessed": pixels, "features": model(pixels)}
    for name in case.expected_names():
        yield Comparison.within(name, actual[name], case.expected(name), case.tolerance)


@family("clip-resize")
def clip_resize(case: Case) -> Iterator[Comparison]:
    """Wan2GP's way to size, still in [-1, 1]."""
    resized = resize_lanczos(case.input("image"), case.config["size"])
    for name in case.expected_names():
        yield Comparison.within(name, resized, case.expected(name), case.tolerance)


@manifest("models_t5_umt5-xxl-enc-bf16.pth")
def umt5_xxl(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return text_encoder_mismatches(shapes, text.PRESETS["umt5-xxl"])


@manifest(
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14-onlyvisual.pth",
)
def clip_vit_h_14(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return image_encoder_mismatches(shapes, image.PRESETS["clip-vit-h-14"])
