"""Everything that a forward needs stands on the device of the latents: seen on the meta device, where a stray CPU tensor is refused."""

from __future__ import annotations

import torch

from services.denoiser.conditioning import animation, first_frame_to_video, image_to_video, text_to_video

META = torch.device("meta")


def test_conditioning_stands_on_the_device_of_its_latents() -> None:
    latents = torch.zeros(1, 16, 3, 8, 8, device=META)
    made = [
        animation(latents[:, :, :1], latents[..., :4, :4], 64, pose_time_origin=1),
        image_to_video(latents, 1, 64),
        first_frame_to_video(latents[:, :, :1], (3, 8, 8), 64),
        text_to_video((3, 8, 8), 64, META),
    ]
    for conditioning in made:
        tensors = [conditioning.rope.cos, conditioning.rope.sin]
        tensors += [t for t in (conditioning.channels, conditioning.pose_latents, conditioning.known) if t is not None]
        assert {tensor.device for tensor in tensors} == {META}
