"""Checking a request's fields: all that is wrong is said at once, each with the field's name."""

from __future__ import annotations

import math

from bunraku.errors import InvalidRequest


class Checks:
    """Collects what is wrong with a request; `done` raises it."""

    def __init__(self) -> None:
        self._violations: list[tuple[str, str]] = []

    def that(self, holds: bool, field: str, text: str) -> bool:
        """Notes `text` (what the field must be and what it is) unless `holds`; returns `holds`."""
        if not holds:
            self._violations.append((field, text))
        return holds

    def between(self, field: str, value: float, least: float, most: float) -> bool:
        """A finite number within bounds, both allowed."""
        finite = math.isfinite(value)
        return self.that(finite and least <= value <= most, field, f"must be {least:g} to {most:g}, got {value:g}")

    def multiple(self, field: str, value: int, of: int) -> bool:
        return self.that(value % of == 0, field, f"must be a multiple of {of}, got {value}")

    def done(self) -> None:
        """Raises InvalidRequest with everything that was noted, if anything was."""
        if self._violations:
            raise InvalidRequest(*self._violations)
