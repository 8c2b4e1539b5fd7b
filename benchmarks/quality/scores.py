"""Scores, what they must reach, and the table of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        name: what is measured.
        value: the number; None where it was not measured.
        unit: `dB`, `px`, or empty for a share of 1.
        bound: that it must reach; None: it is only told.
        sense: on which side of the bound it must be.
        count: clips, or pictures, that it is of.
    """

    name: str
    value: float | None
    unit: str = ""
    bound: float | None = None
    sense: Literal["at least", "at most"] = "at least"
    count: int = 0

    @property
    def missed(self) -> bool:
        if self.bound is None or self.value is None:
            return False
        # nan is a miss
        return not (self.value >= self.bound if self.sense == "at least" else self.value <= self.bound)


def table(scores: Sequence[Score]) -> str:
    """Markdown."""
    lines = ["| score | value | required | clips | |", "| --- | ---: | ---: | ---: | --- |"]
    for score in scores:
        places = 3 if not score.unit else 1
        value = "not measured" if score.value is None else f"{score.value:.{places}f} {score.unit}".rstrip()
        bound = "" if score.bound is None else f"{score.sense} {score.bound:g} {score.unit}".rstrip()
        lines.append(f"| {score.name} | {value} | {bound} | {score.count or ''} | {'MISSED' if score.missed else ''} |")
    return "\n".join(lines)


def as_json(scores: Iterable[Score]) -> list[dict[str, object]]:
    return [{**asdict(score), "missed": score.missed} for score in scores]


def share(parts: Iterable[tuple[int, int]]) -> float:
    """The ratio of the sums of (hits, counted); nan where nothing counts."""
    hits, counted = (sum(column) for column in zip(*parts, strict=True))
    return hits / counted if counted else float("nan")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
