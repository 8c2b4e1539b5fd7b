"""What Alembic runs to run the migrations: on the connection that it was given, in its transaction."""

from __future__ import annotations

from alembic import context

from gateway.jobs.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
