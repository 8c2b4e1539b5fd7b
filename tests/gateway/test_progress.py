"""Progress of one generation: what is told of all its windows together."""

from __future__ import annotations

from bunraku.v1.denoiser_pb2 import ForwardPasses
from gateway.jobs.claims import Told
from gateway.progress import ProgressReport


async def unread(told: Told) -> None:
    """Nobody reads it."""


def test_forward_passes_are_those_of_all_windows_and_of_each_what_was_said_last() -> None:
    report = ProgressReport(unread)
    assert report.forward_passes is None
    assert not report.message().HasField("forward_passes")
    report.denoised(0, ForwardPasses(computed=7, reused=4, omitted=1))
    report.denoised(1, ForwardPasses(computed=100))
    report.denoised(1, ForwardPasses(computed=6, reused=6))  # the window was begun anew
    assert report.forward_passes == ForwardPasses(computed=13, reused=10, omitted=1)
    assert report.message().forward_passes == report.forward_passes
