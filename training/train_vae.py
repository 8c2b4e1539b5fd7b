"""Trains the VAE of a bundle on drawn clips: pictures first, then crops of clips, then whole clips.

    python -m training.train_vae --bundle bundles/tiny --state runs/vae.pt --log docs/training

What the transformer will be given is latents of clips, of reference pictures and of pose frames at half size; the VAE
sees all three. It is measured on the figures, which are a small part of a picture and all that matters in it. The state
file holds everything that is needed to go on: the same command, called again, does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from runtime.bundles import configuration, load_bundle
from services.vae.model import PRESETS, Vae, VaeConfig
from training.clip_vae import ClipVae, initialise, matrices_and_rest
from training.drawn_clips import Drawn, draw
from training.export import write_vae
from training.optimise import Average, Optimiser, RecordedStep, Schedule
from training.runs import Log, Progress, State, run_steps

_KL_WEIGHT = 1e-4
_EDGE_WEIGHT = 0.5
_FIGURE_WEIGHT = 4.0
_AVERAGE_DECAY = 0.998


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        share: of all steps.
        side, frames: of the crops.
        clips, poses: crops of clips and of pose clips in a batch; a pose clip is half as large as a clip.
    """

    name: str
    share: float
    side: int
    frames: int
    clips: int
    poses: int


STAGES = (
    Stage("pictures", share=0.15, side=64, frames=1, clips=112, poses=16),
    Stage("crops", share=0.5, side=64, frames=17, clips=20, poses=4),
    Stage("clips", share=0.35, side=128, frames=17, clips=6, poses=4),
)


@dataclass(frozen=True)
class Pool:
    """Clips on the device to take crops from; uint8 and bool, pixels last but one axis."""

    target: Tensor  # [N, n, H, W, 3]
    figure: Tensor  # [N, n, H, W]
    pose: Tensor  # [N, n, H / 2, W / 2, 3]

    @classmethod
    def of(cls, parts: Iterator[Drawn]) -> Pool:
        kept = [(part.target, part.figure, part.pose.round().to(torch.uint8)) for part in parts]
        return cls(*(torch.cat(tensors) for tensors in zip(*kept, strict=True)))

    def crops(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Frames [B, 3, n, side, side] in [-1, 1] and the weight of their pixels [B, 1, n, side, side]."""
        rows, where = self._places(self.target, stage, stage.clips)
        frames = _as_frames(self.target[rows, *where])
        weight = 1 + (_FIGURE_WEIGHT - 1) * self.figure[rows, *where].float()
        return frames, weight[:, None]

    def pose_crops(self, stage: Stage) -> Tensor:
        """The same of pose clips, without weights; at most as large as those are."""
        rows, where = self._places(self.pose, stage, stage.poses)
        return _as_frames(self.pose[rows, *where])

    def _places(self, source: Tensor, stage: Stage, count: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Indices of random crops: rows [count, 1, 1, 1], and of frame, line and column, to be broadcast."""
        device = source.device
        clips, lengths = len(source), source.shape[1:4]
        wanted = [
            min(most, length) for most, length in zip((stage.frames, stage.side, stage.side), lengths, strict=True)
        ]

        def axis(place: int) -> Tensor:
            begin = torch.randint(lengths[place] - wanted[place] + 1, (count, 1), device=device)
            shape = [count, 1, 1, 1]
            shape[place + 1] = wanted[place]
            return (begin + torch.arange(wanted[place], device=device)).view(shape)

        rows = torch.randint(clips, (count, 1, 1, 1), device=device)
        return rows, (axis(0), axis(1), axis(2))


def _as_frames(levels: Tensor) -> Tensor:
    return levels.movedim(-1, 1).float() / 127.5 - 1


class Training:
    """Losses of a VAE on crops from a pool."""

    def __init__(self, clip_vae: ClipVae, pool: Pool) -> None:
        self._vae, self._pool = clip_vae, pool

    def loss(self, stage: Stage) -> Tensor:
        frames, weight = self._pool.crops(stage)
        poses = self._pool.pose_crops(stage)
        if poses.shape[2:] == frames.shape[2:]:
            frames = torch.cat([frames, poses])
            return self.error(frames, torch.cat([weight, weight.new_ones(len(poses), *weight.shape[1:])]))
        # of smaller size: a batch of their own, which counts by its pixels
        share = poses.numel() / (poses.numel() + frames.numel())
        ones = poses.new_ones(len(poses), 1, *poses.shape[2:])
        return (1 - share) * self.error(frames, weight) + share * self.error(poses, ones)

    def error(self, frames: Tensor, weight: Tensor) -> Tensor:
        """Of a batch: absolute and squared error, absolute error of differences between neighbours, and KL."""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.device.type == "cuda"):
            mean, log_variance = (moment.float() for moment in self._vae.posterior(frames))
            latents = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * torch.randn_like(mean)
            decoded = self._vae.generate(latents)
        off = decoded.float() - frames
        error = _weighted(off.abs() + off.square(), weight)
        for axis in (2, 3, 4):
            if off.shape[axis] > 1:
                error = error + _EDGE_WEIGHT * _weighted(
                    off.diff(dim=axis).abs(), weight.narrow(axis, 1, off.shape[axis] - 1)
                )
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + _KL_WEIGHT * kl


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / (weight.sum() * values.shape[1])


