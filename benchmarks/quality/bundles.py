"""A bundle as another one, with another transformer file."""

from __future__ import annotations

from pathlib import Path

from runtime.bundles import load_bundle


def with_transformer(bundle: Path, transformer: Path, directory: Path) -> Path:
    """Makes a bundle of links to the files of another, whose transformer is a file in bfloat16; gives its directory.

    Only the lines of the transformer's own table that name file, form and digest are other ones.
    """
    directory.mkdir(parents=True)
    for path in bundle.iterdir():
        if path.name != "bundle.toml":
            (directory / path.name).symlink_to(path.resolve())
    (directory / "transformer_bf16.safetensors").symlink_to(transformer.resolve())
    lines, inside = [], False
    for line in (bundle / "bundle.toml").read_text().splitlines():
        if line.startswith("["):
            inside = line.strip() == "[components.transformer]"
        key = line.partition("=")[0].strip()
        if inside and key in ("quantization", "sha256"):
            continue
        if inside and key == "files":
            line = 'files = ["transformer_bf16.safetensors"]'
        lines.append(line)
    (directory / "bundle.toml").write_text("\n".join(lines) + "\n")
    load_bundle(directory)
    return directory
