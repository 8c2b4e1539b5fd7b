"""API keys: made, listed, revoked and looked up. Of a key's secret only the SHA-256 is kept.

A key is `bunraku_{id}_{secret}`: the id finds its row, the secret (256 random bits) proves it. A secret that nobody can
guess needs no slow hash: those are for passwords that people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from bunraku.errors import InvalidRequest, NotFound
from gateway.callers.identity import Caller, CallerLimits, Scope
from gateway.callers.tables import API_KEYS
from gateway.jobs.database import Database, promptly

DEFAULT_SCOPES = (Scope.GENERATE, Scope.READ, Scope.UPLOAD)
_KEY = re.compile(r"bunraku_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_KEY_ID = re.compile(r"[0-9a-f]{12}")
_CALLER = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_MAX_COMMON_NAME = 255
_ROWS = API_KEYS.c


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key.

    Attributes:
        id: the part of it that may be shown.
        caller: whom it stands for, with scopes and limits.
        certificate: common name of the client's certificate that stands for the key; empty: its secret does.
        create_time_us, expire_time_us, revoke_time_us: microseconds since 1970.
    """

    id: str
    caller: Caller
    secret_digest: str
    certificate: str
    create_time_us: int
    expire_time_us: int | None
    revoke_time_us: int | None

    def is_valid(self, now_us: int) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoke_time_us is None and (self.expire_time_us is None or now_us < self.expire_time_us)

    def has(self, secret: str) -> bool:
        """Whether this is its secret."""
        return bool(self.secret_digest) and hmac.compare_digest(_digest(secret), self.secret_digest)


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key; None where the text is none."""
    match = _KEY.fullmatch(text)
    return (match[1], match[2]) if match else None


class KeyStore:
    """Keys in the gateway's database. Every method raises NotReady when that is away."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @promptly
    async def create(
        self,
        caller: str,
        scopes: Collection[Scope] = DEFAULT_SCOPES,
        *,
        weight: float = 1.0,
        limits: CallerLimits = CallerLimits(),  # noqa: B008  # frozen
        valid_s: float | None = None,
        certificate: str = "",
    ) -> tuple[ApiKey, str]:
        """Makes a key.

        Args:
            caller: its generations and files belong to this name; several keys may have the same one.
            valid_s: after which it expires; None: never.
            certificate: common name of a client's certificate that stands for the key in place of a secret.

        Returns:
            what is kept of it, and the key itself, which cannot be had again; empty with a certificate.

        Raises:
            InvalidRequest: a value is wrong.
        """
        _check(caller, scopes, weight, limits, valid_s, certificate)
        key_id, secret, now_us = secrets.token_hex(6), secrets.token_urlsafe(32), time.time_ns() // 1000
        values = {
            "id": key_id,
            "secret_digest": None if certificate else _digest(secret),
            "certificate": certificate or None,
            "caller": caller,
            "scopes": ",".join(sorted(scopes)),
            "weight": weight,
            "requests_per_minute": limits.requests_per_minute,
            "max_active_generations": limits.max_active_generations,
            "gpu_seconds_per_day": limits.gpu_seconds_per_day,
            "create_time_us": now_us,
            "expire_time_us": None if valid_s is None else now_us + round(valid_s * 1e6),
        }
        try:
            async with self.database.writing() as connection:
                row = (await connection.execute(sa.insert(API_KEYS).values(values).returning(API_KEYS))).one()
        except sa.exc.IntegrityError:
            raise InvalidRequest(("certificate", f"{certificate!r} stands for another key already")) from None
        return _api_key(row), "" if certificate else f"bunraku_{key_id}_{secret}"

    @promptly
    async def list(self) -> list[ApiKey]:
        """All keys, the oldest first, with those that are revoked or expired."""
        async with self.database.reading() as connection:
            rows = await connection.execute(sa.select(API_KEYS).order_by(_ROWS.create_time_us, _ROWS.id))
            return [_api_key(row) for row in rows]

    @promptly
    async def revoke(self, key_id: str) -> ApiKey:
        """Ends a key for good. Revoking again changes nothing.

        Raises:
            InvalidRequest: the id has another form.
            NotFound: there is no such key.
        """
        if not _KEY_ID.fullmatch(key_id):
            raise InvalidRequest(("id", f"must be 12 hexadecimal digits, got {key_id[:100]!r}"))
        now_us = time.time_ns() // 1000
        change = sa.update(API_KEYS).where(_ROWS.id == key_id)
        change = change.values(revoke_time_us=sa.func.coalesce(_ROWS.revoke_time_us, now_us))
        async with self.database.writing() as connection:
            row = (await connection.execute(change.returning(API_KEYS))).one_or_none()
        if row is None:
            raise NotFound(f"there is no key {key_id}")
        return _api_key(row)

    async def with_id(self, key_id: str) -> ApiKey | None:
        """The key with this id, valid or not; None where there is none."""
        return await self._first(_ROWS.id == key_id)

    async def with_certificate(self, common_name: str) -> ApiKey | None:
        """The key that a client's certificate stands for, valid or not; None where there is none."""
        return await self._first(_ROWS.certificate == common_name)

    async def exist(self) -> bool:
        """Whether any key was ever made; one that was revoked counts."""
        return await self._first(sa.true()) is not None

    @promptly
    async def _first(self, condition: sa.ColumnElement[bool]) -> ApiKey | None:
        async with self.database.reading() as connection:
            row = (await connection.execute(sa.select(API_KEYS).where(condition).limit(1))).one_or_none()
        return None if row is None else _api_key(row)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _api_key(row: sa.Row[tuple[object, ...]]) -> ApiKey:
    limits = CallerLimits(row.requests_per_minute, row.max_active_generations, row.gpu_seconds_per_day)
    scopes = frozenset(Scope(scope) for scope in row.scopes.split(","))
    return ApiKey(
        id=row.id,
        caller=Caller(row.caller, scopes, row.weight, limits),
        secret_digest=row.secret_digest or "",
        certificate=row.certificate or "",
        create_time_us=row.create_time_us,
        expire_time_us=row.expire_time_us,
        revoke_time_us=row.revoke_time_us,
    )


def _check(
    caller: str,
    scopes: Collection[Scope],
    weight: float,
    limits: CallerLimits,
    valid_s: float | None,
    certificate: str,
) -> None:
    violations = []
    if not _CALLER.fullmatch(caller):
        text = f"must be 1 to 64 characters of a-z, 0-9 and -, the first no -, got {caller[:100]!r}"
        violations.append(("caller", text))
    if not scopes:
        violations.append(("scopes", "must be at least one"))
    if not 0.01 <= weight <= 1000:
        violations.append(("weight", f"must be 0.01 to 1000, got {weight:g}"))
    for name in ("requests_per_minute", "max_active_generations", "gpu_seconds_per_day"):
        limit = getattr(limits, name)
        if limit is not None and not limit > 0:
            violations.append((name, f"must be above 0, got {limit:g}"))
    if valid_s is not None and not valid_s > 0:
        violations.append(("valid_s", f"must be above 0, got {valid_s:g}"))
    if len(certificate) > _MAX_COMMON_NAME:
        violations.append(("certificate", f"must have at most {_MAX_COMMON_NAME} characters, has {len(certificate)}"))
    if violations:
        raise InvalidRequest(*violations)
