"""Cases and inventories of the masks of people: Segment Anything in one picture, MatAnyone through a clip."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.weights import build_on_meta
from services.pose.persons.masks import PersonPrompt
from services.pose.persons.matanyone.config import MatAnyoneConfig, PropagationConfig
from services.pose.persons.matanyone.network import MatAnyone
from services.pose.persons.matanyone.propagation import Propagation
from services.pose.persons.sam import PRESETS, SegmenterConfig
from services.pose.persons.sam2 import Sam2Config, Sam2Masks
from services.pose.persons.weights import (
    matanyone_config,
    matanyone_network,
    matanyone_problems,
    sam2_network,
    segmenter_model,
    segmenter_problems,
)
from tests.parity.cases import Case, Comparison, recipe_weight
from tests.parity.families import family
from tests.parity.manifests import manifest


@family("sam", on_any_device=True)
def sam(case: Case) -> Iterator[Comparison]:
    """A picture's embedding; and for every prompt its tokens, masks, scores, and the best mask at the picture's size."""
    weights = case.weights()
    model = segmenter_model(weights, segmenter_config(case.config, weights), device=case.device, source=case.name)
    embedding = model.embed(case.input("image"))
    actual = {"embedding": embedding}
    scaled, size = (tuple(case.call[name]) for name in ("input_size", "original_size"))
    for index, prompt in enumerate(case.call["prompts"]):
        points = torch.tensor(prompt["points"] or [], dtype=torch.float32, device=case.device).view(-1, 2)
        labels = torch.tensor(prompt["labels"] or [], dtype=torch.int64, device=case.device)
        box = None if prompt["box"] is None else torch.tensor(prompt["box"], device=case.device)
        logits, scores = model.masks(embedding, points, labels, box)
        full = model.full_size(logits[scores.argmax()][None], scaled, size)[0]
        actual |= {
            f"sparse{index}": model.embed_prompt(points, labels, box),
            f"low_res{index}": logits,
            f"iou{index}": scores,
            f"upscaled_best{index}": full,
            f"best{index}": full > 0,
        }
    for name in case.expected_names():
        if name.startswith("best"):
            yield mostly_equal(name, actual[name], case.expected(name), case.tolerance["best"])
        else:
            yield Comparison.within(name, actual[name], case.expected(name), case.tolerance)


def segmenter_config(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SegmenterConfig:
    return SegmenterConfig(
        image_size=settings["image_size"],
        patch_size=weights["image_encoder.patch_embed.proj.weight"].shape[-1],
        dim=settings["embed"],
        num_layers=settings["depth"],
        num_heads=settings["heads"],
        mlp_dim=len(weights["image_encoder.blocks.0.mlp.lin1.bias"]),
        window_size=settings["window"],
        global_layers=tuple(settings["global"]),
        prompt_dim=settings["prompt_dim"],
        decoder_mlp_dim=settings["mlp"],
        iou_dim=settings["iou_hidden"],
    )


def mostly_equal(name: str, actual: Tensor, expected: Tensor, rule: str) -> Comparison:
    """By the rule `at most N% of the pixels differ`."""
    limit = re.search(r"at most (\d+(?:\.\d+)?)% of the pixels differ", rule)
    if limit is None or actual.shape != expected.shape:
        raise ValueError(f"{name}: {list(actual.shape)} against {list(expected.shape)}, by the rule {rule!r}")
    differing = (actual.bool().cpu() != expected.bool()).double().mean()
    return Comparison(name, differing[None], torch.zeros(1), atol=float(limit[1]) / 100)


@family("sam2", on_any_device=True)
def sam2(case: Case) -> Iterator[Comparison]:
    """The masks of every frame, and their logits in some."""
    network = sam2_network(case.weights(), sam2_config(case.config), device=case.device, source=case.name)
    frames = case.input("frames").permute(0, 2, 3, 1)
    prompts = [
        PersonPrompt(tuple(prompt["box"]), tuple((x, y) for x, y in prompt["points"]))
        for prompt in case.call["prompts"]
    ]
    clip = Sam2Masks(network).begin(frames[0], prompts)
    masks, logits = [clip.first], [clip.logits]
    for frame in frames[1:]:
        masks.append(clip.follow(frame))
        logits.append(clip.logits)
    for name in case.expected_names("logits"):
        index = int(name.removeprefix("logits"))
        yield Comparison.within(name, logits[index], case.expected(name), case.tolerance)
    yield mostly_equal("masks", torch.stack(masks), case.expected("masks"), case.tolerance["masks"])


def sam2_config(settings: Mapping[str, Any]) -> Sam2Config:
    return Sam2Config(
        dim=settings["embed_dim"],
        num_heads=settings["num_heads"],
        blocks_per_stage=tuple(settings["stages"]),
        global_blocks=tuple(settings["global_att_blocks"]),
        window_sizes=tuple(settings["window_spec"]),
        background_size=settings["window_pos_embed_bkg"],
        image_size=settings["image_size"],
        hidden_dim=settings["d_model"],
        decoder_mlp_dim=settings["decoder_mlp"],
        iou_dim=settings["iou_hidden"],
        memory_mlp_dim=settings["memory_mlp"],
        fuser_dim=settings["fuser_mlp"],
        memory_layers=settings["memory_layers"],
    )


@family("matanyone", on_any_device=True)
def matanyone(case: Case) -> Iterator[Comparison]:
    """The mattes of every step, the decoder's output before its limits, and values at their first use."""
    actual = clip_values(case)
    for name in case.expected_names():
        expected = case.expected(name)
        yield Comparison.within(name, value_named(actual, name).reshape(expected.shape), expected, case.tolerance)


