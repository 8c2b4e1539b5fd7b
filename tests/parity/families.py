"""Which check a case gets: a function registered for the family that its name starts with.

A case is called `<family>` or `<family>-<suffix>`; of several families that fit, the longest wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tests.parity.cases import Case, Comparison

Check = Callable[[Case], Iterator[Comparison]]
_CHECKS: dict[str, Check] = {}


def family(*names: str) -> Callable[[Check], Check]:
    """Registers a check for the families of these names."""

    def register(check: Check) -> Check:
        for name in names:
            if name in _CHECKS:
                raise ValueError(f"family {name} is registered twice")
            _CHECKS[name] = check
        return check

    return register


def families() -> Iterable[str]:
    return sorted(_CHECKS)


def check_for(case_name: str) -> Check | None:
    """The check of the longest family name that `case_name` is or starts with, None if there is none."""
    fitting = [name for name in _CHECKS if case_name == name or case_name.startswith(name + "-")]
    return _CHECKS[max(fitting, key=len)] if fitting else None
