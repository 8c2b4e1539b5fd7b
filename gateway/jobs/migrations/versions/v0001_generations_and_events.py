"""Generations and their events, as the first version of the gateway kept them in SQLite."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "generations",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("id", sa.String(32), nullable=False, unique=True),
        sa.Column("request_id", sa.String(64), unique=True),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("request", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("progress", sa.LargeBinary, nullable=False),
        sa.Column("error", sa.LargeBinary),
        sa.Column("video", sa.LargeBinary),
        sa.Column("video_asset_id", sa.String(64)),
        sa.Column("trace_parent", sa.String(64), nullable=False),
        sa.Column("create_time_us", sa.BigInteger, nullable=False),
        sa.Column("start_time_us", sa.BigInteger),
        sa.Column("end_time_us", sa.BigInteger),
        sa.Column("last_sequence", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_generations_video_asset_id", "generations", ["video_asset_id"])
    op.create_index("generations_queue", "generations", ["state", "priority", "number"])
    op.create_table(
        "events",
        sa.Column(
            "generation_id", sa.String(32), sa.ForeignKey("generations.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("event", sa.LargeBinary, nullable=False),
    )
