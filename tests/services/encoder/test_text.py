from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.weights import CheckpointMismatch
from services.encoder.text import PromptTokenizer, TextEncoder, clean_prompt
from tests.services.encoder.checkpoints import TEXT, text_encoder
from training.tiny_tokenizer import write_tokenizer

END = 1


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return text_encoder(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (" two\r\n\t lines\u3000here ", "two lines here"),
        ("tea &amp;amp; cake", "tea & cake"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),  # exactly twice: beside a tag, ftfy itself leaves entities alone
        ("<b> &ldquo;x&rdquo;", "<b> “x”"),  # and so what they stand for is not straightened either
        ("&nbsp;edge&nbsp;", "edge"),
        ("cafÃ© “x” \uff21\uff22\uff0c", 'café "x" AB,'),
        ("Keep CASE, and: punctuation!", "Keep CASE, and: punctuation!"),
        ("", ""),
    ],
)
def test_prompt_is_cleaned(raw: str, cleaned: str) -> None:
    assert clean_prompt(raw) == cleaned


def test_rows_past_the_prompt_are_zero(encoder: TextEncoder) -> None:
    encoded = encoder.encode(["a red jacket", "walk"])
    assert encoded.prompt_embeds.shape == (2, TEXT.text_len, TEXT.dim)
    assert encoded.num_tokens == (4, 2)
    assert encoded.truncated == (False, False)
    for rows, used in zip(encoded.prompt_embeds, encoded.num_tokens, strict=True):
        assert torch.count_nonzero(rows[used:]) == 0
        assert (rows[:used].abs().sum(1) > 0).all()


def test_embeddings_equal_those_of_the_padded_and_masked_batch(encoder: TextEncoder) -> None:
    prompts = ["a red jacket", "", "she walks slowly across the garden"]
    token_ids = torch.zeros(len(prompts), TEXT.text_len, dtype=torch.int64)
    for row, prompt in zip(token_ids, prompts, strict=True):
        ids, _ = encoder.tokenizer.tokenize(prompt)
        row[: len(ids)] = torch.tensor(ids)
    padded = encoder.model(token_ids, (token_ids != 0).long())
    torch.testing.assert_close(encoder.encode(prompts).prompt_embeds, padded, atol=1e-5, rtol=1e-5)


def test_what_padding_contains_changes_nothing(encoder: TextEncoder) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    zeros = encoder.model(torch.tensor([[5, 6, END, 0, 0]]), mask)
    others = encoder.model(torch.tensor([[5, 6, END, 9, 300]]), mask)
    assert torch.equal(zeros, others)


def test_prompt_does_not_depend_on_its_company(encoder: TextEncoder) -> None:
    together = encoder.encode(["walk", "a red jacket and a long blue coat", "walk"]).prompt_embeds
    assert torch.equal(together[0], encoder.encode(["walk"]).prompt_embeds[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_order_of_the_words_matters(encoder: TextEncoder) -> None:
    # without relative positions both would give the same rows in another order
    ahead, behind = encoder.encode(["a b c", "c b a"]).prompt_embeds
    assert not torch.allclose(ahead[3], behind[3], atol=1e-4)


def test_empty_prompt_is_one_token(encoder: TextEncoder) -> None:
    encoded = encoder.encode(["  "])
    assert encoded.num_tokens == (1,)
    assert encoder.tokenizer.tokenize("") == ([END], False)
    assert torch.count_nonzero(encoded.prompt_embeds[0, 0]) > 0


def test_too_long_prompt_is_cut_before_its_end_token_and_reported(encoder: TextEncoder) -> None:
    fits = " ".join(["a"] * (TEXT.text_len - 1))
    encoded = encoder.encode([fits, f"{fits} a", fits * 5])
    assert encoded.num_tokens == (TEXT.text_len,) * 3
    assert encoded.truncated == (False, True, True)
    assert torch.equal(encoded.prompt_embeds[0], encoded.prompt_embeds[1])
    ids, _ = encoder.tokenizer.tokenize(f"{fits} a")
    assert ids[-1] == END
    assert END not in ids[:-1]


def test_prompt_is_cleaned_before_it_is_tokenized(encoder: TextEncoder) -> None:
    dirty, clean = encoder.encode(["a&amp;amp;b", "a&b"]).prompt_embeds
    assert torch.equal(dirty, clean)


def test_embeddings_have_the_dtype_of_the_weights(tmp_path: Path) -> None:
    half = text_encoder(tmp_path, dtype=torch.bfloat16).encode(["a red jacket"]).prompt_embeds
    assert half.dtype == torch.bfloat16
    full = text_encoder(tmp_path).encode(["a red jacket"]).prompt_embeds
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.05)


def test_tokens_go_to_where_the_weights_are(tmp_path: Path) -> None:
    encoder = text_encoder(tmp_path)
    encoder.model.to("meta")
    seen: list[str] = []
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type))
    assert encoder.encode(["a red jacket"]).prompt_embeds.is_meta
    assert seen == ["meta"]


def test_no_prompts_give_no_rows(encoder: TextEncoder) -> None:
    assert encoder.encode([]).prompt_embeds.shape == (0, TEXT.text_len, TEXT.dim)


def test_tokenizer_with_more_ids_than_the_table_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, TEXT.vocab)
    with pytest.raises(CheckpointMismatch, match="has 1024 tokens, the embedding table only 1023 rows"):
        PromptTokenizer(tmp_path, replace(TEXT, vocab=1023))


def test_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, TEXT.vocab)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"post_processor": None}), encoding="utf-8")
    with pytest.raises(CheckpointMismatch, match="exactly one end-of-text token"):
        PromptTokenizer(tmp_path, TEXT)


def test_padding_and_truncation_stored_in_the_file_do_not_count(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, TEXT.vocab)
    plain = PromptTokenizer(tmp_path, TEXT).tokenize("a red jacket")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert PromptTokenizer(tmp_path, TEXT).tokenize("a red jacket") == plain


def test_missing_tokenizer_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        PromptTokenizer(tmp_path, TEXT)