@dataclass(frozen=True)
class Scores:
    """Peak signal-to-noise ratios of reconstructions, dB: of whole clips, of the figures alone, of pose clips."""

    clips: float
    figures: float
    poses: float

    @classmethod
    @torch.no_grad()
    def of(cls, clip_vae: ClipVae, pool: Pool) -> Scores:
        """Over a pool, without sampling of the posterior, in float32."""
        # sizes that occur here alone: looking for their fastest kernels takes longer than the work
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True):
            return cls._over(clip_vae, pool)

    @classmethod
    def _over(cls, clip_vae: ClipVae, pool: Pool) -> Scores:
        totals = torch.zeros(3, 2, dtype=torch.float64)
        for row in range(len(pool.target)):
            target, pose = (_as_frames(source[row : row + 1]) for source in (pool.target, pool.pose))
            off, pose_off = (_reconstruction_error(clip_vae, frames) for frames in (target, pose))
            figure = pool.figure[row : row + 1, None].expand_as(off)
            for number, squared in enumerate((off, off[figure], pose_off)):
                totals[number] += torch.tensor([float(squared.sum()), squared.numel()])
        decibels = -10 * torch.log10(totals[:, 0] / totals[:, 1] / 4)  # the range of values is 2
        return cls(*decibels.tolist())

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name):.2f} dB" for field in fields(self))


def _reconstruction_error(clip_vae: ClipVae, frames: Tensor) -> Tensor:
    """Squared error of each value of frames [1, 3, n, H, W]."""
    mean, _ = clip_vae.posterior(frames)
    return (clip_vae.generate(mean).clamp(-1, 1) - frames).square()


@torch.no_grad()
def latent_statistics(clip_vae: ClipVae, pool: Pool, clips: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the latents of whole clips."""
    latents = torch.cat([clip_vae.posterior(_as_frames(pool.target[row : row + 1]))[0] for row in range(clips)])
    values = latents.transpose(0, 1).flatten(1)
    return values.mean(dim=1), values.std(dim=1)


@dataclass(frozen=True)
class Recipe:
    """Clips that are drawn once and seen many times, steps, learning rate."""

    clips: int = 6144
    steps: int = 6000
    rate: float = 1e-3
    seed: int = 10
    held_out_clips: int = 64
    statistics_clips: int = 256


def train(arguments: argparse.Namespace, recipe: Recipe) -> None:
    deadline = time.monotonic() + arguments.seconds
    device = torch.device(arguments.device)
    bundle = load_bundle(arguments.bundle)
    vae = Vae(configuration(bundle.component("vae"), PRESETS, VaeConfig))
    initialise(vae, torch.Generator().manual_seed(recipe.seed))
    clip_vae = ClipVae(vae.to(device), compiled=arguments.compile)

    def pool(count: int, held_out: bool) -> Pool:
        size = {"side": bundle.video.height, "frames": bundle.video.window_frames}
        return Pool.of(draw(count, seed=recipe.seed, held_out=held_out, device=device, **size))

    begun = time.monotonic()
    seen, held_out = pool(recipe.clips, False), pool(recipe.held_out_clips, True)
    print(f"drew {len(seen.target)} clips in {time.monotonic() - begun:.0f} s", flush=True)
    optimiser = Optimiser(*matrices_and_rest(vae), recipe.rate)
    average = Average(vae.parameters(), _AVERAGE_DECAY)
    training = Training(clip_vae, seen)

    def step_of(stage: Stage) -> Callable[[], Tensor]:
        def one_step() -> Tensor:
            loss = training.loss(stage)
            optimiser.step(loss)
            average.update()
            return loss.detach()

        return one_step

    torch.manual_seed(recipe.seed + 1)
    state, progress = State({"vae": vae}, optimiser, average), Progress()
    resumed = arguments.state.exists()
    if resumed:
        step_of(STAGES[0])()  # makes the optimiser's memory, into which the saved one is read
        progress = state.restore(arguments.state)
    log = Log(arguments.log / "vae.csv", append=resumed)
    schedule = Schedule(recipe.steps, warm_up_steps=50, decay_from=0.2, final=0.02)
    until = 0.0
    for stage in STAGES:
        until += stage.share
        last = round(until * recipe.steps)
        if progress.step >= last or time.monotonic() > deadline:
            continue
        step = RecordedStep(step_of(stage), device)
        progress = run_steps(
            step, optimiser, schedule, progress, until_step=last, deadline=deadline, stage=stage.name, log=log
        )
        state.save(arguments.state, progress)
        print(f"after {stage.name}: {Scores.of(clip_vae, held_out)}", flush=True)
    log.draw("VAE")
    average.swap()
    print(f"average: {Scores.of(clip_vae, held_out)}", flush=True)
    mean, std = latent_statistics(clip_vae, seen, min(recipe.statistics_clips, recipe.clips))
    write_vae(arguments.bundle, bundle, vae, mean.cpu(), std.cpu())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipe = Recipe()
    parser.add_argument("--bundle", type=Path, default=Path("bundles/tiny"))
    parser.add_argument("--state", type=Path, required=True, help="file to go on from, and to leave")
    parser.add_argument("--log", type=Path, required=True, help="folder for the losses")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, to be gone on with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--clips", type=int, default=recipe.clips)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    train(arguments, Recipe(steps=arguments.steps, clips=arguments.clips))


if __name__ == "__main__":
    main()
