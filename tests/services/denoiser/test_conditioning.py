"""Masks, known frames and noise."""

import pytest
import torch

from services.denoiser.conditioning import (
    animation,
    first_frame_to_video,
    image_to_video,
    known_frames_mask,
    seeded_noise,
    text_to_video,
)
from tests.services.denoiser.tiny import animation_of, normal


@pytest.mark.parametrize(
    ("frames_given", "folded"),
    [
        (0, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (1, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (3, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
        (5, [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]),
        (100, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_given_frames_are_folded_to_four_channels(frames_given: int, folded: list[list[int]]) -> None:
    mask = known_frames_mask(frames_given, 3, 2, 5)
    assert mask.shape == (4, 3, 2, 5)
    assert mask[:, :, 0, 0].T.tolist() == folded
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))


def test_negative_number_of_given_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="frames_given must be at least 0, got -1"):
        known_frames_mask(-1, 3, 2, 2)


def test_image_to_video_puts_the_mask_between_noise_and_image() -> None:
    image_latents, noise = normal(1, 16, 3, 4, 4), normal(1, 16, 3, 4, 4, seed=1)
    model_input = image_to_video(image_latents, 1, 24).model_input(noise)
    assert torch.equal(model_input[:, :16], noise)
    assert torch.equal(model_input[0, 16:20], known_frames_mask(1, 3, 4, 4))
    assert torch.equal(model_input[:, 20:], image_latents)


def test_animation_marks_reference_and_pose_as_given() -> None:
    conditioning = animation_of(frames=2)
    model_input = conditioning.model_input(normal(1, 16, 3, 8, 8))
    assert model_input.shape == (1, 20, 3, 8, 8)
    assert model_input[0, 16:, :, 0, 0].T.tolist() == [[1] * 4, [0] * 4, [0] * 4]
    assert conditioning.pose_latents is not None
    assert conditioning.pose_latents.shape == (1, 20, 2, 4, 4)
    assert bool((conditioning.pose_latents[:, 16:] == 1).all())


def test_animation_keeps_reference_and_history_and_returns_the_video() -> None:
    reference, history = normal(1, 16, 1, 8, 8), normal(1, 16, 2, 8, 8, seed=1)
    conditioning = animation(
        reference,
        normal(1, 16, 4, 4, 4),
        24,
        pose_time_origin=1,
        history_latents=history,
        frames_given=5,
    )
    state = normal(1, 16, 5, 8, 8, seed=2)
    kept = conditioning.with_known(state)
    assert torch.equal(kept, torch.cat((reference, history, state[:, :, 3:]), dim=2))
    assert torch.equal(conditioning.result(state), kept[:, :, 1:])
    assert conditioning.channels is not None
    assert conditioning.channels[0, :, :, 0, 0].T.tolist() == [[1] * 4, [1] * 4, [1] * 4, [0] * 4, [0] * 4]


def test_animation_refuses_sizes_that_do_not_belong_together() -> None:
    reference, pose = normal(1, 16, 1, 8, 8), normal(1, 16, 2, 4, 4)
    with pytest.raises(ValueError, match="half the height and width"):
        animation(reference, normal(1, 16, 2, 4, 6), 24, pose_time_origin=1)
    with pytest.raises(ValueError, match="multiples of 4"):
        animation(normal(1, 16, 1, 6, 8), normal(1, 16, 2, 3, 4), 24, pose_time_origin=1)
    with pytest.raises(ValueError, match=r"those of 5 given frames .* got 1"):
        animation(reference, pose, 24, pose_time_origin=1, history_latents=reference, frames_given=5)
    with pytest.raises(ValueError, match="clip of 2 latent frames, got 3"):
        animation(reference, pose, 24, pose_time_origin=1, history_latents=normal(1, 16, 3, 8, 8), frames_given=9)


def test_known_first_frame_is_at_timestep_zero_token_by_token() -> None:
    conditioning = first_frame_to_video(normal(1, 48, 1, 4, 6), (3, 4, 6), 24)
    latents = normal(1, 48, 3, 4, 6)
    assert conditioning.timesteps(torch.tensor(637), latents).tolist() == [[0] * 6 + [637] * 12]
    assert torch.equal(conditioning.with_known(latents)[:, :, 1:], latents[:, :, 1:])


def test_other_tasks_give_a_sample_one_timestep() -> None:
    latents = normal(2, 16, 3, 8, 8)
    for conditioning in (text_to_video((3, 8, 8), 24), animation_of()):
        assert conditioning.timesteps(torch.tensor(637), latents).tolist() == [637, 637]


def test_same_seed_gives_the_same_noise() -> None:
    assert torch.equal(seeded_noise((1, 16, 3, 2, 2), 7), seeded_noise((1, 16, 3, 2, 2), 7))
    assert not torch.equal(seeded_noise((1, 16, 3, 2, 2), 7), seeded_noise((1, 16, 3, 2, 2), 8))
    noise = seeded_noise((50000,), 1)
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
