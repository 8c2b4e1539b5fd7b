"""Weights in one piece of memory, and blocks that take turns on the device: the same results, in any order."""

import pytest
import torch
from torch import Tensor, nn

from runtime.streaming import BlockStreamer, Piece, bring_for_calls, size_of, stream_blocks, weights_of

CPU = torch.device("cpu")


class Layer(nn.Module):
    """Weights of several dtypes and sizes that nothing divides."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(7, 7)
        self.weight = nn.Parameter(torch.randn(7, generator=generator), requires_grad=False)
        self.register_buffer("numbers", torch.randint(-9, 9, (3, 7), generator=generator).to(torch.int8))
        self.register_buffer("nothing", None)

    def forward(self, values: Tensor) -> Tensor:
        return self.inner(values) * self.weight + self.get_buffer("numbers").float().sum(0)


def packed(layer: nn.Module) -> Piece:
    weights = list(weights_of(layer))
    return Piece(weights, torch.empty(size_of(weights), dtype=torch.uint8))


def layers(count: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(Layer(seed) for seed in range(count))).requires_grad_(False)


def test_a_piece_holds_every_weight_once_at_an_aligned_place() -> None:
    layer = layers(1)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    piece = packed(layer)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    places = [tensor.data_ptr() - piece.host.data_ptr() for tensor in after.values()]
    assert all(0 <= place < len(piece.host) and place % 256 == 0 for place in places)
    assert len(set(places)) == len(places)


def test_modules_can_be_set_apart() -> None:
    layer = Layer(0)
    assert {name for _, name, _ in weights_of(layer)} == {"weight", "numbers", "bias"}
    names = [name for owner, name, _ in weights_of(layer, apart=[layer.inner]) if owner is layer]
    assert names == ["weight", "numbers"]


def test_weights_that_are_trained_can_be_packed() -> None:
    layer = nn.Linear(3, 3)
    assert not packed(layer).host.requires_grad


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_streamed_layers_compute_the_same_again_and_again(count: int) -> None:
    model, values = layers(count), torch.ones(2, 7)
    expected = model(values)
    stream_blocks([(layer, packed(layer)) for layer in model], CPU)
    for _ in range(3):
        assert torch.equal(model(values), expected)


def test_no_more_than_two_layers_are_on_the_device() -> None:
    model = layers(5)
    pieces = [packed(layer) for layer in model]
    streamer = BlockStreamer(pieces, CPU)
    assert [len(place) for place in streamer._places] == [len(pieces[0].host)] * 2


def test_while_a_layer_computes_the_next_one_is_there_or_on_its_way() -> None:
    streamer = BlockStreamer([packed(layer) for layer in layers(4)], CPU)
    held = []
    for index in (0, 1, 2, 3, 0, 2):  # the last as after a run that was cancelled
        streamer.before(index)
        held.append(sorted(each for each in streamer._held if each is not None))
        streamer.after(index)
    assert held == [[0, 1], [1, 2], [2, 3], [0, 3], [0, 1], [2, 3]]
    streamer.before(0)
    assert sorted(streamer._held) == [0, 1]  # type: ignore[type-var]  # both places are taken


@pytest.mark.parametrize("cancelled", range(6))
def test_after_a_cancelled_run_the_next_layer_is_there_in_time_again(cancelled: int) -> None:
    streamer = BlockStreamer([packed(layer) for layer in layers(6)], CPU)
    for index in range(cancelled):
        streamer.before(index)
        streamer.after(index)
    streamer.before(cancelled)
    for index in range(6):
        streamer.before(index)
        assert set(streamer._held) == {index, (index + 1) % 6}
        streamer.after(index)


def test_weights_that_come_for_a_call_are_of_host_memory_afterwards() -> None:
    layer, values = layers(1), torch.ones(2, 7)
    expected, piece = layer(values), packed(layer)
    undo = bring_for_calls(layer, piece, CPU)
    assert torch.equal(layer(values), expected)
    memory = piece.host.untyped_storage().data_ptr()
    assert {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict().values()} == {memory}
    undo()
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_weights_leave_the_device_where_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 3)
    bring_for_calls(layer, packed(layer), torch.device("meta"))
    there: list[str] = []

    def fail(values: Tensor) -> Tensor:
        there.append(layer.weight.device.type)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(layer, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        layer(torch.ones(1, 3))
    assert there == ["meta"]
    assert layer.weight.device.type == "cpu"


def test_inputs_come_to_the_device_too() -> None:
    layer = nn.Linear(3, 3)
    bring_for_calls(layer, packed(layer), torch.device("meta"))
    assert layer(torch.ones(1, 3)).device.type == "meta"
    assert layer.weight.device.type == "cpu"
