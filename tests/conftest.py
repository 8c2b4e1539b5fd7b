"""What all tests run under."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored, and the processes of tests inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
