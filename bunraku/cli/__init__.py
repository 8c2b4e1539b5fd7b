"""The `bunraku` command.

Modules of commands import only what it takes to read a command line; what they do is imported when they do it, so
that `bunraku --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from bunraku.cli.animate import animate
from bunraku.cli.jobs import jobs
from bunraku.cli.keys import keys
from bunraku.cli.models import models
from bunraku.cli.plan import plan
from bunraku.cli.pose import pose
from bunraku.cli.serve import serve
from bunraku.cli.status import status

app = typer.Typer(
    name="bunraku",
    help="Character animation and video generation.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(animate)
app.command()(pose)
app.command()(serve)
app.command()(plan)
app.command()(status)
app.command()(models)
app.add_typer(jobs, name="jobs")
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)(keys)


@app.callback(invoke_without_command=True)
def _without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Runs the command line and ends the process.

    Exit status: 0; 2 for bad input, 3 when the gateway or a stage is not available, 4 when the time is over, 130 when
    the work was cancelled, 1 for everything else. What went wrong is one line on stderr.
    """
    try:
        exit_status = app(standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"error: {error.format_message()}", err=True)
        exit_status = error.exit_code
    except Exception as error:
        from bunraku.cli.failures import explained

        failure = explained(error)
        if failure is None:
            raise
        typer.echo("\n".join(failure.lines), err=True)
        exit_status = failure.exit_status
    sys.exit(exit_status or 0)
