"""Who a call comes from, what it may do and how often: the context around every rpc of the gateway.

A call shows a key (`authorization: Bearer bunraku_...`) or, over mutual TLS, a client's certificate that stands for
one. Keys are required once any was made, or from the start where the settings say so; before that everybody is
`EVERYBODY`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from bunraku.errors import Busy, NotReady, PermissionDenied, Unauthenticated
from gateway.callers.identity import EVERYBODY, Caller, Scope, acting_for
from gateway.callers.keys import ApiKey, KeyStore, split_key

Context = grpc.aio.ServicerContext[Any, Any]

# What each rpc needs: one of these. GetAsset is how clients find that a file need not be sent.
SCOPES: dict[str, tuple[Scope, ...]] = {
    "UploadAsset": (Scope.UPLOAD,),
    "GetUpload": (Scope.UPLOAD,),
    "GetAsset": (Scope.READ, Scope.UPLOAD),
    "DownloadAsset": (Scope.READ,),
    "CreateGeneration": (Scope.GENERATE,),
    "GetGeneration": (Scope.READ, Scope.GENERATE),
    "ListGenerations": (Scope.READ,),
    "WatchGeneration": (Scope.READ, Scope.GENERATE),
    "CancelGeneration": (Scope.GENERATE,),
    "DeleteGeneration": (Scope.GENERATE,),
    "ListModels": (Scope.READ, Scope.GENERATE),
    "GetSystemStatus": (Scope.STATUS,),
}
_BEARER = "bearer "
_MAX_REMEMBERED = 10_000


class Authentication:
    """Sets the caller of each call; to be given to `build_server`.

    Args:
        keys: where they are looked up.
        required: whether calls need a key; None: once there is one.
        remembered_s: how long an answer of the database is used again; so long a revoked key may still be taken.
        clock_s: monotonic.
    """

    def __init__(
        self,
        keys: KeyStore,
        *,
        required: bool | None = None,
        remembered_s: float = 5.0,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys, self._required = keys, required
        self._remembered_s, self._clock_s = remembered_s, clock_s
        self._known: dict[tuple[str, str], tuple[float, ApiKey]] = {}
        self._found_none_at: float | None = None
        self._rates = RateLimits(clock_s)

    @asynccontextmanager
    async def __call__(self, method: str, context: Context) -> AsyncIterator[None]:
        """The context of a call.

        Raises:
            Unauthenticated: it shows no key, or one that is not valid.
            PermissionDenied: its key lacks the scope.
            Busy: its key makes too many calls.
        """
        shown = {str(name): value for name, value in context.invocation_metadata() or ()}
        authorization = str(shown.get("authorization", ""))  # names of metadata come in small letters
        caller = await self.caller(method.rpartition("/")[2], authorization, _common_name(context))
        with acting_for(caller):
            yield

    async def caller(self, rpc: str, authorization: str = "", common_name: str = "") -> Caller:
        """Who makes a call. Raises as `__call__`.

        Args:
            rpc: method, such as `GetGeneration`.
            authorization: `Bearer bunraku_...`; empty: the call shows no key.
            common_name: of the client's certificate; empty: it shows none.
        """
        if not await self.is_required():
            return EVERYBODY
        key = await self._key_of(authorization, common_name)
        require_scope(key.caller, rpc)
        if key.caller.limits.requests_per_minute is not None:
            self._rates.take(key.id, key.caller.limits.requests_per_minute)
        return key.caller

    async def is_required(self) -> bool:
        """Whether calls need a key at present."""
        if self._required is None:
            now = self._clock_s()
            if self._found_none_at is not None and now < self._found_none_at + self._remembered_s:
                return False
            try:
                found = await self._keys.exist()
            except NotReady:
                if self._found_none_at is None:
                    raise
                return False  # nobody can have made one in a database that is away
            if not found:
                self._found_none_at = now
                return False
            self._required = True
        return self._required

    async def _key_of(self, authorization: str, common_name: str) -> ApiKey:
        if authorization:
            is_bearer = authorization.lower().startswith(_BEARER)
            found = await self._with_secret(authorization[len(_BEARER) :] if is_bearer else "")
        else:
            found = await self._remembered(("certificate", common_name)) if common_name else None
            if found is None:
                text = (
                    "a key is needed (authorization: Bearer bunraku_...), or a client's certificate that stands for one"
                )
                raise Unauthenticated(text, reason="API_KEY_MISSING")
        # the same words whatever is wrong: who tries keys learns nothing
        if found is None or not found.is_valid(time.time_ns() // 1000):
            raise Unauthenticated("the key is not valid", reason="API_KEY_INVALID")
        return found

    async def _with_secret(self, text: str) -> ApiKey | None:
        parts = split_key(text)
        key = await self._remembered(("id", parts[0])) if parts else None
        return key if parts and key is not None and key.has(parts[1]) else None

    async def _remembered(self, name: tuple[str, str]) -> ApiKey | None:
        """The key with an id or a certificate, from the database or as it was there a moment ago."""
        now = self._clock_s()
        known = self._known.get(name)
        if known is not None and now < known[0] + self._remembered_s:
            return known[1]
        kind, value = name
        found = await (self._keys.with_id(value) if kind == "id" else self._keys.with_certificate(value))
        self._known.pop(name, None)
        if found is not None:
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[name] = (now, found)
        return found


def require_scope(caller: Caller, rpc: str) -> None:
    """Checks that a caller may call a method. Raises PermissionDenied; for a method that is not in `SCOPES` always."""
    scopes = SCOPES.get(rpc, ())
    if not any(caller.may(scope) for scope in scopes):
        names = " or ".join(scopes) or "a scope that does not exist"
        raise PermissionDenied(f"{rpc} needs a key with the scope {names}", reason="SCOPE_MISSING")


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimits:
    """Calls per minute of each key, in this process: a bucket that holds a minute's worth and fills evenly."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key_id: str, per_minute: int) -> None:
        """Counts a call. Raises Busy, with the time until the next one is let in, when there were too many."""
        now = self._clock_s()
        bucket = self._buckets.setdefault(key_id, _Bucket(per_minute, now))
        bucket.tokens = min(per_minute, bucket.tokens + (now - bucket.filled_at) * per_minute / 60)
        bucket.filled_at = now
        if bucket.tokens < 1:
            wait_s = (1 - bucket.tokens) * 60 / per_minute
            raise Busy(f"the key may make {per_minute} calls a minute", reason="RATE_LIMITED", retry_after_s=wait_s)
        bucket.tokens -= 1


def _common_name(context: Context) -> str:
    """Of the certificate that the client has shown and TLS has checked; empty where it has shown none."""
    properties: Any = context.auth_context()
    names = properties.get("x509_common_name", ())
    return names[0].decode(errors="replace") if names else ""
