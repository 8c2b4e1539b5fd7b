"""Attention in 8-bit floats: near the formula, exact about what all values share, the same by kernels."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.denoiser import precision
from services.denoiser.attention import AUTO, SAGE, Attention, Installed
from services.denoiser.chunking import run_in_pieces
from services.denoiser.fp8_attention import FP8, HIGHEST, Fp8Attention, Fp8Tokens, as_fp8
from services.denoiser.int8 import PLAIN, TurnedInt8Linear
from services.denoiser.model import AttentionLayer, Linear
from services.denoiser.precision import BALANCED, FAST, attention_of, fast_attention, has_kernels, set_precision
from services.denoiser.quantisation import Int8Linear
from tests.services.denoiser.tiny import SCAIL, normal, predict_animation, transformer

DEVICE = torch.device("cuda:0")
needs_cudnn = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_kernels(DEVICE) or importlib.util.find_spec("cudnn") is None,
    reason="needs a Hopper GPU, Triton and nvidia-cudnn-frontend",
)


def peaked(length: int, keys: int, heads: int = 2, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that each attend to a few keys, one channel of keys large, and values that have a mean."""
    values = normal(1, keys, heads, width, seed=3) + 4 * normal(heads, width, seed=4)
    loud = normal(1, keys, heads, width, seed=2) * torch.where(torch.arange(width) == 3, 5.0, 1.5)
    return normal(1, length, heads, width, seed=1) * 1.5, loud, values


def exact(*given: Tensor) -> Tensor:
    queries, keys, values = (each.float().transpose(1, 2) for each in given)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def test_it_is_near_the_formula() -> None:
    queries, keys, values = peaked(70, 300)
    expected = exact(queries, keys, values)
    assert relative(Fp8Attention()(queries, keys, values), expected) < 0.03


def test_what_all_values_share_comes_out_as_it_went_in() -> None:
    queries, keys, _ = peaked(5, 40)
    shared = 1000 * normal(2, 64)
    gathered = Fp8Attention()(queries, keys, shared.expand(1, 40, 2, 64))
    torch.testing.assert_close(gathered, shared.expand(1, 5, 2, 64))


def test_the_mean_is_taken_away_before_rounding() -> None:
    queries, keys, values = peaked(20, 200)
    far = values + 500
    assert relative(Fp8Attention()(queries, keys, far) - 500, exact(queries, keys, values)) < 0.05


def test_many_keys_of_little_weight_count_together() -> None:
    scores = torch.cat((torch.tensor([6.0]), torch.zeros(403), torch.full((403,), -96.0)))  # weights 1, 0.0025, 0
    first = torch.eye(64)[0]
    queries, keys = 8 * first.view(1, 1, 1, 64), scores.view(1, -1, 1, 1) * first
    values = (scores == 0).float() - (scores < 0).float()
    values = values.view(1, -1, 1, 1).expand_as(keys)
    torch.testing.assert_close(Fp8Attention()(queries, keys, values), exact(queries, keys, values), rtol=0.04, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_values_of_any_size_are_held(scale: float) -> None:
    queries, keys, values = peaked(20, 200)
    expected = exact(queries, keys, values * scale)
    assert relative(Fp8Attention()(queries, keys, values * scale), expected) < 0.03


def test_queries_may_come_piece_by_piece_and_as_they_are() -> None:
    queries, keys, values = peaked(300, 90)
    whole = Fp8Attention()(queries, keys, values)
    attending = Fp8Attention().over(as_fp8(keys), values)
    pieces = [attending.gather(as_fp8(piece)) for piece in torch.split(queries, 77, dim=1)]
    attended = attending.finish(torch.cat(pieces, 1))
    torch.testing.assert_close(attended.float(), whole.flatten(2))
    torch.testing.assert_close(attended.tokens(slice(70, 90)).float(), whole[:, 70:90].flatten(2))


def test_layers_take_what_was_gathered_for_the_numbers_it_stands_for() -> None:
    gathered = Fp8Tokens(as_fp8(normal(2, 3, 32)), torch.tensor([0.5]), normal(32, seed=1))
    numbers = gathered.data.float() * 0.5 + normal(32, seed=1)
    linear = Linear(32, 8)
    layer = TurnedInt8Linear(linear, PLAIN, input_is_turned=True, group=32, gelu=False)
    assert torch.equal(linear(gathered), linear(numbers))
    assert torch.equal(linear.prepare(gathered, numbers), 2 * numbers)
    dequantising = Int8Linear(32, 8, bias=False)
    assert torch.equal(dequantising(gathered), dequantising(numbers))
    assert torch.equal(dequantising.prepare(gathered, numbers), 2 * numbers)
    assert torch.equal(layer.prepare(gathered).data, layer.prepare(numbers).data)
    assert torch.equal(layer(gathered), layer(numbers))


def test_beyond_the_range_is_the_end_of_the_range() -> None:
    rounded = as_fp8(torch.tensor([1e6, -1e6, 447.0, 0.3]))
    assert rounded.float().tolist() == [HIGHEST, -HIGHEST, HIGHEST, 0.3125]


def test_fast_is_balanced_with_8_bit_self_attention() -> None:
    balanced, fast = transformer(SCAIL), transformer(SCAIL)
    set_precision(balanced, BALANCED)
    set_precision(fast, FAST)
    near, ours = predict_animation(balanced), predict_animation(fast)
    assert (attention_of(balanced), attention_of(fast)) == ("auto", "fp8")
    cross = fast.get_submodule("blocks.0.cross_attn")
    assert isinstance(cross, AttentionLayer)
    assert cross.attention is AUTO  # text and image: as before
    assert 0 < relative(ours, near) < 0.05


def test_pieces_of_a_block_gather_the_same() -> None:
    whole, pieces = transformer(SCAIL), transformer(SCAIL)
    for model in (whole, pieces):
        set_precision(model, FAST)
    run_in_pieces(pieces, 5)
    torch.testing.assert_close(predict_animation(pieces), predict_animation(whole), rtol=1e-4, atol=1e-4)


def test_a_cpu_has_the_definition() -> None:
    assert fast_attention(torch.device("cpu")).name == "fp8"


def test_a_kernel_that_cannot_run_here_leaves_attention_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(device: torch.device) -> Attention:
        raise OSError("libcudnn.so.9: cannot open\nand more")

    def breaks(attention: Attention, device: torch.device) -> None:
        raise RuntimeError("no plan for this device")

    monkeypatch.setattr(precision, "_sage", lambda device: Fp8Attention())
    monkeypatch.setattr(precision, "_cudnn_fp8", refuses)
    monkeypatch.setattr(precision, "_try_out", breaks)
    assert fast_attention(torch.device("cuda", 0)) is AUTO
    assert caplog.messages == [
        "no 8-bit attention here (no plan for this device; libcudnn.so.9: cannot open): fast is balanced"
    ]


def test_the_first_kernel_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Attention] = []
    first, second = Fp8Attention(), Fp8Attention()
    monkeypatch.setattr(precision, "_sage", lambda device: first)
    monkeypatch.setattr(precision, "_cudnn_fp8", lambda device: second)
    monkeypatch.setattr(precision, "_try_out", lambda attention, device: tried.append(attention))
    assert fast_attention(torch.device("cuda", 0)) is first
    assert tried == [first]


