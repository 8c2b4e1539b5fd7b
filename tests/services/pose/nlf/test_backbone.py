"""EfficientNetV2: its arithmetic against a plain reading of the tensors by name, and where its outputs look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from runtime.weights import build_on_meta
from services.pose.nlf.backbone import BACKBONES, OUT_CHANNELS, ShiftedConv2d, Stage, efficientnet

EPS = 1e-3
# one of each kind: fused without and with expansion, depthwise with and without stride, with and without residual
STAGES = (
    Stage(True, 1, 1, 8, 2),
    Stage(True, 4, 2, 12, 2),
    Stage(False, 4, 2, 16, 2),
    Stage(False, 6, 1, 20, 1),
    Stage(False, 6, 2, 24, 2),
)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features() -> torch.nn.Sequential:
    torch.manual_seed(1)
    module = efficientnet(STAGES, centered_stride=True)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.3)
    return module.eval().requires_grad_(False)


class Oracle:
    """The network written out over the tensors of a checkpoint, by their names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def conv_norm(self, x: Tensor, name: str, stride: int = 1, shifted: bool = False) -> Tensor:
        kernel = self.tensors[f"{name}.0.weight"]
        groups = x.shape[1] // kernel.shape[1]
        around = kernel.shape[-1] // 2
        padded = functional.pad(x, (0, 2, 0, 2) if shifted else (around,) * 4)
        y = functional.conv2d(padded, kernel, stride=stride, groups=groups)
        mean, var, scale, bias = (
            self.tensors[f"{name}.1.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + EPS).sqrt() * scale + bias

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        yield (x := functional.silu(self.conv_norm(x, "0", 2)))
        for index, stage in enumerate(STAGES, start=1):
            for repeat in range(stage.repeats):
                x = self.block(x, f"{index}.{repeat}.block", stage, stage.stride if repeat == 0 else 1, index == 5)
            yield x
        yield functional.silu(self.conv_norm(x, "6"))

    def block(self, x: Tensor, name: str, stage: Stage, stride: int, is_last: bool) -> Tensor:
        silu = functional.silu
        if stage.fused and stage.expand == 1:
            y = silu(self.conv_norm(x, f"{name}.0", stride))
        elif stage.fused:
            y = self.conv_norm(silu(self.conv_norm(x, f"{name}.0", stride)), f"{name}.1")
        else:
            y = silu(self.conv_norm(x, f"{name}.0"))
            y = silu(self.conv_norm(y, f"{name}.1", stride, shifted=is_last and stride == 2))
            gate = y.mean(dim=(2, 3))
            for fc, activation in (("fc1", silu), ("fc2", torch.sigmoid)):
                weight, bias = self.tensors[f"{name}.2.{fc}.weight"][..., 0, 0], self.tensors[f"{name}.2.{fc}.bias"]
                gate = activation(gate @ weight.T + bias)
            y = self.conv_norm(y * gate[..., None, None], f"{name}.3")
        return x + y if stride == 1 and x.shape == y.shape else y


def test_every_stage_agrees_with_a_plain_reading_of_the_tensors(features: torch.nn.Sequential, picture: Tensor) -> None:
    x = picture
    for index, expected in enumerate(Oracle(features.state_dict()).stages(picture)):
        x = features[index](x)
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_squeeze_is_to_a_quarter_of_the_channels_that_enter_the_block(features: torch.nn.Sequential) -> None:
    tensors = features.state_dict()
    assert tensors["3.0.block.2.fc1.weight"].shape == (12 // 4, 12 * 4, 1, 1)
    assert tensors["5.1.block.2.fc1.weight"].shape == (24 // 4, 24 * 6, 1, 1)


def test_centred_stride_moves_the_deepest_strided_convolution_alone() -> None:
    plain, centred = (efficientnet(STAGES, centered_stride=centred) for centred in (False, True))
    different = [
        (name, module.padding)
        for (name, module), other in zip(centred.named_modules(), plain.modules(), strict=True)
        if type(module) is not type(other) and isinstance(module, ShiftedConv2d)
    ]
    assert different == [("5.0.block.1.0", (0, 0))]


def test_shifted_convolution_starts_at_the_first_pixel() -> None:
    conv = ShiftedConv2d(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(6.0).expand(1, 1, 6, 6)
    rows = torch.tensor([3.0, 3, 2])  # how many of its three rows lie inside
    columns = torch.tensor([0.0 + 1 + 2, 2 + 3 + 4, 4 + 5])
    assert torch.equal(conv(x)[0, 0].detach(), rows[:, None] * columns)


@pytest.mark.parametrize(("name", "parameters"), [("efficientnetv2-l", 117_234_272), ("efficientnetv2-s", 20_177_488)])
def test_released_backbone_is_as_published(name: str, parameters: int) -> None:
    module = build_on_meta(lambda: efficientnet(BACKBONES[name], centered_stride=True))
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    # a cell per 32 pixels
    assert module(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, OUT_CHANNELS, 2, 3)
