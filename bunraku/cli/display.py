"""Rows that change while work goes on: drawn in place on a terminal, written as lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_STYLES = {"done": "green", "ready": "green", "running": "cyan", "loading": "cyan", "retrying": "yellow"}
_STYLES |= {"restarting": "yellow", "stopped": "dim", "waiting": "dim"}
_BAR_WIDTH = 24


@dataclass(frozen=True)
class Row:
    """One thing that goes on.

    Attributes:
        label: what it is.
        state: a word, such as `running`.
        amount: how much of it is done, in words.
        fraction: the same as 0 to 1, None where it is not known.
        seconds: spent on it by the time `at`.
        ticking: whether time goes on for it.
        at: time.monotonic().
    """

    label: str
    state: str
    amount: str = ""
    fraction: float | None = None
    seconds: float = 0.0
    ticking: bool = False
    at: float = field(default_factory=time.monotonic)

    def elapsed_s(self) -> float:
        """Seconds spent on it by now."""
        return self.seconds + (time.monotonic() - self.at if self.ticking else 0.0)


class Display:
    """Shows rows by key, in the order in which they came.

    Args:
        console: where to.
        interval_s: where rows are lines, the least time between two lines of a row that only moved on.
    """

    def __init__(self, console: Console, *, interval_s: float = 5.0) -> None:
        self.console = console
        self._interval_s = interval_s
        self._rows: dict[str, Row] = {}
        self._written: dict[str, Row] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self._drawn, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, key: str, row: Row) -> None:
        """Adds or changes a row."""
        self._rows[key] = row
        before = self._written.get(key)
        if self._live is not None:
            return
        changed = before is None or (before.label, before.state) != (row.label, row.state)
        if changed or (row.ticking and before is not None and row.at - before.at >= self._interval_s):
            self._written[key] = row
            self.note(_line(row))

    def note(self, text: str) -> None:
        """Writes a line that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def footer(self) -> str:
        """What stands below the rows on a terminal."""
        return ""

    def _drawn(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for row in self._rows.values():
            bar: RenderableType = ""
            if row.fraction is not None:
                bar = ProgressBar(total=1.0, completed=row.fraction, width=_BAR_WIDTH)
            state = Text(row.state, style=_STYLES.get(row.state, ""))
            table.add_row(Text(row.label), state, bar, Text(row.amount), Text(_time(row)))
        return Group(table, Text(self.footer(), style="dim"))


def _line(row: Row) -> str:
    return f"{row.label}: {', '.join(filter(None, [row.state, row.amount, _time(row)]))}"


def _time(row: Row) -> str:
    return seconds(row.elapsed_s()) if row.elapsed_s() >= 0.05 else ""


def seconds(value: float) -> str:
    """A time for people: `4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(size_bytes: float) -> str:
    """An amount of memory for people: `512 B`, `1.3 MB`, `80 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"


def write_table(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    """Writes a table: with borders on a terminal, as aligned lines elsewhere."""
    if console.is_terminal:
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        console.print(Text(text.rstrip()), soft_wrap=True)
