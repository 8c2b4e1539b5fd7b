"""`bunraku keys`."""

from __future__ import annotations

import typer


def keys(context: typer.Context) -> None:
    """Makes, shows and ends API keys in the gateway's database, on the gateway's machine."""
    import subprocess
    import sys
    from importlib.util import find_spec

    # a program of the gateway, as in `serve`: what a client installs knows no database
    if find_spec("gateway") is None:
        typer.echo("error: keys are made where the gateway is installed: pip install bunraku[gateway]", err=True)
        raise typer.Exit(2)
    done = subprocess.run([sys.executable, "-m", "gateway.callers", *context.args], check=False)
    raise typer.Exit(done.returncode)
