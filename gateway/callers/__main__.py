"""`python -m gateway.callers`, which `bunraku keys` runs: makes, shows and ends API keys.

It writes to the gateway's database and needs no gateway that runs: whoever may write there is the administrator.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from bunraku.cli.display import write_table
from bunraku.cli.failures import explained
from bunraku.cli.system import data_directory
from bunraku.errors import BunrakuError
from gateway.callers.identity import CallerLimits, Scope
from gateway.callers.keys import DEFAULT_SCOPES, ApiKey, KeyStore
from gateway.jobs.database import Database

Result = TypeVar("Result")
_DATABASE_FILE = "gateway.sqlite"
_DURATION = re.compile(r"([1-9]\d{0,5})([hd])")
_SECONDS = {"h": 3600, "d": 86_400}

app = typer.Typer(
    name="bunraku keys",
    help="API keys. Calls need one once the first was made.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        envvar="BUNRAKU_DATA",
        file_okay=False,
        show_default="~/.local/share/bunraku",
        help="The gateway's directory, with its database.",
    ),
]
Where = Annotated[
    str, typer.Option("--database", envvar="BUNRAKU_DATABASE", help="postgresql://...; empty: SQLite in --data.")
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.command()
def create(
    caller: Annotated[str, typer.Argument(help="Whom it is for; several keys may be for one caller.")],
    scope: Annotated[list[Scope], typer.Option("--scope", help="What it may do; may be given again.")] = [  # noqa: B006  # typer copies it
        *DEFAULT_SCOPES
    ],
    weight: Annotated[float, typer.Option("--weight", help="Share of the GPUs relative to other callers.")] = 1.0,
    rate: Annotated[int | None, typer.Option("--rate", help="Calls a minute.")] = None,
    active: Annotated[int | None, typer.Option("--active", help="Generations that wait or run.")] = None,
    gpu_seconds: Annotated[float | None, typer.Option("--gpu-seconds", help="Of GPU time in 24 hours.")] = None,
    expires: Annotated[str | None, typer.Option("--expires", metavar="90d|12h", help="After which it ends.")] = None,
    certificate: Annotated[
        str, typer.Option("--certificate", help="Common name of a client's certificate that stands for it.")
    ] = "",
    data: Data = None,
    database: Where = "",
    as_json: Json = False,
) -> None:
    """Makes a key and shows it, once: it cannot be had again."""
    valid_s = _seconds(expires)
    limits = CallerLimits(rate, active, gpu_seconds)
    key, text = _with_keys(
        data,
        database,
        lambda keys: keys.create(caller, scope, weight=weight, limits=limits, valid_s=valid_s, certificate=certificate),
    )
    if as_json:
        typer.echo(json.dumps({**_described(key), "key": text}))
    elif certificate:
        typer.echo(f"{key.id}: clients with a certificate for {certificate} are {caller} from now on")
    else:
        typer.echo(text)
        place = "" if database else f" for the gateway in {data_directory(data)}"
        typer.echo(f"this is key {key.id} of {caller}{place}; it is not shown again", err=True)


@app.command("list")
def list_keys(data: Data = None, database: Where = "", as_json: Json = False) -> None:
    """Shows the keys, without their secrets."""
    found = _with_keys(data, database, lambda keys: keys.list())
    if as_json:
        typer.echo(json.dumps([_described(key) for key in found]))
        return
    columns = ["id", "caller", "scopes", "weight", "limits", "expires", "state"]
    write_table(Console(), columns, [_row(key) for key in found])


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of the key, as `list` shows it.")],
    data: Data = None,
    database: Where = "",
) -> None:
    """Ends a key for good. A gateway that runs notices within seconds."""
    key = _with_keys(data, database, lambda keys: keys.revoke(key_id))
    typer.echo(f"key {key.id} of {key.caller.name} is revoked")


def _with_keys(data: Path | None, database: str, work: Callable[[KeyStore], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        opened = Database(database or _file(data))
        try:
            await opened.migrate()
            return await work(KeyStore(opened))
        finally:
            await opened.close()

    try:
        return asyncio.run(run())
    except BunrakuError as error:
        failure = explained(error)
        assert failure is not None
        typer.echo("\n".join(failure.lines), err=True)
        raise typer.Exit(failure.exit_status) from error


def _file(data: Path | None) -> Path:
    directory = data_directory(data)
    directory.mkdir(parents=True, exist_ok=True)
    return directory / _DATABASE_FILE


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter("must be a number of hours or days, such as 12h or 90d", param_hint="--expires")
    return float(int(match[1]) * _SECONDS[match[2]])


def _described(key: ApiKey) -> dict[str, object]:
    """What is told of a key, for programs."""
    return {
        "id": key.id,
        "caller": key.caller.name,
        "scopes": sorted(key.caller.scopes),
        "weight": key.caller.weight,
        "limits": _limits(key),
        "certificate": key.certificate,
        "create_time": _time(key.create_time_us),
        "expire_time": None if key.expire_time_us is None else _time(key.expire_time_us),
        "state": _state(key),
    }


def _row(key: ApiKey) -> list[str]:
    caller = key.caller
    limits = ", ".join(f"{value:g} {name}" for name, value in _limits(key).items())
    expires = "" if key.expire_time_us is None else _time(key.expire_time_us)[:10]
    return [key.id, caller.name, ", ".join(sorted(caller.scopes)), f"{caller.weight:g}", limits, expires, _state(key)]


def _state(key: ApiKey) -> str:
    if key.revoke_time_us is not None:
        return "revoked"
    return "valid" if key.is_valid(time.time_ns() // 1000) else "expired"


def _limits(key: ApiKey) -> dict[str, float]:
    limits = key.caller.limits
    named = {
        "calls a minute": limits.requests_per_minute,
        "generations": limits.max_active_generations,
        "GPU seconds a day": limits.gpu_seconds_per_day,
    }
    return {name: value for name, value in named.items() if value is not None}


def _time(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    app(prog_name="bunraku keys")
