"""Results come to host memory in their order, one behind the computation on a GPU."""

from __future__ import annotations

import pytest
import torch

from services.vae.transfer import OneBehind, to_device

CPU = torch.device("cpu")


def test_results_on_the_cpu_are_not_held() -> None:
    leaving, first, second = OneBehind(), torch.ones(2), torch.zeros(1)
    [(one, other)] = leaving.add(first, second)
    assert one is first
    assert other is second
    assert leaving.rest() == []


def test_frames_for_the_cpu_stay_where_they_are() -> None:
    frames = torch.ones(3)
    assert to_device(frames, CPU) is frames


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_of_a_gpu_come_with_the_next_ones() -> None:
    device, leaving = torch.device("cuda"), OneBehind()
    sums = []
    for number in range(5):
        frames = to_device(torch.full((1000, 1000), float(number)), device)
        sums.append([(a.sum().item() / 1e6, b.item()) for a, b in leaving.add(frames, frames.mean())])
    sums.append([(a.sum().item() / 1e6, b.item()) for a, b in leaving.rest()])
    assert sums == [[], *([(float(number), float(number))] for number in range(5))]
    assert leaving.rest() == []
