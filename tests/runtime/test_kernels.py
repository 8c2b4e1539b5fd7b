"""Kernels are used only where they can be compiled."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime.kernels import can_compile, has_compiler


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    has_compiler.cache_clear()
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
