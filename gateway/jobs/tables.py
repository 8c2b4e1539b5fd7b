"""The tables of the gateway's jobs; `migrations/` brings a database of any earlier version to them.

Times are microseconds since 1970, seconds of GPU are floats.
"""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()

# A number that the database counts up; SQLite does that for INTEGER only.
_Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

GENERATIONS = sa.Table(
    "generations",
    METADATA,
    # The order of creation, which page tokens hold too.
    sa.Column("number", _Number, primary_key=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    # Of the caller's own: its name, a slash and the request_id; without the first two where callers have no names.
    sa.Column("request_key", sa.String(256), unique=True),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("request", sa.LargeBinary, nullable=False),  # pb.CreateGenerationRequest
    sa.Column("state", sa.SmallInteger, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("progress", sa.LargeBinary, nullable=False),  # pb.GenerationProgress
    sa.Column("error", sa.LargeBinary),  # pb.GenerationError
    sa.Column("video", sa.LargeBinary),  # pb.Asset
    sa.Column("video_asset_id", sa.String(64), index=True),
    sa.Column("trace_parent", sa.String(64), nullable=False),
    sa.Column("create_time_us", sa.BigInteger, nullable=False),
    sa.Column("start_time_us", sa.BigInteger),
    sa.Column("end_time_us", sa.BigInteger),
    sa.Column("last_sequence", sa.BigInteger, nullable=False),
    # Whose it is, and how large a share of the GPUs that caller has.
    sa.Column("caller", sa.String(128), nullable=False, server_default=""),
    sa.Column("weight", sa.Float, nullable=False, server_default="1"),
    # When it is given up; none in what was created before there were deadlines.
    sa.Column("deadline_us", sa.BigInteger),
    # The claim of a worker: its gateway, a token that every write must show, and until when it holds unless renewed,
    # on the database's clock.
    sa.Column("owner", sa.String(32)),
    sa.Column("claim_token", sa.String(32)),
    sa.Column("lease_until_us", sa.BigInteger),
    # Times that a gateway died or froze in the middle of it.
    sa.Column("lost_leases", sa.Integer, nullable=False, server_default="0"),
    # The owner is asked to put it back into the queue, for one of higher priority.
    sa.Column("set_aside", sa.Boolean, nullable=False, server_default=sa.false()),
    # A step of the denoiser has ended and more are to come: it holds a GPU.
    sa.Column("denoising", sa.Boolean, nullable=False, server_default=sa.false()),
    # What it has used, what its caller was charged for it so far, and what it was thought to need in all.
    sa.Column("gpu_seconds", sa.Float, nullable=False, server_default="0"),
    sa.Column("charged_seconds", sa.Float, nullable=False, server_default="0"),
    sa.Column("estimated_seconds", sa.Float),
    sa.Index("generations_queue", "state", "priority", "number"),
    sa.Index("generations_of_caller", "caller", "number"),
    sa.Index("generations_end", "end_time_us"),
)

EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("generation_id", sa.ForeignKey(GENERATIONS.c.id, ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event", sa.LargeBinary, nullable=False),  # pb.WatchGenerationResponse
)

# What each caller was given of the GPUs, in seconds divided by its weight: the virtual time of fair queueing.
SHARES = sa.Table(
    "shares",
    METADATA,
    sa.Column("caller", sa.String(128), primary_key=True),
    sa.Column("virtual_seconds", sa.Float, nullable=False),
)

# One row: the virtual time at which work was begun last. Whoever claims holds its lock.
SCHEDULE = sa.Table(
    "schedule",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("virtual_seconds", sa.Float, nullable=False),
)

# What generations of a kind were measured to take.
COSTS = sa.Table(
    "costs",
    METADATA,
    sa.Column("kind", sa.String(160), primary_key=True),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("volume", sa.Float, nullable=False),  # pixels of all frames
    sa.Column("step_seconds", sa.Float, nullable=False),
    sa.Column("other_seconds", sa.Float, nullable=False),
    sa.Column("update_time_us", sa.BigInteger, nullable=False),
)
