"""The encoder within a number of bytes: seconds of a prompt and a picture, and what the process really takes. Needs a GPU.

`python -m benchmarks.encoder_memory [--budgets 0,2.1,4,8,14] [--json FILE]` makes UMT5-XXL and CLIP ViT-H of random
bfloat16 weights in host memory and, for each budget (in GiB; 0: everything on the device) in a process of its own,
encodes a prompt of 512 tokens and a picture three times. Seconds are those of the last time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.denoiser import GIB, timed
from runtime.memory import peak_rss_bytes
from runtime.vram import Peak
from runtime.weights import build_on_meta
from services.encoder.image import PRESETS as IMAGE_PRESETS
from services.encoder.image import ImageEncoderConfig, ImageModel
from services.encoder.placement import place_encoders
from services.encoder.text import PRESETS, TextEncoderConfig, TextModel

_COLUMNS = ("budget GiB", "plan", "prompt s", "picture s", "planned GiB", "allocated", "reserved", "driver", "host RSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default="0,2.1,4,8,14", help="GiB")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--budget", type=float, help="measure this one, and print JSON")
    options = parser.parse_args()
    if options.budget is not None:
        text, image = PRESETS["umt5-xxl"], IMAGE_PRESETS["clip-vit-h-14"]
        print(json.dumps(measured(text, image, torch.device("cuda:0"), options.budget)))
        return
    print(f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}")
    rows: list[dict[str, Any]] = []
    for budget in options.budgets.split(","):
        command = [sys.executable, "-m", "benchmarks.encoder_memory", "--budget", budget]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(ended.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


def measured(
    text_config: TextEncoderConfig, image_config: ImageEncoderConfig, device: torch.device, budget: float
) -> dict[str, Any]:
    """Places random encoders and runs them; a dict of what it took, in bytes and seconds."""
    text = random_weights(build_on_meta(lambda: TextModel(text_config)), device)
    image = random_weights(build_on_meta(lambda: ImageModel(image_config)), device)
    planned, words = 0, "all on the device"
    with Peak(device) as peak:
        if budget:
            plan = place_encoders(text, image, text_config, device, round(budget * GIB))
            planned, words = plan.device_bytes, str(plan)
        else:
            text.to(device)
            image.to(device)
        prompt_s, picture_s = run(text, image, text_config.text_len, image_config.image_size, device)
    return {
        "budget": budget,
        "plan": words,
        "prompt_s": prompt_s,
        "picture_s": picture_s,
        "planned": planned,
        "allocated_bytes": peak.allocated_bytes,
        "reserved_bytes": peak.reserved_bytes,
        "driver_bytes": peak.driver_bytes,
        "rss": peak_rss_bytes(),
    }


@torch.inference_mode()
def run(text: TextModel, image: ImageModel, tokens: int, side: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the last of three prompts, and of three pictures."""
    ids = torch.arange(tokens)[None].to(text.stack.embed_tokens.weight.device)
    picture = torch.zeros(1, 3, side, side, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        with timed(device) as prompt_s:
            text(ids)
    for _ in range(3):
        with timed(device) as picture_s:
            image(picture)
    return prompt_s(), picture_s()


def random_weights(model: Any, device: torch.device) -> Any:
    """Fills a model of the meta device, in host memory and bfloat16; made on the device, which is quick."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):  # numbers of positions
            module.register_buffer(name, torch.arange(tensor.numel()).view(tensor.shape), persistent=False)
        for name, tensor in module.named_parameters(recurse=False):
            values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
            spread = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
            values.uniform_(-spread, spread, generator=generator)
            setattr(module, name, nn.Parameter(values.cpu(), requires_grad=False))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model.eval()


def line(row: dict[str, Any]) -> str:
    sizes = (
        f"{row[name] / GIB:.2f}" for name in ("planned", "allocated_bytes", "reserved_bytes", "driver_bytes", "rss")
    )
    cells = [f"{row['budget']:g}", row["plan"], f"{row['prompt_s']:.3f}", f"{row['picture_s']:.3f}", *sizes]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
