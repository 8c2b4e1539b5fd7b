"""Who a call comes from: keys, certificates, scopes, rates; over real gRPC where that matters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from bunraku.errors import BunrakuError, Busy, NotReady, PermissionDenied, Unauthenticated, from_rpc_error
from bunraku.v1 import gateway_pb2 as pb
from bunraku.v1 import gateway_pb2_grpc
from gateway.callers.authentication import SCOPES, Authentication, RateLimits, require_scope
from gateway.callers.identity import EVERYBODY, Caller, CallerLimits, Scope, calling, current_caller
from gateway.callers.keys import KeyStore
from gateway.jobs.database import Database
from runtime.server import build_server


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authentication(keys: KeyStore, clock: Clock) -> Authentication:
    return Authentication(keys, clock_s=clock)


async def test_everybody_is_let_in_until_the_first_key_is_made(
    keys: KeyStore, authentication: Authentication, clock: Clock
) -> None:
    assert await authentication.caller("GetSystemStatus") is EVERYBODY
    _, text = await keys.create("studio")
    clock.now_s += 5
    with pytest.raises(Unauthenticated) as raised:
        await authentication.caller("ListModels")
    assert raised.value.reason == "API_KEY_MISSING"
    assert (await authentication.caller("ListModels", f"Bearer {text}")).name == "studio"


async def test_a_revoked_last_key_does_not_open_the_gateway(keys: KeyStore, clock: Clock) -> None:
    made, _ = await keys.create("studio")
    await keys.revoke(made.id)
    with pytest.raises(Unauthenticated):
        await Authentication(keys, clock_s=clock).caller("ListModels")


async def test_the_settings_can_require_keys_before_there_is_one_and_never(keys: KeyStore) -> None:
    with pytest.raises(Unauthenticated):
        await Authentication(keys, required=True).caller("ListModels")
    await keys.create("studio")
    assert await Authentication(keys, required=False).caller("ListModels") is EVERYBODY


async def test_what_is_no_valid_key_is_refused_in_the_same_words(
    keys: KeyStore, authentication: Authentication
) -> None:
    made, text = await keys.create("studio")
    revoked, revoked_text = await keys.create("studio")
    _, expired_text = await keys.create("studio", valid_s=1e-6)
    await keys.revoke(revoked.id)
    unknown = f"bunraku_{'0' * 12}_{text[-43:]}"
    wrong = f"bunraku_{made.id}_{revoked_text[-43:]}"
    headers = [f"Bearer {key}" for key in (unknown, wrong, revoked_text, expired_text, "nonsense", "")]
    words = set()
    for header in [*headers, f"Basic {text}", text]:
        with pytest.raises(Unauthenticated) as raised:
            await authentication.caller("ListModels", header)
        assert raised.value.reason == "API_KEY_INVALID"
        words.add(raised.value.message)
    assert len(words) == 1


async def test_a_revoked_key_is_refused_within_the_time_that_answers_are_remembered(
    keys: KeyStore, authentication: Authentication, clock: Clock
) -> None:
    made, text = await keys.create("studio")
    await authentication.caller("ListModels", f"bearer {text}")
    await keys.revoke(made.id)
    await authentication.caller("ListModels", f"Bearer {text}")
    clock.now_s += 5
    with pytest.raises(Unauthenticated):
        await authentication.caller("ListModels", f"Bearer {text}")


async def test_a_remembered_key_outlives_a_database_that_is_away(
    keys: KeyStore, authentication: Authentication, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = await keys.create("studio")
    await authentication.caller("ListModels", f"Bearer {text}")

    async def away(*_: object) -> None:
        raise NotReady("away")

    monkeypatch.setattr(keys, "with_id", away)
    monkeypatch.setattr(keys, "exist", away)
    clock.now_s += 4
    assert (await authentication.caller("ListModels", f"Bearer {text}")).name == "studio"
    clock.now_s += 1
    with pytest.raises(NotReady):
        await authentication.caller("ListModels", f"Bearer {text}")


async def test_without_keys_a_database_that_is_away_locks_nobody_out(
    keys: KeyStore, authentication: Authentication, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> bool:
        raise NotReady("away")

    monkeypatch.setattr(keys, "exist", away)
    with pytest.raises(NotReady):  # it was never seen: there may be keys in it
        await authentication.caller("ListModels")
    monkeypatch.undo()
    await authentication.caller("ListModels")
    monkeypatch.setattr(keys, "exist", away)
    clock.now_s += 60
    assert await authentication.caller("ListModels") is EVERYBODY


async def test_a_client_certificate_stands_for_its_key(keys: KeyStore, clock: Clock) -> None:
    authentication = Authentication(keys, clock_s=clock)
    made, _ = await keys.create("studio", certificate="renderer")
    assert (await authentication.caller("ListModels", common_name="renderer")).name == "studio"
    with pytest.raises(Unauthenticated) as raised:
        await authentication.caller("ListModels", common_name="stranger")
    assert raised.value.reason == "API_KEY_MISSING"
    await keys.revoke(made.id)
    clock.now_s += 5
    with pytest.raises(Unauthenticated) as raised:
        await authentication.caller("ListModels", common_name="renderer")
    assert raised.value.reason == "API_KEY_INVALID"


async def test_a_key_that_is_shown_counts_before_the_certificate(
    keys: KeyStore, authentication: Authentication
) -> None:
    await keys.create("studio", certificate="renderer")
    _, text = await keys.create("guest")
    assert (await authentication.caller("ListModels", f"Bearer {text}", "renderer")).name == "guest"
    with pytest.raises(Unauthenticated):
        await authentication.caller("ListModels", "Bearer wrong", "renderer")


# Scopes


def test_every_method_of_the_gateway_has_its_scopes() -> None:
    methods = pb.DESCRIPTOR.services_by_name["GatewayService"].methods
    assert {method.name for method in methods} == SCOPES.keys()
    assert all(SCOPES.values())


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        (Scope.UPLOAD, {"UploadAsset", "GetUpload", "GetAsset"}),
        (Scope.STATUS, {"GetSystemStatus"}),
        (Scope.ADMIN, set(SCOPES)),
        (
            Scope.GENERATE,
            {
                "CreateGeneration",
                "CancelGeneration",
                "DeleteGeneration",
                "GetGeneration",
                "WatchGeneration",
                "ListModels",
            },
        ),
        (
            Scope.READ,
            {"GetAsset", "DownloadAsset", "GetGeneration", "ListGenerations", "WatchGeneration", "ListModels"},
        ),
    ],
)
def test_a_scope_allows_its_methods_and_no_others(scope: Scope, allowed: set[str]) -> None:
    caller = Caller("studio", frozenset([scope]))
    for rpc in SCOPES:
        if rpc in allowed:
            require_scope(caller, rpc)
        else:
            with pytest.raises(PermissionDenied) as raised:
                require_scope(caller, rpc)
            assert raised.value.reason == "SCOPE_MISSING"


def test_a_method_that_is_not_known_is_denied_even_to_an_administrator() -> None:
    with pytest.raises(PermissionDenied):
        require_scope(EVERYBODY, "DropEverything")


# Rates


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_fills_evenly(clock: Clock) -> None:
    rates = RateLimits(clock)
    for _ in range(30):
        rates.take("key", 30)
    with pytest.raises(Busy) as raised:
        rates.take("key", 30)
    assert (raised.value.reason, raised.value.retry_after_s) == ("RATE_LIMITED", 2.0)
    rates.take("other", 30)  # each key has its own
    clock.now_s += 1.5
    with pytest.raises(Busy) as raised:
        rates.take("key", 30)
    assert raised.value.retry_after_s == pytest.approx(0.5)
    clock.now_s += 0.5
    rates.take("key", 30)
    clock.now_s += 3600
    for _ in range(30):
        rates.take("key", 30)
    with pytest.raises(Busy):
        rates.take("key", 30)


# Over the wire


class Telling(gateway_pb2_grpc.GatewayServiceServicer):
    """Tells the caller's name."""

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name=current_caller(), family=str(calling().weight))])

    async def WatchGeneration(
        self, request: pb.WatchGenerationRequest, context: Any
    ) -> AsyncIterator[pb.WatchGenerationResponse]:
        for _ in range(2):
            yield pb.WatchGenerationResponse(generation=pb.Generation(name=current_caller()))