def clip_values(case: Case) -> dict[str, Tensor]:
    """Runs the clip; values by the names of the case."""
    settings = case.config
    if settings["flip_aug"] or not settings["single_object"]:
        raise ValueError("one person at a time is followed here, without test-time augmentation")
    frames, mask = case.input("frames") / 255, case.input("mask") / 255
    network = matanyone_of(settings["model"], case.name, case.device)
    clip = Propagation(network, propagation_config(settings), frames[0], mask[None])
    scales = dict(zip(("f16", "f8", "f4", "f2", "f1"), clip.seen.scales, strict=True))
    middle = {
        "pix_feat": clip.seen.pixels,
        "key": clip.seen.key,
        "shrinkage": clip.seen.shrinkage,
        "selection": clip.seen.selection,
        "mask_value": clip.values,
        "sensory": clip.sensory,
        "object_summaries": clip.summaries,
        **scales,
    }
    values = {f"mid.{name}": value for name, value in middle.items()}
    alphas = [clip.predict_first()]
    values["logits_first"] = clip.mattes
    alphas += [clip.predict_first() for _ in range(settings["n_warmup"])]
    alphas += [clip.step(frame) for frame in frames[1:]]
    return values | {f"alpha{step}": alpha for step, alpha in enumerate(alphas)} | {"logits_last": clip.mattes}


def value_named(values: Mapping[str, Tensor], name: str) -> Tensor:
    """The value of that name; `<name>_firstN` has its first N channels."""
    part = re.fullmatch(r"(.+)_first(\d+)", name)
    return values[part[1]][:, : int(part[2])] if part else values[name]


def propagation_config(settings: Mapping[str, Any]) -> PropagationConfig:
    return PropagationConfig(
        num_warmup=settings["n_warmup"],
        memory_every=settings["mem_every"],
        max_memory_frames=settings["max_mem_frames"],
        top_k=settings["top_k"],
        sensory_updates=settings["stagger_updates"],
    )


def matanyone_of(settings: Mapping[str, Any], source: str, device: torch.device) -> MatAnyone:
    """The network of these sizes with the weights that its names give."""
    config = matanyone_config(settings)
    expected = build_on_meta(lambda: MatAnyone(config)).state_dict()
    weights = {name: recipe_weight(name, tensor.shape) for name, tensor in expected.items()}
    return matanyone_network(weights, config, device=device, source=source)


@manifest("sam_vit_h_4b8939.pth", "sam_vit_h-transformers")
def sam_vit_h(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return segmenter_problems(shapes, PRESETS["sam-vit-h"])


@manifest("matanyone-model.safetensors")
def matanyone_file(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return matanyone_problems(shapes, MatAnyoneConfig())
