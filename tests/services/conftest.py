"""One thread for torch, and a bundle that is much smaller than bundles/tiny."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runtime.bundles import Bundle
from tests.services.serving import write_bundle


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share the machine with others, and more threads are slower at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle"))
