"""Settings about callers: what the environment says is what is used."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import ValidationError

from bunraku.tls import NO_TLS, TlsFiles
from gateway.callers.settings import AccessSettings
from gateway.media import ImageLimits, InputLimits
from runtime.video import VideoLimits


def settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> AccessSettings:
    for name, value in variables.items():
        monkeypatch.setenv(f"BUNRAKU_{name.upper()}", value)
    return AccessSettings()  # type: ignore[call-arg]  # its fields come from the environment


def test_without_settings_there_is_no_tls_and_https_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings(monkeypatch)
    assert plain.require_keys is None
    assert plain.stages_tls() == plain.clients_tls() == NO_TLS
    fetcher = plain.fetcher()
    assert fetcher is not None
    assert fetcher.limits.schemes == ("https",)
    assert fetcher.limits.networks == ()
    assert plain.input_limits() == InputLimits()


def test_stages_are_called_with_their_authority_and_clients_are_checked_with_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"tls_certificate": "g.crt", "tls_key": "g.key", "tls_ca": "ca.crt", "clients_ca": "clients.crt"}
    read = settings(monkeypatch, **files)
    own = Path("g.crt"), Path("g.key")
    assert read.stages_tls() == TlsFiles(Path("ca.crt"), *own)
    assert read.clients_tls() == TlsFiles(Path("clients.crt"), *own)
    monkeypatch.delenv("BUNRAKU_CLIENTS_CA")
    assert settings(monkeypatch).clients_tls() == TlsFiles(None, *own)


@pytest.mark.parametrize(
    "variables",
    [
        {"tls_certificate": "g.crt"},
        {"tls_ca": "ca.crt", "tls_key": "g.key"},
        {"clients_ca": "clients.crt"},
        {"fetch_networks": "10.0.0.0/8,example.org"},
        {"fetch": "ftp"},
    ],
)
def test_settings_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        settings(monkeypatch, **variables)


def test_what_may_be_fetched_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"fetch": "http", "fetch_networks": "10.1.0.0/16, fd00::/8", "fetch_seconds": "5"}
    fetcher = settings(monkeypatch, **variables, max_upload_bytes="1000").fetcher()
    assert fetcher is not None
    assert fetcher.limits.schemes == ("https", "http")
    assert fetcher.limits.networks == (ip_network("10.1.0.0/16"), ip_network("fd00::/8"))
    assert (fetcher.limits.max_seconds, fetcher.limits.max_bytes) == (5, 1000)
    assert settings(monkeypatch, fetch="off").fetcher() is None


def test_limits_of_files_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("max_upload_bytes", "max_image_bytes", "max_image_pixels", "max_video_pixels", "max_video_frames")
    limits = settings(
        monkeypatch, **{name: str(2000 + place) for place, name in enumerate(names)}, max_video_seconds="9"
    )
    assert limits.input_limits() == InputLimits(
        ImageLimits(max_bytes=2001, max_pixels=2002),
        VideoLimits(max_bytes=2000, max_pixels=2003, max_frames=2004, max_seconds=9),
    )
