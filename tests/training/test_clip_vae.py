"""The VAE as it is trained computes what the served VAE computes, and starts from weights that can learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from services.vae.model import CausalConv3d, Past, Vae, VaeConfig
from training.clip_vae import ClipVae, initialise, matrices_and_rest


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(0)
    vae = Vae(VaeConfig(dim=8))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(std=0.1 if parameter.dim() > 1 else 1.0)
    return vae


def frames(count: int) -> Tensor:
    return torch.rand(1, 3, count, 16, 16, generator=torch.Generator().manual_seed(count)) * 2 - 1


@pytest.mark.parametrize("count", [1, 5, 9])
@torch.no_grad()
def test_whole_clip_form_gives_the_served_numbers(vae: Vae, count: int) -> None:
    clip_vae, clip = ClipVae(vae, compiled=False), frames(count)
    mean, log_variance = clip_vae.posterior(clip)
    served_mean, served_log_variance = vae.posterior(clip, Past())
    torch.testing.assert_close(mean, served_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_variance, served_log_variance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip_vae.generate(mean), vae.generate(mean, Past()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.normalise(mean), vae.encode(clip), rtol=1e-4, atol=1e-5)


def test_whole_clip_form_has_the_same_gradients(vae: Vae) -> None:
    gradients = []
    for form in (ClipVae(vae, compiled=False).posterior, lambda clip: vae.posterior(clip, Past())):
        vae.zero_grad()
        form(frames(5))[0].square().sum().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        gradients.append([p.grad.clone() for p in vae.encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(list(vae.encoder.parameters()))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-6


@torch.no_grad()
def test_fresh_weights_keep_the_signal_and_hardly_sample() -> None:
    vae = Vae(VaeConfig(dim=8))
    initialise(vae, torch.Generator().manual_seed(0))
    clip_vae = ClipVae(vae, compiled=False)
    mean, log_variance = clip_vae.posterior(frames(9))
    assert 0.1 < mean.std() < 3
    torch.testing.assert_close(log_variance, torch.full_like(log_variance, -6.0))
    assert 0.1 < clip_vae.generate(mean / mean.std()).std() < 3


@torch.no_grad()
def test_fresh_changes_of_rate_copy_the_newest_frame() -> None:
    vae = Vae(VaeConfig(dim=8))
    initialise(vae, torch.Generator().manual_seed(0))
    copies = [m for m in vae.modules() if isinstance(m, CausalConv3d) and m.kernel_size == (3, 1, 1)]
    assert len(copies) == 4
    for layer in copies:
        x = torch.randn(1, layer.in_channels, 3, 2, 2)
        newest = nn.functional.conv3d(x, layer.weight, layer.bias)[:, :, 0]
        torch.testing.assert_close(newest, x[:, :, 2].repeat(1, layer.out_channels // layer.in_channels, 1, 1))


def test_every_weight_has_one_optimiser() -> None:
    vae = Vae(VaeConfig(dim=8))
    matrices, rest = matrices_and_rest(vae)
    assert {id(p) for p in vae.parameters()} == {id(p) for p in (*matrices, *rest)}
    assert len(matrices) + len(rest) == len(list(vae.parameters()))
    assert all(parameter.dim() >= 4 for parameter in matrices)
    # first and last layers are no matrices between hidden layers
    for ends in (vae.encoder.conv1, vae.conv1, vae.conv2):
        assert id(ends.weight) in {id(p) for p in rest}
