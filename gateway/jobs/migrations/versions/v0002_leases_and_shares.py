"""Claims under leases, deadlines, callers and their shares, measured costs.

Only columns and tables are added, so that SQLite need not copy the table: copying would drop it, and with it, by the
foreign key, every event.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # both databases know this statement; Alembic would have SQLite copy the table
    op.execute("ALTER TABLE generations RENAME COLUMN request_id TO request_key")
    if op.get_bind().dialect.name != "sqlite":  # which does not look at the length
        op.alter_column("generations", "request_key", type_=sa.String(256))
    for column in (
        sa.Column("caller", sa.String(128), nullable=False, server_default=""),
        sa.Column("weight", sa.Float, nullable=False, server_default="1"),
        sa.Column("deadline_us", sa.BigInteger),
        sa.Column("owner", sa.String(32)),
        sa.Column("claim_token", sa.String(32)),
        sa.Column("lease_until_us", sa.BigInteger),
        sa.Column("lost_leases", sa.Integer, nullable=False, server_default="0"),
        sa.Column("set_aside", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("denoising", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("gpu_seconds", sa.Float, nullable=False, server_default="0"),
        sa.Column("charged_seconds", sa.Float, nullable=False, server_default="0"),
        sa.Column("estimated_seconds", sa.Float),
    ):
        op.add_column("generations", column)
    op.create_index("generations_of_caller", "generations", ["caller", "number"])
    op.create_index("generations_end", "generations", ["end_time_us"])
    op.create_table(
        "shares",
        sa.Column("caller", sa.String(128), primary_key=True),
        sa.Column("virtual_seconds", sa.Float, nullable=False),
    )
    schedule = op.create_table(
        "schedule",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("virtual_seconds", sa.Float, nullable=False),
    )
    op.bulk_insert(schedule, [{"id": 1, "virtual_seconds": 0.0}])
    op.create_table(
        "costs",
        sa.Column("kind", sa.String(160), primary_key=True),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("volume", sa.Float, nullable=False),
        sa.Column("step_seconds", sa.Float, nullable=False),
        sa.Column("other_seconds", sa.Float, nullable=False),
        sa.Column("update_time_us", sa.BigInteger, nullable=False),
    )
