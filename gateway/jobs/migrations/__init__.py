"""Versions of the database: `upgrade` brings one of any version to the newest, with Alembic."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

# What a database has that was made before there were migrations.
FIRST = "0001"


def upgrade(connection: sa.Connection) -> None:
    """Runs the migrations that are missing, inside the connection's transaction."""
    config = configuration(connection)
    tables = sa.inspect(connection).get_table_names()
    if "generations" in tables and "alembic_version" not in tables:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")


def configuration(connection: sa.Connection) -> Config:
    """What Alembic is to know."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
