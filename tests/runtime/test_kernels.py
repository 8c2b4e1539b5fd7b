"""Kernels are used only where they can be compiled."""

import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime import kernels
from runtime.kernels import can_compile, has_compiler


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    has_compiler.cache_clear()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: {"include": str(tmp_path)}[name])
    yield
    has_compiler.cache_clear()


def test_a_cpu_has_no_kernels() -> None:
    assert not can_compile(torch.device("cpu"), (8, 0))


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_compiler_on_the_path_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str) -> None:
    program = tmp_path / compiler
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert has_compiler()


def test_so_will_the_one_that_cc_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "/opt/compiler")
    assert has_compiler()


def test_without_one_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not has_compiler()
        assert not has_compiler()
    assert [record.message for record in caplog.records] == [
        "no C compiler: Triton cannot build its kernels here, and slower operations stand in for them"
    ]


def test_nor_can_it_do_without_the_headers_of_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "/opt/compiler")
    (tmp_path / "Python.h").unlink()
    assert not has_compiler()
    assert f"no {tmp_path}/Python.h: Triton cannot build" in caplog.text


@pytest.mark.parametrize(("scheme", "used"), [("posix_local", "posix_prefix"), ("venv", "venv")])
def test_headers_are_looked_for_where_triton_does(monkeypatch: pytest.MonkeyPatch, scheme: str, used: str) -> None:
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: scheme)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: f"/{scheme}/{name}")
    assert kernels._headers() == Path(f"/{used}/include/Python.h")
