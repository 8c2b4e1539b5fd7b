"""The replicas of one stage: which addresses it has at present, how busy each is, and which one takes the next call.

Calls last from milliseconds to minutes, so taking turns would pile them up. A replica says how many calls it works on
at a time and how many it has, with every answer (initial metadata) and when it is asked (GetStatus); what this process
has sent since is added. The one with the most free slots takes the call.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from bunraku.errors import BunrakuError, NotReady, NotThereYet, from_rpc_error
from bunraku.v1 import stage_pb2, stage_pb2_grpc
from runtime.telemetry import METADATA_LOAD, METADATA_REVISION

# How long what a replica has said is believed: others send it calls too, and it may be started again
LOAD_STAYS_S = 1.0
REVISION_STAYS_S = 5.0
_RESOLVE_INTERVAL_S = 5.0
_RESOLVE_AGAIN_S = 0.5  # while no address is known at all
_RESOLVE_TIMEOUT_S = 3.0
_STATUS_TIMEOUT_S = 0.5
_REST_S = 1.0
_NEVER = float("-inf")

Connect = Callable[[str, str], grpc.aio.Channel]


@dataclass(frozen=True)
class Load:
    """How busy a replica said that it is.

    Attributes:
        slots: calls that it works on at a time.
        busy: calls that it has, those that wait included.
        ours: how many of this process it had then.
    """

    slots: int
    busy: int
    ours: int


@dataclass(eq=False)
class Endpoint:
    """One address of a stage and what is known of it.

    Attributes:
        calls: of this process, under way.
        rests_until: others are tried first until then; monotonic seconds.
        gone: the address is no longer one of the stage's; calls under way go on.
        revision: of what it computes; empty where it has not said.
        agreed, session, peer, lock: of shared memory, see StageClient.
    """

    address: str
    channel: grpc.aio.Channel
    calls: int = 0
    rests_until: float = 0.0
    gone: bool = False
    load: Load | None = None
    revision: str = ""
    asked_at: float = _NEVER
    agreed: bool | None = None
    session: str = ""
    peer: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def resting(self) -> bool:
        return self.rests_until > time.monotonic()

    @property
    def free_slots(self) -> int:
        """Calls that it would begin at once; below 0, as many wait. One that has not said is taken to have one slot."""
        if self.load is None:
            return 1 - self.calls
        return self.load.slots - max(self.calls, self.load.busy + self.calls - self.load.ours)

    def rest(self) -> None:
        """It cannot take a call at present: others are tried first for a while."""
        self.rests_until = time.monotonic() + _REST_S

    def failed(self) -> None:
        """It does not answer, so it may be another process when it does: what is known of this one is forgotten."""
        self.rest()
        self.agreed, self.load, self.revision, self.asked_at = None, None, "", _NEVER

    def greeted(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Takes what came before an answer; whether it came from a stage that has let the call in."""
        told = {key: value for key, value in metadata if isinstance(value, str)}
        revision, load = told.get(METADATA_REVISION), told.get(METADATA_LOAD)
        if revision is None or load is None:
            return False
        running, queued, slots = (int(number) for number in load.split("/"))
        self._learnt(revision, Load(slots, running + queued, self.calls))
        return True

    def told(self, status: stage_pb2.GetStatusResponse) -> None:
        """Takes what GetStatus answered."""
        busy = len(status.work) + status.queued_requests
        self._learnt(status.revision, Load(max(1, status.max_concurrent_requests), busy, self.calls))
        if status.state != stage_pb2.StageState.STAGE_STATE_SERVING:
            self.rest()

    def _learnt(self, revision: str, load: Load) -> None:
        self.revision, self.load, self.asked_at = revision, load, time.monotonic()


