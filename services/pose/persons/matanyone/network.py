"""MatAnyone's network: pictures and masks -> features and memory values; what was remembered -> alpha mattes.

The people of a picture are the batch: they share its features and do not see each other.

Source: pq-yang/MatAnyone e5ddc53 (code and weights: NTU S-Lab License 1.0, non-commercial only). This is an own
implementation of the published architecture; the weights that it is made for carry that licence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.pose.persons.matanyone.blocks import (
    Fuser,
    ResidualBlock,
    SensoryUpdate,
    area_resize,
)
from services.pose.persons.matanyone.config import MatAnyoneConfig
from services.pose.persons.matanyone.objects import ObjectSummarizer, ObjectTransformer
from services.pose.persons.matanyone.resnet import MASK_DIM, PIXEL_DIMS, PixelEncoder, mask_layers

MULTIPLE = 16
"""Pictures are padded to a multiple of this in both directions."""


class PictureFeatures(NamedTuple):
    """What the network sees in one picture.

    pixels [1, pixel_dim, h, w]; key, selection [1, key_dim, h, w]; shrinkage [1, 1, h, w];
    scales: features at 1/16, 1/8, 1/4, 1/2 and the normalised picture, widths as in PIXEL_DIMS.
    """

    pixels: Tensor
    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    scales: tuple[Tensor, ...]


class KeyProjection(nn.Module):
    """Features at 1/16 -> keys by which memory is searched, and how much each cell and channel counts."""

    def __init__(self, channels: int, config: MatAnyoneConfig) -> None:
        super().__init__()
        self.pix_feat_proj = nn.Conv2d(channels, config.pixel_dim, 1)
        self.key_proj = nn.Conv2d(config.pixel_dim, config.key_dim, 3, padding=1)
        self.d_proj = nn.Conv2d(config.pixel_dim, 1, 3, padding=1)
        self.e_proj = nn.Conv2d(config.pixel_dim, config.key_dim, 3, padding=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.pix_feat_proj(features)
        return self.key_proj(x), self.d_proj(x) ** 2 + 1, torch.sigmoid(self.e_proj(x))


class MaskEncoder(nn.Module):
    """A picture and a mask -> what memory keeps of a person, and the recurrent state after having seen it."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3 = mask_layers()
        self.fuser = Fuser(config.pixel_dim, MASK_DIM, config.value_dim)
        self.sensory_update = SensoryUpdate(config.value_dim, config.sensory_dim)

    def forward(self, picture: Tensor, pixels: Tensor, masks: Tensor) -> Tensor:
        """[1, 3, H, W] normalised, [1, pixel_dim, h, w] and [P, 1, H, W] -> values [P, value_dim, h, w]."""
        x = torch.cat([picture.expand(len(masks), -1, -1, -1), masks], dim=1)
        # pooled before the ReLU, other than in the picture's encoder; the same numbers, half the work
        x = functional.relu(functional.max_pool2d(self.bn1(self.conv1(x)), 3, stride=2, padding=1))
        values: Tensor = self.fuser(pixels, self.layer3(self.layer2(self.layer1(x))))
        return values


class SensoryCompression(nn.Module):
    """Joins what was read from memory with the recurrent state, the last mask and the picture's features."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        self.fuser = Fuser(config.pixel_dim, config.value_dim, config.embed_dim)
        self.sensory_compress = nn.Conv2d(config.sensory_dim + 1, config.value_dim, 1)

    def forward(self, pixels: Tensor, readout: Tensor, sensory: Tensor, masks: Tensor) -> Tensor:
        """Masks [P, 1, h, w] -> [P, embed_dim, h, w]."""
        state = self.sensory_compress(torch.cat([sensory, masks], dim=1))
        fused: Tensor = self.fuser(pixels, readout + state)
        return fused


class DecoderFeatures(nn.Module):
    """Widths of the picture's features at 1/8 to 1/1 -> those that the decoder's steps start with."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        widths = zip(PIXEL_DIMS[1:], config.up_dims[:-1], strict=True)
        self.transforms = nn.ModuleList(nn.Conv2d(channels, out, 1) for channels, out in widths)

    def forward(self, scales: tuple[Tensor, ...]) -> list[Tensor]:
        return [transform(x) for transform, x in zip(self.transforms, scales[1:], strict=True)]


class UpsampleStep(nn.Module):
    """Twice the size, with the picture's features of that size added."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_conv = ResidualBlock(channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        larger = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        out: Tensor = self.out_conv(larger + skip)
        return out


class DecoderSensoryUpdate(SensoryUpdate):
    """The recurrent step by what the decoder has at each of its sizes."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__(config.embed_dim, config.sensory_dim)
        first, *rest, last = config.up_dims
        widths = [first, *rest, last + 1]  # the largest comes with the alpha matte
        self.g16_conv, self.g8_conv, self.g4_conv, self.g2_conv, self.g1_conv = (
            nn.Conv2d(width, config.embed_dim, 1) for width in widths
        )

    def forward(self, steps: list[Tensor], sensory: Tensor) -> Tensor:
        """The decoder's maps, smallest first -> sensory [P, sensory_dim, h, w]."""
        convs = (self.g16_conv, self.g8_conv, self.g4_conv, self.g2_conv, self.g1_conv)
        size = steps[0].shape[-2:]
        seen = sum(conv(area_resize(x, size)) for conv, x in zip(convs, steps, strict=True))
        return self.update(seen, sensory)


