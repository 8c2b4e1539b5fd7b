"""What a run is conditioned on besides the prompt, as plain data: channels beside the latents, frames that are known.

Every task builds one `Conditioning`; the loop in `denoise.py` knows none of them. Latents are [B, C, T, h, w] float32,
T = (num_frames - 1) // 4 + 1, and a token is a 1x2x2 patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.denoiser.rope import Rope, scail_rope, video_rope

MASK_CHANNELS = 4  # a channel per pixel frame of a latent frame


@dataclass(frozen=True)
class Conditioning:
    """Inputs of every model call of a run."""

    rope: Rope
    channels: Tensor | None = None  # [B, c, T, h, w], follow the latents on the channel axis
    pose_latents: Tensor | None = None  # [B, 20, T', h/2, w/2]
    known: Tensor | None = None  # [B, C, K, h, w] clean latents of the first K frames of the state
    known_tokens_at_zero: bool = False  # the tokens of known frames get timestep 0 (TI2V)
    leading_frames: int = 0  # frames of the state that are no part of the result (SCAIL's reference)

    def with_known(self, latents: Tensor) -> Tensor:
        """The state with its known frames written over what the solver made of them."""
        if self.known is None:
            return latents
        return torch.cat((self.known, latents[:, :, self.known.shape[2] :]), dim=2)

    def model_input(self, latents: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, in_dim, T, h, w]."""
        return latents if self.channels is None else torch.cat((latents, self.channels), dim=1)

    def timesteps(self, timestep: Tensor, latents: Tensor) -> Tensor:
        """The timestep of each sample [B], or of each token [B, L] where known ones are at 0; CPU, as `timestep` is."""
        if self.known is None or not self.known_tokens_at_zero:
            return timestep.expand(len(latents))
        per_frame = timestep.repeat(latents.shape[2])
        per_frame[: self.known.shape[2]] = 0
        tokens_per_frame = (latents.shape[3] // 2) * (latents.shape[4] // 2)
        return per_frame.repeat_interleave(tokens_per_frame).expand(len(latents), -1)

    def result(self, latents: Tensor) -> Tensor:
        """The finished latents: known frames once more in place, leading frames cut off."""
        return self.with_known(latents)[:, :, self.leading_frames :]


def text_to_video(size: Sequence[int], head_dim: int, device: torch.device | None = None) -> Conditioning:
    """Nothing but the prompt; `size` is the [T, h, w] of the latents, `device` theirs (None: the CPU)."""
    return Conditioning(_rope(size, head_dim).to(device or torch.device("cpu")))


def image_to_video(image_latents: Tensor, frames_given: int, head_dim: int) -> Conditioning:
    """Wan 2.1 and 2.2 I2V: mask and latents of the given frames as 20 further channels.

    Args:
        image_latents: [B, 16, T, h, w], the VAE's of a clip that starts with the given frames and is grey after them.
        frames_given: given pixel frames.
        head_dim: channels of an attention head.
    """
    batch, _, *size = image_latents.shape
    mask = known_frames_mask(frames_given, *size).to(image_latents.device).expand(batch, -1, -1, -1, -1)
    return Conditioning(
        _rope(size, head_dim).to(image_latents.device), channels=torch.cat((mask, image_latents), dim=1)
    )


def first_frame_to_video(first_frame: Tensor, size: Sequence[int], head_dim: int) -> Conditioning:
    """Wan 2.2 TI2V: the first latent frame [B, 48, 1, h, w] is kept in the state and its tokens are at timestep 0."""
    return Conditioning(_rope(size, head_dim).to(first_frame.device), known=first_frame, known_tokens_at_zero=True)


def animation(
    reference_latents: Tensor,
    pose_latents: Tensor,
    head_dim: int,
    *,
    pose_time_origin: int,
    history_latents: Tensor | None = None,
    frames_given: int = 0,
) -> Conditioning:
    """SCAIL: a reference frame before the video, the pose video's tokens after it.

    The state has 1 + T frames, the reference first.

    Args:
        reference_latents: [B, 16, 1, h, w] of the reference image.
        pose_latents: [B, 16, T, h/2, w/2] of the pose video at half size; h and w multiples of 4.
        head_dim: channels of an attention head.
        pose_time_origin: time position of the first pose frame, 1 as trained or 0 as Wan2GP runs it.
        history_latents: [B, 16, K, h, w], the known first frames of a later window.
        frames_given: their pixel frames, K = (frames_given - 1) // 4 + 1.

    Raises:
        ValueError: the sizes do not belong together.
    """
    batch, _, _, height, width = reference_latents.shape
    frames = pose_latents.shape[2]
    if (height % 4, width % 4) != (0, 0) or pose_latents.shape[3:] != (height // 2, width // 2):
        raise ValueError(
            f"pose_latents must have half the height and width of reference_latents, these multiples of 4; "
            f"got {list(pose_latents.shape)} and {list(reference_latents.shape)}"
        )
    known_frames = 0 if history_latents is None else history_latents.shape[2]
    if known_frames != (frames_given + 3) // 4 or known_frames > frames:
        raise ValueError(
            f"history_latents must be those of {frames_given} given frames in a clip of {frames} latent frames, "
            f"got {known_frames}"
        )
    mask = torch.cat(
        (torch.ones(MASK_CHANNELS, 1, height, width), known_frames_mask(frames_given, frames, height, width)), dim=1
    )
    given = pose_latents.new_ones(batch, MASK_CHANNELS, *pose_latents.shape[2:])  # all pose frames are known
    return Conditioning(
        scail_rope(frames, height // 2, width // 2, head_dim, pose_time_origin=pose_time_origin).to(
            pose_latents.device
        ),
        channels=mask.to(reference_latents.device).expand(batch, -1, -1, -1, -1),
        pose_latents=torch.cat((pose_latents, given), dim=1),
        known=reference_latents if history_latents is None else torch.cat((reference_latents, history_latents), dim=2),
        leading_frames=1,
    )


def known_frames_mask(frames_given: int, latent_frames: int, rows: int, columns: int) -> Tensor:
    """Which pixel frames are given, folded to four channels per latent frame.

    The first pixel frame fills all four channels of the first latent frame (a latent frame of its own in the VAE);
    pixel frame f >= 1 is channel (f - 1) % 4 of latent frame 1 + (f - 1) // 4.

    Args:
        frames_given: pixel frames known from the start of the clip; more than it has means all.

    Returns:
        [4, latent_frames, rows, columns] float32 of zeros and ones.

    Source: Wan-Video/Wan2.2 42bf4cf wan/image2video.py.
    """
    if frames_given < 0:
        raise ValueError(f"frames_given must be at least 0, got {frames_given}")
    flags = (torch.arange(4 * (latent_frames - 1) + 1) < frames_given).float()
    folded = torch.cat((flags[:1].repeat(3), flags)).view(latent_frames, MASK_CHANNELS).T
    return folded[:, :, None, None].expand(-1, -1, rows, columns)


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal float32 noise on the CPU, the same for a seed on every machine."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _rope(size: Sequence[int], head_dim: int) -> Rope:
    frames, height, width = size
    return video_rope(frames, height // 2, width // 2, head_dim)
