"""What a released NLF estimator is made with, and where it may depart from what the released programs do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NlfConfig:
    """Settings that stand in the checkpoint's side file; the sizes of the layers are read from the tensors.

    Attributes:
        proc_side: side of a crop, pixels.
        stride: pixels of a crop per cell of the heatmaps.
        centered_stride: cell centres lie at stride/2, 3/2 stride, ...; otherwise at 0, stride, ...
        depth: layers of the heatmap volume.
        box_size_m: metres that a crop's side spans in the relative coordinates.
        uncertainty_bias: added before the softplus.
        uncertainty_floor: added after it.
        fix_uncertainty_factor: uncertainties are handed out as they are; otherwise three times as large.
        mix_3d_inside_fov: share of the 3D-based position for points inside the crop; the rest is back-projected.
        weak_perspective: the person's place is found with one scale for all points instead of full perspective.
        pad_white_pixels: what lies outside the picture is white in the crops, otherwise black.
        backbone: a name in `backbone.BACKBONES`.
    """

    proc_side: int
    stride: int
    centered_stride: bool
    depth: int
    box_size_m: float
    uncertainty_bias: float = 0.0
    uncertainty_floor: float = 0.001
    fix_uncertainty_factor: bool = False
    mix_3d_inside_fov: float = 0.5
    weak_perspective: bool = False
    pad_white_pixels: bool = True
    backbone: str = "efficientnetv2-l"

    @property
    def uncertainty_factor(self) -> int:
        """By how much the uncertainties handed out exceed those that the head works with."""
        return 1 if self.fix_uncertainty_factor else 3


@dataclass(frozen=True)
class HeadSizes:
    """Widths of the head's layers, as the checkpoint's tensors have them."""

    in_channels: int
    link_dim: int
    fourier_dim: int
    gps_hidden_dim: int
    gps_dim: int
    field_dim: int
    field_hidden_dim: int


@dataclass(frozen=True)
class NlfSizes:
    """All that the bytes of an estimator follow from; the defaults are those of the released nlf_l_multi_0.3.2.

    Attributes:
        num_points: of the body, all of which are located.
    """

    config: NlfConfig = NlfConfig(proc_side=384, stride=32, centered_stride=True, depth=8, box_size_m=2.2)
    head: HeadSizes = HeadSizes(
        in_channels=1280,
        link_dim=512,
        fourier_dim=512,
        gps_hidden_dim=2048,
        gps_dim=1024,
        field_dim=1024,
        field_hidden_dim=384,
    )
    num_points: int = 1048


@dataclass(frozen=True)
class NlfQuirks:
    """Habits of the released programs that look like mistakes; `QUIRKS` has them as each program does.

    Attributes:
        linearise_twice: crops are cut from (u/255)^4.84 instead of linear light, (u/255)^2.2. Default: as released.
            All poses that SCAIL was trained on, and all of its published results, were made so; undoing it gives the
            network what it was probably trained on, but that it helps has not been measured.
        half_precision_crops: pictures are inverted, scaled and sampled in float16, at places rounded to float16. With
            two linearisations every level up to 45 becomes black, and places are off by up to 0.2 pixels. Default: no;
            it is a numerical habit, so the more exact way is taken.
        negative_odd_batches: pictures are inverted in place for the white padding once for each batch of crops, so the
            second, fourth, ... batch of the same pictures gets negatives. Default: no; it is an accident of batching
            that makes a person's pose depend on how many others there are.
    """

    linearise_twice: bool = True
    half_precision_crops: bool = False
    negative_odd_batches: bool = False


_AS_RELEASED = NlfQuirks(linearise_twice=True, half_precision_crops=True, negative_odd_batches=True)

# Wan2GP took the picture handling of the official TorchScript over unchanged; only the detector's network differs
QUIRKS: Mapping[str, NlfQuirks] = {"wan2gp": _AS_RELEASED, "official": _AS_RELEASED, "default": NlfQuirks()}
