"""Which check a case gets: a function registered for the family that its name starts with.

A case is called `<family>` or `<family>-<suffix>`; of several families that fit, the longest wins. A family that is
registered for any device gets its case's inputs and weights on the one that was asked for; others compute on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tests.parity.cases import Case, Comparison

Check = Callable[[Case], Iterator[Comparison]]
_CHECKS: dict[str, Check] = {}
_ON_ANY_DEVICE: set[str] = set()


def family(*names: str, on_any_device: bool = False) -> Callable[[Check], Check]:
    """Registers a check for the families of these names."""

    def register(check: Check) -> Check:
        for name in names:
            if name in _CHECKS:
                raise ValueError(f"family {name} is registered twice")
            _CHECKS[name] = check
            if on_any_device:
                _ON_ANY_DEVICE.add(name)
        return check

    return register


def families() -> Iterable[str]:
    return sorted(_CHECKS)


def check_for(case_name: str) -> Check | None:
    """The check of the longest family name that `case_name` is or starts with, None if there is none."""
    name = _family_of(case_name)
    return None if name is None else _CHECKS[name]


def fits_any_device(case_name: str) -> bool:
    """Whether the check of this case computes where it is told to."""
    return _family_of(case_name) in _ON_ANY_DEVICE


def _family_of(case_name: str) -> str | None:
    fitting = [name for name in _CHECKS if case_name == name or case_name.startswith(name + "-")]
    return max(fitting, key=len) if fitting else None