class Replicas:
    """The replicas of a stage; those that come and go are noticed within seconds.

    Args:
        stage: its name, for errors.
        addresses: `host:port`, one or several; a host name that resolves to several addresses stands for all of them.
        connect: opens a channel to an address (`ip:port`) that was found under a host name.
    """

    def __init__(self, stage: str, addresses: Sequence[str], connect: Connect) -> None:
        if not addresses:
            raise ValueError(f"stage {stage} has no address")
        self.stage, self._addresses, self._connect = stage, tuple(addresses), connect
        self._endpoints: dict[str, Endpoint] = {}
        self._resolved_at = _NEVER
        self._resolving, self._asking = asyncio.Lock(), asyncio.Lock()
        self._next = 0

    async def close(self) -> None:
        """Closes the channels; calls under way are cancelled."""
        endpoints, self._endpoints = list(self._endpoints.values()), {}
        await asyncio.gather(*(endpoint.channel.close(None) for endpoint in endpoints))

    async def known(self) -> list[Endpoint]:
        """Every address of the stage at present, and those that are gone but have calls under way."""
        async with self._resolving:
            interval = _RESOLVE_INTERVAL_S if self._endpoints else _RESOLVE_AGAIN_S
            if time.monotonic() - self._resolved_at >= interval:
                await self._resolve()
                self._resolved_at = time.monotonic()
        return list(self._endpoints.values())

    async def take(self) -> Endpoint:
        """The endpoint for the next call, which is counted from now on; in turn among equals.

        Raises:
            NotReady: the stage has no address at present.
        """
        endpoints = [endpoint for endpoint in await self.known() if not endpoint.gone]
        if len(endpoints) > 1:
            await self._ask(endpoints, LOAD_STAYS_S)
        if not endpoints:
            raise NotReady(f"the {self.stage} stage has no address at present", stage=self.stage)
        self._next += 1
        turned = endpoints[self._next % len(endpoints) :] + endpoints[: self._next % len(endpoints)]
        chosen = min(turned, key=lambda endpoint: (endpoint.resting, -endpoint.free_slots))
        # counted without a wait in between, so that calls that come at the same moment choose another
        chosen.calls += 1
        return chosen

    def has_other(self, than: Endpoint) -> bool:
        """Whether another endpoint could take a call now."""
        return any(not (endpoint is than or endpoint.gone or endpoint.resting) for endpoint in self._endpoints.values())

    async def revisions(self) -> set[str]:
        """Of what the replicas compute at present; usually one, empty while none has said."""
        endpoints = [endpoint for endpoint in await self.known() if not endpoint.gone]
        await self._ask(endpoints, REVISION_STAYS_S)
        return {endpoint.revision for endpoint in endpoints if endpoint.revision}

    async def _ask(self, endpoints: Sequence[Endpoint], stays_s: float) -> None:
        """Has those tell how they are that have not done so lately; waits a moment for them at most."""
        async with self._asking:
            until = time.monotonic() - stays_s
            silent = [endpoint for endpoint in endpoints if endpoint.asked_at < until and not endpoint.resting]
            await asyncio.gather(*(_ask_one(endpoint) for endpoint in silent))

    async def _resolve(self) -> None:
        """Brings the endpoints up to date with what the addresses mean now; channels that stay are kept."""
        found: dict[str, str] = {}  # addresses, and the host that each was found under
        for address in self._addresses:
            host, _, port = address.rpartition(":")
            try:
                async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
                    rows = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError:  # TimeoutError is one
                found |= {known: host for known in self._endpoints if known.endswith(f":{port}")}
                continue
            ipv4 = [row for row in rows if row[0] == socket.AF_INET]
            found |= {_join(str(row[4][0]), port): host for row in ipv4 or rows}
        for address in found.keys() - self._endpoints.keys():
            self._endpoints[address] = Endpoint(address, self._connect(address, found[address]))
        for address, endpoint in list(self._endpoints.items()):
            endpoint.gone = address not in found
            if endpoint.gone and endpoint.calls == 0:
                await self._endpoints.pop(address).channel.close(None)


async def _ask_one(endpoint: Endpoint) -> None:
    endpoint.asked_at = time.monotonic()
    try:
        endpoint.told(await stage_status(endpoint, _STATUS_TIMEOUT_S))
    except NotThereYet:
        endpoint.revision = ""  # a server without StageService: whether it still is what it was cannot be known
    except BunrakuError:
        endpoint.failed()


async def stage_status(endpoint: Endpoint, timeout_s: float = 2.0) -> stage_pb2.GetStatusResponse:
    """What the stage at an address says of itself.

    Raises:
        NotReady: it does not answer.
    """
    stub: Any = stage_pb2_grpc.StageServiceStub(endpoint.channel)
    try:
        return await stub.GetStatus(stage_pb2.GetStatusRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _join(host: str, port: str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
