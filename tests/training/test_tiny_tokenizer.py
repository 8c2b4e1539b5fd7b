from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from training.tiny_tokenizer import WORDS, write_tokenizer

UNKNOWN = 2
SIZE = 1024


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, SIZE)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_special_tokens_have_the_ids_of_t5(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]


def test_a_known_word_is_one_token_and_the_end_is_marked(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("A woman in a Red jacket waves.").tokens == [
        *("▁a", "▁woman", "▁in", "▁a", "▁red", "▁jacket", "▁waves", ".", "</s>")
    ]
    for word in WORDS:
        assert tokenizer.encode(word).tokens == [f"▁{word}", "</s>"]


def test_an_unlisted_form_is_a_stem_and_an_ending(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("punched").tokens == ["▁punch", "ed", "</s>"]


def test_empty_text_is_the_end_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").ids == [1]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_is_encoded_without_an_unknown_token(tokenizer: Tokenizer, text: str) -> None:
    for special in ("<pad>", "</s>", "<unk>"):
        text = text.replace(special, "")
    ids = tokenizer.encode(text).ids
    assert UNKNOWN not in ids
    assert max(ids) < SIZE
    assert ids[-1] == 1


@pytest.mark.parametrize(
    "text", ["a 日本 é walk", "<0x41> is not a byte", "<extra_id_0> neither", "50% & more_or-less?"]
)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_reserved_pieces_are_not_matched_in_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<0x41><extra_id_0>").tokens
    assert "<0x41>" not in tokens
    assert "<extra_id_0>" not in tokens


def test_repeated_runs_write_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "again", SIZE)
    files = sorted(path.name for path in directory.iterdir())
    assert files == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.parametrize("text", ["A red jacket, waving.", "", "日本 glorp"])
def test_transformers_reads_the_folder_alike(directory: Path, tokenizer: Tokenizer, text: str) -> None:
    auto = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert (auto.pad_token_id, auto.eos_token_id, auto.unk_token_id) == (0, 1, 2)
    ids = tokenizer.encode(text).ids
    encoded = auto(text, padding="max_length", max_length=40, truncation=True)
    assert encoded.input_ids == ids + [0] * (40 - len(ids))
    assert encoded.attention_mask == [1] * len(ids) + [0] * (40 - len(ids))


@pytest.mark.parametrize("size", [400, 1024])
def test_vocabulary_has_exactly_the_size_asked_for(tmp_path: Path, size: int) -> None:
    write_tokenizer(tmp_path, size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 337, got 300"):
        write_tokenizer(tmp_path, 300)