def test_trying_out_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def mute(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise RuntimeError(f"mute {tuple(queries.shape)} {queries.dtype}")

    monkeypatch.setattr(torch, "mute_kernel", mute, raising=False)
    precision._try_out(Fp8Attention(), torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"mute \(1, 256, 1, 128\) torch.bfloat16"):
        precision._try_out(Installed("mute", "torch", 2, "torch", "mute_kernel"), torch.device("cpu"))


def test_packages_that_are_not_there_or_too_old_are_not_installed() -> None:
    assert not SAGE.is_installed
    assert not Installed("torch", "torch", 99, "torch", "softmax").is_installed
    assert Installed("torch", "torch", 2, "torch", "softmax").is_installed


@pytest.mark.parametrize("with_statistics", [True, False])
def test_installed_functions_are_called_with_their_arguments(
    monkeypatch: pytest.MonkeyPatch, with_statistics: bool
) -> None:
    def function(queries: Tensor, keys: Tensor, values: Tensor, *, layout: str) -> object:
        assert layout == "NHD"
        result = queries + 10 * keys + 100 * values
        return (result, None) if with_statistics else result

    monkeypatch.setattr(torch, "made_up", function, raising=False)
    attention = Installed("made up", "torch", 2, "torch", "made_up", (("layout", "NHD"),))
    one = torch.ones(1)
    assert attention(one, one, one).item() == attention.over(one, one).gather(one).item() == 111


@pytest.mark.gpu
@needs_cudnn
@pytest.mark.parametrize(("length", "keys"), [(777, 1234), (512, 2048)])
def test_cudnn_gathers_the_same(length: int, keys: int) -> None:
    from services.denoiser.cudnn_attention import CudnnFp8Attention

    given = [each.to(DEVICE, torch.bfloat16) for each in peaked(length, keys, width=128)]
    ours, plain = CudnnFp8Attention(), Fp8Attention()
    held, expected = ours.centred(given[2]), plain.centred(given[2])
    torch.testing.assert_close(held.mean, expected.mean)
    torch.testing.assert_close(held.scale, expected.scale)
    assert float((held.data.float() != expected.data.float()).float().mean()) < 0.01
    assert torch.equal(ours.as_fp8(given[0]).float(), as_fp8(given[0]).float())
    gathered = ours(*given)
    assert gathered.dtype == torch.bfloat16
    assert relative(gathered, plain(*given).float()) < 0.01
    assert relative(gathered, exact(*given)) < 0.03


@pytest.mark.gpu
@needs_cudnn
def test_queries_are_turned_to_8_bits_alike() -> None:
    from services.denoiser import glue
    from services.denoiser.rope import Rope
    from services.denoiser.triton_glue import TRITON

    projected = torch.randn(2, 5, 384, device=DEVICE).bfloat16()
    weight, angles = torch.randn(384, device=DEVICE) * 40, torch.randn(5, 32, device=DEVICE)
    rope = Rope(angles.cos(), angles.sin())
    norm = glue.HeadNorm(1e-6, weight, 6, FP8)
    ours, expected = TRITON.turn(projected, norm, rope).float(), glue.PLAIN.turn(projected, norm, rope).float()
    assert float(((ours - expected).abs() > 0.07 * expected.abs() + 0.01).float().mean()) == 0
    assert float((ours != expected).float().mean()) < 0.01
