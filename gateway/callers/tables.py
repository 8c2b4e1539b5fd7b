"""Tables of callers: keys, who owns which file, GPU seconds by hour. They stand in the gateway's database.

Times are microseconds since 1970.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

METADATA = sa.MetaData()

API_KEYS = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("id", sa.String(12), primary_key=True),  # the part of a key that may be shown
    sa.Column("secret_digest", sa.String(64)),  # SHA-256 of the other part; NULL: none, a certificate stands for it
    sa.Column("certificate", sa.String(255), unique=True),  # common name of a client's certificate
    sa.Column("caller", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(255), nullable=False),  # separated by commas
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("max_active_generations", sa.Integer),
    sa.Column("gpu_seconds_per_day", sa.Float),
    sa.Column("create_time_us", sa.BigInteger, nullable=False),
    sa.Column("expire_time_us", sa.BigInteger),
    sa.Column("revoke_time_us", sa.BigInteger),
)

ASSET_OWNERS = sa.Table(
    "asset_owners",
    METADATA,
    sa.Column("asset_id", sa.String(64), primary_key=True),
    sa.Column("caller", sa.String(64), primary_key=True),
    sa.Column("create_time_us", sa.BigInteger, nullable=False),
)

GPU_USAGE = sa.Table(
    "gpu_usage",
    METADATA,
    sa.Column("caller", sa.String(64), primary_key=True),
    sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),  # since 1970
    sa.Column("seconds", sa.Float, nullable=False),
)


def insert(connection: AsyncConnection, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT, which both databases have and SQLAlchemy spells for each."""
    return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name](table)
