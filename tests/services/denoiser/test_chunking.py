"""Blocks in pieces against blocks at once."""

import pytest
import torch

from services.denoiser.chunking import run_in_pieces
from services.denoiser.conditioning import first_frame_to_video, text_to_video
from services.denoiser.glue import Consumer, Gate, PlainGlue, Prepared
from services.denoiser.model import Block, Head
from services.denoiser.precision import use_glue
from tests.services.denoiser.tiny import SCAIL, TEXT_TO_VIDEO, normal, predict_animation, prompt, transformer


@pytest.mark.parametrize("tokens_at_once", [1, 7, 24, 1000])
def test_pieces_give_what_the_whole_gives(tokens_at_once: int) -> None:
    expected = predict_animation(transformer(SCAIL))
    model = transformer(SCAIL)
    run_in_pieces(model, tokens_at_once)
    torch.testing.assert_close(predict_animation(model), expected, rtol=1e-5, atol=1e-5)


def test_pieces_keep_a_timestep_per_token() -> None:
    size = (3, 4, 6)
    conditioning = first_frame_to_video(normal(1, 16, 1, 4, 6), size, TEXT_TO_VIDEO.head_dim)
    latents = normal(1, 16, *size)
    timesteps = conditioning.timesteps(torch.tensor(637), latents)
    whole, pieces = transformer(TEXT_TO_VIDEO), transformer(TEXT_TO_VIDEO)
    run_in_pieces(pieces, 5)
    with torch.no_grad():
        context = whole.embed_context(prompt(TEXT_TO_VIDEO).prompt_embeds)
        expected = whole(latents, timesteps, context, conditioning.rope)
        torch.testing.assert_close(
            pieces(latents, timesteps, context, conditioning.rope), expected, rtol=1e-5, atol=1e-5
        )


def test_token_wise_parts_never_see_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    update = Block.update

    def counted(self: Block, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(tokens.shape[1])
        return update(self, tokens, *rest)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(Block, "update", counted)
    model = transformer(TEXT_TO_VIDEO)
    run_in_pieces(model, 8)
    rope = text_to_video((3, 4, 6), TEXT_TO_VIDEO.head_dim).rope
    with torch.no_grad():
        context = model.embed_context(prompt(TEXT_TO_VIDEO).prompt_embeds)
        model(normal(1, 16, 3, 4, 6), torch.tensor([1]), context, rope)
    assert seen == [8, 8, 2] * TEXT_TO_VIDEO.num_layers


class InPlace(PlainGlue):
    """Writes into the tokens, as kernels do, and gives another view of them."""

    def add(self, tokens: torch.Tensor, linear: Consumer, inputs: Prepared, gate: Gate) -> torch.Tensor:
        tokens = tokens.contiguous()
        updated = super().add(tokens, linear, inputs, gate)
        return tokens.copy_(updated).flatten(0, 1).view(tokens.shape)


@pytest.mark.parametrize("tokens_at_once", [7, 1000])
def test_tokens_that_are_updated_in_place_stay_where_they_are(tokens_at_once: int) -> None:
    expected = predict_animation(transformer(SCAIL))
    model = transformer(SCAIL)
    use_glue(model, InPlace())
    run_in_pieces(model, tokens_at_once)
    torch.testing.assert_close(predict_animation(model), expected, rtol=1e-5, atol=1e-5)


def test_the_head_sees_no_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = Head.forward

    def counted(self: Head, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(tokens.shape[1])
        return forward(self, tokens, *rest)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(Head, "forward", counted)
    model = transformer(SCAIL)
    run_in_pieces(model, 20)
    predict_animation(model)
    assert seen == [20, 20, 8]  # not the tokens of the poses
