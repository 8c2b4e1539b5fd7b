"""One denoise over several GPUs of a machine: seconds of a forward pass for 1, 2 and 4 ranks, and what the exchange costs.

`python -m benchmarks.parallel [--ranks 1,2,4] [--sizes 480x832x81,512x896x81] [--precision balanced] [--json FILE]`
fills SCAIL 14B with random INT8 weights on every GPU and prints a markdown table. In the same processes it measures the
all-to-all that Ulysses does, bare, with tensors of the same size: bytes over that speed are the floor of the exchange,
and the time of one rank over the number of ranks is that of the computation. `--tiny` is a trial on a CPU with gloo,
whose seconds mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]  # missing in its stubs

from benchmarks.denoiser import GIB, inputs, timed
from benchmarks.precision import random_model
from runtime.gpu import gate_blocks, raise_if_cancelled
from services.denoiser.model import PRESETS, Context, DiffusionTransformer, TransformerConfig
from services.denoiser.parallel import DeviceTeam, Share, connect, tokens_between
from services.denoiser.precision import EXACT, PRECISIONS, set_precision

_TINY = TransformerConfig(
    in_dim=20,
    out_dim=16,
    dim=256,
    ffn_dim=704,
    num_heads=8,
    num_layers=4,
    text_dim=64,
    text_len=64,
    image_dim=96,
    pose=True,
)
_AGREEMENTS = 200


@dataclass(frozen=True)
class Settings:
    """Of one run, the same for all ranks."""

    config: TransformerConfig
    size: tuple[int, int, int]  # height, width, num_frames
    precision: str
    repeats: int
    directory: str


@dataclass(frozen=True)
class Row:
    """What one number of ranks came to; times are medians, of rank 0.

    Attributes:
        step_s: both guidance branches, as a step takes them.
        ungated_step_s: the same without the ranks' agreement before each block.
        forward_s: one pass without guidance.
        step_exchange_gib, forward_exchange_gib: what a rank sends in it.
        step_exchange_s, forward_exchange_s: what bare all-to-alls of these tensors take.
        agreement_ms: of asking all ranks whether one was cancelled, once.
        difference: of the velocity from that of one rank, relative to its norm.
    """

    ranks: int
    tokens: int
    step_s: float
    ungated_step_s: float
    forward_s: float
    step_exchange_gib: float
    forward_exchange_gib: float
    step_exchange_s: float
    forward_exchange_s: float
    agreement_ms: float
    peak_gib: float
    difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1,2,4", help="numbers of ranks; 1 must be the first")
    parser.add_argument("--sizes", default="480x832x81,512x896x81", help="HxWxF,...")
    parser.add_argument("--precision", choices=PRECISIONS, default=EXACT)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to as well")
    parser.add_argument("--tiny", action="store_true", help="a small model and clip on the CPU")
    options = parser.parse_args()
    config = _TINY if options.tiny else dataclasses.replace(PRESETS["scail-14b"], num_layers=options.layers)
    sizes = ["64x64x9"] if options.tiny else options.sizes.split(",")
    device = "CPU, gloo" if options.tiny else torch.cuda.get_device_name(0)
    rows: list[Row] = []
    print(f"{device}; {options.precision}\n\n{_HEADER}")
    for size in sizes:
        height, width, num_frames = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as directory:
            settings = Settings(config, (height, width, num_frames), options.precision, options.repeats, directory)
            alone: Row | None = None
            for ranks in map(int, options.ranks.split(",")):
                row = measured(settings, ranks, "cpu" if options.tiny else "cuda")
                alone = alone or row
                rows.append(row)
                print(line(row, alone), flush=True)
    if options.json is not None:
        figures = {"device": device, "precision": options.precision, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


_HEADER = """\
| tokens | ranks | s a step | faster | floor: compute + exchange s | without agreement s | s a forward | faster | \
floor: compute + exchange s | sent GiB, step / forward | agreement ms | peak GiB | from one rank |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(row: Row, alone: Row) -> str:
    step, forward = alone.step_s / row.ranks, alone.forward_s / row.ranks
    return (
        f"| {row.tokens} | {row.ranks} | {row.step_s:.3f} | {alone.step_s / row.step_s:.2f} "
        f"| {step:.3f} + {row.step_exchange_s:.3f} | {row.ungated_step_s:.3f} "
        f"| {row.forward_s:.3f} | {alone.forward_s / row.forward_s:.2f} | {forward:.3f} + {row.forward_exchange_s:.3f} "
        f"| {row.step_exchange_gib:.2f} / {row.forward_exchange_gib:.2f} | {row.agreement_ms:.2f} "
        f"| {row.peak_gib:.1f} | {row.difference:.1e} |"
    )


