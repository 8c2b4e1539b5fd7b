"""Callers: their keys, the files that each has sent, the GPU seconds that each has used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(12), primary_key=True),
        sa.Column("secret_digest", sa.String(64)),
        sa.Column("certificate", sa.String(255), unique=True),
        sa.Column("caller", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(255), nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("max_active_generations", sa.Integer),
        sa.Column("gpu_seconds_per_day", sa.Float),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
        sa.Column("expire_time_us", sa.BigInteger),
        sa.Column("revoke_time_us", sa.BigInteger),
    )
    op.create_table(
        "asset_owners",
        sa.Column("asset_id", sa.String(64), primary_key=True),
        sa.Column("caller", sa.String(64), primary_key=True),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "gpu_usage",
        sa.Column("caller", sa.String(64), primary_key=True),
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("seconds", sa.Float, nullable=False),
    )