@asynccontextmanager
async def serving(authentication: Authentication) -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
    server = build_server(authentication)
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(Telling(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)
    await server.stop(None)


async def refused(call: Any) -> BunrakuError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def test_servicers_are_told_who_calls_in_unary_and_streaming_calls(keys: KeyStore) -> None:
    _, first = await keys.create("studio", weight=3)
    _, second = await keys.create("guest")
    async with serving(Authentication(keys)) as stub:
        for text, name, weight in ((first, "studio", "3.0"), (second, "guest", "1.0")):
            metadata = (("authorization", f"Bearer {text}"),)
            (model,) = (await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)).models
            assert (model.name, model.family) == (name, weight)
            events = stub.WatchGeneration(pb.WatchGenerationRequest(), metadata=metadata)
            assert [event.generation.name async for event in events] == [name, name]


async def test_refusals_carry_status_reason_and_when_to_come_back(keys: KeyStore) -> None:
    limits = CallerLimits(requests_per_minute=1)
    _, text = await keys.create("studio", [Scope.READ], limits=limits)
    metadata = (("authorization", f"Bearer {text}"),)
    async with serving(Authentication(keys)) as stub:
        error = await refused(stub.ListModels(pb.ListModelsRequest()))
        assert isinstance(error, Unauthenticated)
        assert error.reason == "API_KEY_MISSING"
        error = await refused(stub.CreateGeneration(pb.CreateGenerationRequest(), metadata=metadata))
        assert isinstance(error, PermissionDenied)
        assert error.reason == "SCOPE_MISSING"
        await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
        error = await refused(stub.ListModels(pb.ListModelsRequest(), metadata=metadata))
        assert isinstance(error, Busy)
        assert error.reason == "RATE_LIMITED"
        assert error.retry_after_s == pytest.approx(60, abs=5)