def measured(settings: Settings, ranks: int, device_type: str) -> Row:
    """Runs the ranks as processes of their own and gives what the first one found."""
    tokens_between(settings.config.num_heads, ranks)
    processes.spawn(_rank, (ranks, device_type, settings), nprocs=ranks)  # type: ignore[attr-defined,no-untyped-call]  # so are its stubs
    return Row(**json.loads((Path(settings.directory) / f"row-{ranks}.json").read_text()))


def _rank(rank: int, ranks: int, device_type: str, settings: Settings) -> None:
    torch.set_num_threads(1)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    connect(FileStore(f"{settings.directory}/store-{ranks}", ranks), rank, ranks, device)
    model = random_model(settings.config, device)
    set_precision(model, settings.precision, device)
    with torch.inference_mode():
        row, velocity = _figures(model, device, ranks, settings)
    if rank == 0:
        alone = Path(settings.directory) / "velocity.pt"
        if ranks == 1:
            torch.save(velocity.cpu(), alone)
        expected = torch.load(alone, weights_only=True)
        difference = float((velocity.cpu() - expected).norm() / expected.norm())
        path = Path(settings.directory) / f"row-{ranks}.json"
        path.write_text(json.dumps(asdict(dataclasses.replace(row, difference=difference))))
    dist.barrier()
    dist.destroy_process_group()


def _figures(model: DiffusionTransformer, device: torch.device, ranks: int, settings: Settings) -> tuple[Row, Tensor]:
    """The row of this rank, and the velocity of the first branch."""
    config = settings.config
    conditioning, prompt, latents = inputs(config, device, *settings.size)
    contexts = [model.embed_context(scale * prompt.prompt_embeds, prompt.image_embeds) for scale in (1.0, -1.0)]
    tokens = len(conditioning.rope.cos)
    timestep = torch.tensor([999])

    def forward(context: Context) -> Tensor:
        predicted: Tensor = model(
            conditioning.model_input(latents), timestep, context, conditioning.rope, conditioning.pose_latents
        )
        return predicted

    def step() -> Tensor:
        return model.team.both(lambda: forward(contexts[0]), lambda: forward(contexts[1]))[0]

    team = DeviceTeam(config.num_heads) if ranks > 1 else None
    if team is not None:
        team.join(model)
    undo = gate_blocks(model.blocks, device, raise_if_cancelled if team is None else team.check)
    velocity = step()
    forward(contexts[0])
    step_s = _median(step, device, settings.repeats)
    forward_s = _median(lambda: forward(contexts[0]), device, settings.repeats)
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    undo()
    ungated_step_s = _median(step, device, settings.repeats)
    exchanges = [(0.0, 0.0), (0.0, 0.0)]
    agreement_ms = 0.0
    if team is not None:
        exchanges = [_exchange(share, config, tokens, device, settings.repeats) for share in team.shares]
        agreement_ms = _median(partial(_agree, team), device, 3) / _AGREEMENTS * 1000
    (step_gib, step_exchange_s), (forward_gib, forward_exchange_s) = exchanges
    row = Row(
        ranks=ranks,
        tokens=tokens,
        step_s=step_s,
        ungated_step_s=ungated_step_s,
        forward_s=forward_s,
        step_exchange_gib=step_gib,
        forward_exchange_gib=forward_gib,
        step_exchange_s=step_exchange_s,
        forward_exchange_s=forward_exchange_s,
        agreement_ms=agreement_ms,
        peak_gib=peak,
        difference=0.0,
    )
    return row, velocity


def _agree(team: DeviceTeam) -> None:
    for _ in range(_AGREEMENTS):
        team.check()


def _exchange(
    share: Share | None, config: TransformerConfig, tokens: int, device: torch.device, repeats: int
) -> tuple[float, float]:
    """GiB that a rank sends to others in a forward pass, and seconds of bare all-to-alls of the same tensors."""
    if share is None:
        return 0.0, 0.0
    size = share.ranks.size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    part = torch.zeros(size, -(-tokens // size) * config.dim // size, device=device, dtype=dtype)
    in_a_pass = 4 * config.num_layers  # queries, keys, values and what was gathered

    def bare() -> None:
        for _ in range(in_a_pass):
            share.ranks.exchanged(part)[1].wait()

    bare()
    return in_a_pass * part.nbytes * (size - 1) / size / GIB, _median(bare, device, repeats)


def _median(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of `work`, which all ranks begin together."""
    taken = []
    for _ in range(repeats):
        dist.barrier()
        with timed(device) as seconds:
            work()
        taken.append(seconds())
    return statistics.median(taken)


if __name__ == "__main__":
    main()
