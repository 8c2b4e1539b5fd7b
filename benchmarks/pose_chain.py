"""How fast poses are extracted, step by step: `python -m benchmarks.pose_chain [--device cuda] [--frames 96]`.

The whole chain of services.pose for one person at 512x896, at the sizes of the released models with random weights. NLF
is the real network. The two ONNX networks stand here as PyTorch modules with the same layers (their files are not at
hand, and onnxruntime's GPU build is not on every machine), in float32 with TF32 as onnxruntime runs them on CUDA: they
take tensors of the device as the sessions do, wait for the device before and after, and what they find is then replaced by
one person, so that all later steps have their work. Decoding the video is not part of it; scaling it is, with --source.

The rate and the steps are of one run; what is within them is of another, in which the device is waited for at each.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pose_render import dancing, synchronise
from services.pose.clip import Batch, Clip, Frame
from services.pose.detect import YoloxDetector
from services.pose.draw import halved
from services.pose.extract import PoseExtractor
from services.pose.habits import HABITS
from services.pose.keypoints import WholeBodyEstimator
from services.pose.networks import NetworkModels
from services.pose.nlf.backbone import BACKBONES, OUT_CHANNELS, efficientnet
from services.pose.nlf.config import HeadSizes, NlfConfig, NlfQuirks
from services.pose.nlf.model import CropModel, NlfEstimator
from services.pose.onnx import OnnxSettings
from services.pose.progress import Progress
from services.pose.whole_body import Person

HEIGHT, WIDTH = 512, 896
NUM_POINTS, NUM_CELLS = 1048, 8400
BOX = (300.0, 40.0, 560.0, 500.0)
RELEASED = {"person detector": 54.2e6, "whole-body keypoints": 33.6e6}
"""Parameters of the released files, by their sizes."""


class ConvLayer(nn.Sequential):
    """A convolution, with its batch norm folded into it as the exported files have it, and SiLU."""

    def __init__(self, dim: int, out_dim: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(nn.Conv2d(dim, out_dim, kernel, stride, kernel // 2, groups=groups), nn.SiLU())


class Bottleneck(nn.Module):
    """1x1 then 3x3, or (CSPNeXt) 3x3 then a separable 5x5."""

    def __init__(self, dim: int, next_kind: bool) -> None:
        super().__init__()
        plain = [ConvLayer(dim, dim), ConvLayer(dim, dim, 3)]
        separable = [ConvLayer(dim, dim, 3), ConvLayer(dim, dim, 5, groups=dim), ConvLayer(dim, dim)]
        self.layers = nn.Sequential(*(separable if next_kind else plain))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class CspLayer(nn.Module):
    """Half of the channels go through bottlenecks, half do not; CSPNeXt weighs the channels afterwards."""

    def __init__(self, dim: int, out_dim: int, count: int, next_kind: bool = False) -> None:
        super().__init__()
        half = out_dim // 2
        self.main, self.side = ConvLayer(dim, half), ConvLayer(dim, half)
        self.blocks = nn.Sequential(*(Bottleneck(half, next_kind) for _ in range(count)))
        self.attention = nn.Conv2d(out_dim, out_dim, 1) if next_kind else None
        self.out = ConvLayer(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.blocks(self.main(x)), self.side(x)], dim=1)
        if self.attention is not None:
            x = x * functional.hardsigmoid(self.attention(x.mean(dim=(2, 3), keepdim=True)))
        return self.out(x)


class PoolingPyramid(nn.Module):
    """Maxima over 5, 9 and 13 cells beside each other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.narrow, self.wide = ConvLayer(dim, dim // 2), ConvLayer(dim * 2, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        return self.wide(torch.cat([x, *(functional.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13))], dim=1))


class YoloxL(nn.Module):
    """The layers of YOLOX-l: [n, 3, 640, 640] -> [n, 8400, 85]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvLayer(12, 64, 3)
        self.stage2 = nn.Sequential(ConvLayer(64, 128, 3, 2), CspLayer(128, 128, 3))
        self.stage3 = nn.Sequential(ConvLayer(128, 256, 3, 2), CspLayer(256, 256, 9))
        self.stage4 = nn.Sequential(ConvLayer(256, 512, 3, 2), CspLayer(512, 512, 9))
        self.stage5 = nn.Sequential(ConvLayer(512, 1024, 3, 2), PoolingPyramid(1024), CspLayer(1024, 1024, 3))
        self.narrow5, self.up4 = ConvLayer(1024, 512), CspLayer(1024, 512, 3)
        self.narrow4, self.up3 = ConvLayer(512, 256), CspLayer(512, 256, 3)
        self.down3, self.down4 = ConvLayer(256, 256, 3, 2), ConvLayer(512, 512, 3, 2)
        self.out4, self.out5 = CspLayer(512, 512, 3), CspLayer(1024, 1024, 3)
        self.heads = nn.ModuleList(YoloxHead(dim) for dim in (256, 512, 1024))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pixel_unshuffle(x, 2)
        third = self.stage3(self.stage2(self.stem(x)))
        fourth = self.stage4(third)
        fifth = self.narrow5(self.stage5(fourth))
        middle = self.narrow4(self.up4(torch.cat([_twice(fifth), fourth], dim=1)))
        first = self.up3(torch.cat([_twice(middle), third], dim=1))
        second = self.out4(torch.cat([self.down3(first), middle], dim=1))
        last = self.out5(torch.cat([self.down4(second), fifth], dim=1))
        found = [head(level).flatten(2) for head, level in zip(self.heads, (first, second, last), strict=True)]
        return torch.cat(found, dim=2).transpose(1, 2)


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0)


class YoloxHead(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = ConvLayer(dim, 256)
        self.classes, self.boxes = (nn.Sequential(ConvLayer(256, 256, 3), ConvLayer(256, 256, 3)) for _ in range(2))
        self.class_scores, self.box_and_object = nn.Conv2d(256, 80, 1), nn.Conv2d(256, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.box_and_object(self.boxes(x)), self.class_scores(self.classes(x)).sigmoid()], dim=1)


class RtmPoseL(nn.Module):
    """The layers of RTMPose-l for 133 points: [n, 3, 384, 288] -> [n, 133, 576] and [n, 133, 768]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvLayer(3, 32, 3, 2), ConvLayer(32, 32, 3), ConvLayer(32, 64, 3)]
        for dim, count in ((128, 3), (256, 6), (512, 6), (1024, 3)):
            layers.append(ConvLayer(dim // 2, dim, 3, 2))
            layers += [PoolingPyramid(dim)] if dim == 1024 else []
            layers.append(CspLayer(dim, dim, count, next_kind=True))
        self.backbone = nn.Sequential(*layers)
        self.points = nn.Conv2d(1024, 133, 7, padding=3)
        self.embed = nn.Linear(12 * 9, 256)
        self.gate, self.out = nn.Linear(256, 2 * 512 + 128), nn.Linear(512, 256)
        self.x, self.y = nn.Linear(256, 576), nn.Linear(256, 768)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(self.points(self.backbone(pictures)).flatten(2))
        gate, values, base = torch.split(functional.silu(self.gate(tokens)), [512, 512, 128], dim=-1)
        attention = functional.relu(base @ base.transpose(1, 2) / 128**0.5) ** 2 / 133
        tokens = tokens + self.out(gate * (attention @ values))
        return self.x(tokens), self.y(tokens)


class Stopwatch:
    """Seconds by name; while it is on, it waits for the device before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.on = device, defaultdict[str, float](float), False

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        synchronise(self.device)
        begun = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] += time.perf_counter() - begun


class StandIn:
    """Does a network's work, and answers what is given; has the interface of services.pose.onnx.OnnxNetwork."""

    source, provider, gives, batch = "stand-in", "torch", "", OnnxSettings().max_batch

    def __init__(
        self, name: str, network: nn.Module, size: tuple[int, int], answers: Mapping[str, Any], watch: Stopwatch
    ) -> None:
        self._name, self._network, self._watch = name, network.to(watch.device).eval(), watch
        self.device, (self.height, self.width) = watch.device, size
        self.answer(answers)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(f"{name}: {parameters / 1e6:.1f} million parameters, released: {RELEASED[name] / 1e6:.1f}")

    def answer(self, answers: Mapping[str, Any]) -> None:
        """What is found in every picture from now on."""
        self._answers = {name: torch.from_numpy(values).to(self.device) for name, values in answers.items()}
        self.shapes = {name: values.shape for name, values in answers.items()}

    @torch.inference_mode()
    def run_on_device(self, pictures: Tensor) -> dict[str, Tensor]:
        with self._watch.measure(self._name):
            for start in range(0, len(pictures), self.batch):
                synchronise(self.device)
                self._network(pictures[start : start + self.batch])
                synchronise(self.device)
        count = len(pictures)
        return {name: values.expand(count, *values.shape).contiguous() for name, values in self._answers.items()}

    def run(self, pictures: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
        """Where there is no GPU."""
        return {name: values.numpy() for name, values in self.run_on_device(torch.from_numpy(pictures)).items()}


def one_person(side: int, centred: bool) -> npt.NDArray[np.float32]:
    """The detector's output [8400, 85] for BOX: in the first cell of stride 8."""
    ratio = side / max(HEIGHT, WIDTH)
    top = (side - int(HEIGHT * ratio)) // 2 if centred else 0
    left, upper, right, lower = (value * ratio for value in BOX)
    raw = np.zeros((NUM_CELLS, 85), np.float32)
    raw[0, :2] = (left + right) / 2 / 8, ((upper + lower) / 2 + top) / 8
    raw[0, 2:4] = np.log((right - left) / 8), np.log((lower - upper) / 8)
    raw[0, 4:6] = 0.95
    return raw


def seen_points() -> dict[str, npt.NDArray[np.float32]]:
    """The keypoint network's output for 133 points: a body all over the crop, a face and hands of their usual size."""
    generator = np.random.default_rng(0)
    middle, reach = np.full((133, 2), (288, 384)), np.full((133, 1), 200)
    for part, place, size in ((slice(23, 91), (288, 110), 45), (slice(91, 112), (130, 380), 30)):
        middle[part], reach[part] = place, size
    middle[112:], reach[112:] = (450, 380), 30
    bins = np.rint(middle + reach * generator.uniform(-1, 1, (133, 2))).astype(int)
    found = {name: np.zeros((133, count), np.float32) for name, count in (("x", 576), ("y", 768))}
    for axis, values in enumerate(found.values()):
        values[np.arange(133), bins[:, axis]] = 0.9
    return found


class Models(NetworkModels):
    """The networks of the chain."""

    def __init__(
        self,
        watch: Stopwatch,
        joints: npt.NDArray[np.float32],
        batch_of: Callable[[int, int], Batch] | None = None,
        max_batch: int = StandIn.batch,
    ) -> None:
        """Stand-ins look at `max_batch` pictures together; `batch_of` as for NetworkModels."""
        self._watch, self._located, self._at = watch, joints, 0
        # NLF's pictures lie in the middle of theirs
        self._corner, self._middle = ({"output": one_person(640, centred)} for centred in (False, True))
        yolox: Any = StandIn("person detector", YoloxL(), (640, 640), self._corner, watch)
        whole_body: Any = StandIn("whole-body keypoints", RtmPoseL(), (384, 288), seen_points(), watch)
        yolox.batch = whole_body.batch = max_batch
        super().__init__(YoloxDetector(yolox), WholeBodyEstimator(whole_body), _nlf(watch), {}, batch_of)
        self._yolox = yolox

    def people(self, frames: Sequence[Frame], *, phantom: bool) -> list[list[Person]]:
        self._yolox.answer(self._corner)
        with self._watch.measure("2D: pictures in, networks, points out"):
            return super().people(frames, phantom=phantom)

    def joints(self, frames: Sequence[Frame], quirks: NlfQuirks) -> npt.NDArray[np.float32]:
        self._yolox.answer(self._middle)
        with self._watch.measure("3D: detector again, NLF, plausibility"):
            super().joints(frames, quirks)
        self._at = (self._at + len(frames)) % len(self._located)
        return self._located[self._at - len(frames) :][: len(frames)]


def _nlf(watch: Stopwatch) -> NlfEstimator:
    estimator = random_nlf(watch.device)
    model = estimator.model
    model.heatmap_head.weight_field.gps_net.maxi.fill_(1)
    if watch.device.type == "cuda":
        model.backbone.half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        model.heatmap_head.layer.half()
    located = model.forward

    def timed(*arguments: Any) -> Any:
        with watch.measure("NLF network"):
            return located(*arguments)

    model.forward = timed  # type: ignore[method-assign, assignment]
    print(f"NLF: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} million parameters")
    return estimator


def random_nlf(device: torch.device) -> NlfEstimator:
    """The estimator at the released size, with random weights."""
    config = NlfConfig(proc_side=384, stride=32, centered_stride=True, depth=8, box_size_m=2.2)
    sizes = HeadSizes(OUT_CHANNELS, 512, 512, 2048, 1024, 1024, 384)
    features = efficientnet(BACKBONES[config.backbone], centered_stride=True)
    model = CropModel(config, sizes, features).to(device).eval().requires_grad_(False)
    return NlfEstimator(config, model, torch.rand(NUM_POINTS, 3, device=device))


def run(extractor: PoseExtractor, clip: Clip) -> dict[str, float]:
    """Seconds of each step, of the first message from it on; frames are brought to what the service sends."""
    last = time.perf_counter()
    steps = defaultdict[str, float](float)
    for item in extractor.extract(clip, None, HABITS["recommended"]):
        if isinstance(item, Progress):
            now = time.perf_counter()
            steps[item.step] += now - last
            last = now
        elif isinstance(item, Tensor):
            halved(item).cpu().numpy()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pose_chain", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, default=97)
    parser.add_argument("--batch", type=int, help="frames together, if not as the service has them")
    parser.add_argument("--source", default=f"{WIDTH}x{HEIGHT}", help="size of the video, which is scaled if another")
    parser.add_argument("--profile", action="store_true", help="list the functions that take most")
    options = parser.parse_args()
    device = torch.zeros(0, device=options.device).device
    torch.backends.cudnn.allow_tf32 = True
    width, height = map(int, options.source.split("x"))
    frames = np.random.default_rng(0).integers(0, 256, (options.frames, height, width, 3), dtype=np.uint8)
    watch = Stopwatch(device)
    batch_of = None if options.batch is None else lambda height, width: Batch(options.batch)
    extractor = PoseExtractor(Models(watch, dancing(options.frames, 1)[:, 0], batch_of))
    clip = Clip(lambda: iter(frames), options.frames, HEIGHT, WIDTH)
    run(extractor, clip)  # warms up
    steps = run(extractor, clip)
    watch.on = True
    run(extractor, clip)
    watch.on = False
    total = sum(steps.values())
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{place}: {options.frames} frames of {options.source} at {WIDTH}x{HEIGHT} in {total:.2f} s, "
        f"{options.frames / total:.1f} frames/s"
    )
    for title, parts in (("steps", steps), ("within them", watch.seconds)):
        print(title)
        for name, seconds in parts.items():
            print(f"  {name:<38} {1000 * seconds / options.frames:7.2f} ms a frame  {seconds / total:6.1%}")
    if options.profile:
        with cProfile.Profile() as profile:
            run(extractor, clip)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
