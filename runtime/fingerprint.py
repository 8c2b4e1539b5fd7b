"""What tells the weights of a component from others, without reading all of them.

A bundle may state the SHA-256 of its files; where it does not, and to notice files that were replaced, samples spread
over the files are read: some megabytes, whatever the size. Weights that were trained further, quantised again or taken
from another release differ in almost every sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from runtime.bundles import BundleComponent

# Together 4 MiB: of a file of 14 GB a sample in every 14 MB, less than one of its matrices
_SAMPLES, _SAMPLE_BYTES = 1024, 4096
_DIGITS = 32


def fingerprint(component: BundleComponent) -> str:
    """32 hexadecimal digits that depend on the names, sizes and samples of the component's files.

    LoRAs and the tokenizer are among them. The directory does not matter, so that replicas with volumes of their own
    agree.

    Raises:
        OSError: a file is not there.
    """
    digest = hashlib.sha256()
    for path in _all_files(component):
        size_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{size_bytes}\0".encode())
        with path.open("rb") as file:
            for start in _sample_starts(size_bytes):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:_DIGITS]


def _all_files(component: BundleComponent) -> Iterator[Path]:
    for path in component.files:
        yield path
        if path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_text())["weight_map"].values())
            yield from (path.parent / shard for shard in sorted(shards))
    yield from (lora.file for lora in component.loras)
    if component.tokenizer is not None:
        yield from sorted(path for path in component.tokenizer.iterdir() if path.is_file())


def _sample_starts(size_bytes: int) -> Iterator[int]:
    """Where samples begin: the whole of a small file, else evenly from its first to its last bytes."""
    if size_bytes <= _SAMPLES * _SAMPLE_BYTES:
        yield from range(0, size_bytes, _SAMPLE_BYTES)
    else:
        last = size_bytes - _SAMPLE_BYTES
        yield from (last * number // (_SAMPLES - 1) for number in range(_SAMPLES))
