"""What an extraction tells while it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gaps:
    """What was missing of a person: the frames that were bridged, and those in which they are left out."""

    bridged_frames: tuple[int, ...] = ()
    absent_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a step has come: `detect`, `track`, `joints`, `align` or `render`. The message that ends a step also tells
    what is known by then to be missing, person by person."""

    step: str
    completed_frames: int
    total_frames: int
    gaps: tuple[Gaps, ...] = ()

    @property
    def bridged_frames(self) -> tuple[int, ...]:
        """The frames in which anybody was bridged."""
        return tuple(sorted({frame for gaps in self.gaps for frame in gaps.bridged_frames}))