class MaskDecoder(nn.Module):
    """What is known of each person at 1/16 of the size -> alpha mattes at full size."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        dims = config.up_dims
        self.sensory_update = DecoderSensoryUpdate(config)
        self.decoder_feat_proc = DecoderFeatures(config)
        self.up_16_8 = UpsampleStep(dims[0], dims[1])
        self.up_8_4 = UpsampleStep(dims[1], dims[2])
        self.up_4_2 = UpsampleStep(dims[2], dims[3])
        self.up_2_1 = UpsampleStep(dims[3], dims[4])
        self.pred_mat = nn.Conv2d(dims[4], 1, 3, padding=1)

    def forward(
        self, scales: tuple[Tensor, ...], x: Tensor, sensory: Tensor, *, update_sensory: bool
    ) -> tuple[Tensor, Tensor]:
        """[P, embed_dim, h, w] -> mattes [P, 1, H, W], not yet between 0 and 1, and the recurrent state."""
        steps = [x]
        for up, skip in zip(
            (self.up_16_8, self.up_8_4, self.up_4_2, self.up_2_1), self.decoder_feat_proc(scales), strict=True
        ):
            steps.append(up(steps[-1], skip))
        mattes: Tensor = self.pred_mat(functional.relu(steps[-1]))
        if update_sensory:
            steps[-1] = torch.cat([steps[-1], mattes], dim=1)
            sensory = self.sensory_update(steps, sensory)
        return mattes, sensory


class ChangePredictor(nn.Module):
    """How likely each cell has changed since the last frame, 0 to 1."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        channels = 2 * config.pixel_dim + 1 + config.value_dim
        self.conv1x1_v2 = nn.Conv2d(channels, 64, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv3x3 = nn.Conv2d(64, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3x3_out = nn.Conv2d(32, 1, 3, padding=1, bias=False)

    def forward(self, last_pixels: Tensor, pixels: Tensor, last_masks: Tensor, difference: Tensor) -> Tensor:
        """[1, pixel_dim, h, w] twice, masks [P, 1, h, w], change of value [P, value_dim, h, w] -> [P, 1, h, w]."""
        count = len(difference)
        pictures = torch.cat([last_pixels, pixels], dim=1).expand(count, -1, -1, -1)
        x = torch.cat([pictures, last_masks, difference], dim=1)
        x = functional.relu(self.bn1(self.conv1x1_v2(x)))
        x = functional.relu(self.bn2(self.conv3x3(x)))
        return torch.sigmoid(self.conv3x3_out(x))


class MatAnyone(nn.Module):
    """All weights; `propagation.Propagation` has what is carried from frame to frame."""

    def __init__(self, config: MatAnyoneConfig) -> None:
        super().__init__()
        self.config = config
        self.pixel_encoder = PixelEncoder()
        self.pix_feat_proj = nn.Conv2d(PIXEL_DIMS[0], config.pixel_dim, 1)
        self.key_proj = KeyProjection(PIXEL_DIMS[0], config)
        self.mask_encoder = MaskEncoder(config)
        self.mask_decoder = MaskDecoder(config)
        self.pixel_fuser = SensoryCompression(config)
        self.object_transformer = ObjectTransformer(config)
        self.object_summarizer = ObjectSummarizer(config)
        self.temp_sparity = ChangePredictor(config)

    @property
    def device(self) -> torch.device:
        return self.pix_feat_proj.weight.device

    def see(self, picture: Tensor) -> PictureFeatures:
        """[1, 3, H, W] in [0, 1], sides multiples of MULTIPLE."""
        mean, std = (
            picture.new_tensor(values)[:, None, None] for values in (self.config.pixel_mean, self.config.pixel_std)
        )
        scales = self.pixel_encoder((picture - mean) / std)
        key, shrinkage, selection = self.key_proj(scales[0])
        return PictureFeatures(self.pix_feat_proj(scales[0]), key, shrinkage, selection, scales)

    def remember(self, seen: PictureFeatures, masks: Tensor) -> Tensor:
        """Masks [P, 1, H, W] -> values [P, value_dim, h, w]."""
        values: Tensor = self.mask_encoder(seen.scales[-1], seen.pixels, masks)
        return values

    def matte(
        self,
        seen: PictureFeatures,
        readout: Tensor,
        sensory: Tensor,
        last_masks: Tensor,
        summaries: Tensor,
        *,
        update_sensory: bool,
    ) -> tuple[Tensor, Tensor]:
        """What was read from memory -> mattes.

        Args:
            readout: [P, value_dim, h, w].
            sensory: [P, sensory_dim, h, w].
            last_masks: [P, 1, H, W], of the last frame.
            summaries: [P, num_queries, embed_dim + 1], summed over the memorised frames.

        Returns:
            mattes [P, 1, H, W], not yet between 0 and 1, and the recurrent state.
        """
        small = area_resize(last_masks, readout.shape[-2:])
        x = self.pixel_fuser(seen.pixels, readout, sensory, small)
        x = self.object_transformer(x, summaries)
        mattes, sensory = self.mask_decoder(seen.scales, x, sensory, update_sensory=update_sensory)
        return mattes, sensory
