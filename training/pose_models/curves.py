"""Logs of trainings -> pictures of their curves, SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

Entry = Mapping[str, float]
_NOT_SCORES = ("step", "seconds", "loss")


def draw_curves(log: Sequence[Entry], title: str, path: Path) -> None:
    """Draws the loss, and beside it every score, over the steps of a training.

    Args:
        log: what loop.train writes: step, loss, and the scores where it was scored.
    """
    names = [name for name in log[-1] if name not in _NOT_SCORES]
    # the same file for the same log, with letters as letters
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(2.2 * (1 + len(names)), 2.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, 1 + len(names)), ["loss", *names], strict=True):
            known = [entry for entry in log if name in entry]
            axes.plot([entry["step"] for entry in known], [entry[name] for entry in known], linewidth=1)
            axes.set_title(f"{title}: {name}")
            axes.set_xlabel("step")
        figure.savefig(path, metadata={"Date": None})
