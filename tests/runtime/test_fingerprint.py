"""What tells a stage from one that would compute something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import fingerprint as fingerprint_module
from runtime.bundles import BundleComponent
from runtime.fingerprint import fingerprint
from runtime.stage import LoadedComponent, StageRuntime
from tests.runtime.fakes import BUNDLE


def component(directory: Path, content: bytes = b"weights", **fields: object) -> BundleComponent:
    directory.mkdir(exist_ok=True)
    (directory / "vae.pth").write_bytes(content)
    return BundleComponent("vae", (directory / "vae.pth",), **fields)  # type: ignore[arg-type]


def test_the_same_files_elsewhere_have_the_same_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(component(tmp_path / "a")) == fingerprint(component(tmp_path / "b"))


def test_other_bytes_another_size_or_another_name_change_it(tmp_path: Path) -> None:
    of = component(tmp_path / "a")
    renamed = BundleComponent("vae", ((tmp_path / "a" / "vae.pth").rename(tmp_path / "a" / "other.pth"),))
    others = [
        fingerprint(renamed),
        fingerprint(component(tmp_path / "b", b"Weights")),
        fingerprint(component(tmp_path / "c", b"weights\0")),
    ]
    component(tmp_path / "a")
    assert len({fingerprint(of), *others}) == 4


def test_of_a_large_file_samples_from_the_first_to_the_last_byte_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint_module, "_SAMPLES", 4)
    monkeypatch.setattr(fingerprint_module, "_SAMPLE_BYTES", 10)
    content = bytes(1000)
    found = set()
    for changed in (None, 0, 9, 335, 665, 999):
        bytes_now = bytearray(content)
        if changed is not None:
            bytes_now[changed] = 1
        found.add(fingerprint(component(tmp_path / "a", bytes(bytes_now))))
    found.add(fingerprint(component(tmp_path / "a", bytes(1001))))
    assert len(found) == 7


def test_shards_and_tokenizers_belong_to_it(tmp_path: Path) -> None:
    index, shard, tokenizer = (
        tmp_path / "m.safetensors.index.json",
        tmp_path / "m-1.safetensors",
        tmp_path / "tokenizer",
    )
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": shard.name}}))
    tokenizer.mkdir()
    found = set()
    for shard_content, vocabulary in (("x", "y"), ("X", "y"), ("x", "Y")):
        shard.write_text(shard_content)
        (tokenizer / "tokenizer.json").write_text(vocabulary)
        found.add(fingerprint(BundleComponent("text_encoder", (index,), tokenizer=tokenizer)))
    assert len(found) == 3


def revision(bundle_component: BundleComponent, change: Callable[[StageRuntime], None] = lambda runtime: None) -> str:
    runtime = StageRuntime("vae", replace(BUNDLE, components={"vae": bundle_component}))
    runtime.components.append(LoadedComponent("vae", 1, 4, "float32"))
    change(runtime)
    runtime.identify()
    runtime.gpu.shutdown()
    assert dict(runtime.greeting())["bunraku-revision"] == runtime.status().revision == runtime.revision
    return runtime.revision


async def test_everything_that_decides_what_a_stage_computes_is_in_its_revision(tmp_path: Path) -> None:
    of = component(tmp_path)

    def other_dtype(runtime: StageRuntime) -> None:
        runtime.components[0] = LoadedComponent("vae", 1, 4, "bfloat16")

    def other_attention(runtime: StageRuntime) -> None:
        runtime.attention_backend = "sage"

    def other_setting(runtime: StageRuntime) -> None:
        runtime.decisive["precision"] = "exact"

    def other_bundle(runtime: StageRuntime) -> None:
        runtime.bundle = replace(runtime.bundle, revision="ba9876543210")

    changes = (other_dtype, other_attention, other_setting, other_bundle)
    found = {revision(of), *(revision(of, change) for change in changes)}
    found.add(revision(component(tmp_path, b"trained further")))
    assert len(found) == len(changes) + 2
    assert revision(component(tmp_path)) in found
