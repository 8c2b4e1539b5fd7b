"""A fake gateway that clients and the command line talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bunraku.fake_gateway import FakeGateway, GatewayThread


@pytest.fixture
def gateway() -> Iterator[GatewayThread]:
    with GatewayThread(FakeGateway()) as running:
        yield running


@pytest.fixture
def fake(gateway: GatewayThread) -> FakeGateway:
    return gateway.fake
