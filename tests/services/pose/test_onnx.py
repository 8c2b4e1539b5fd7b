"""ONNX files as networks: reading them, batches, devices, and what goes wrong."""

from __future__ import annotations

import asyncio
import ctypes
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as states

from bunraku.errors import OutOfMemory, StageBroken
from runtime.bundles import BundleError
from runtime.gpu import GpuThread, device_fault
from services.pose.onnx import OnnxNetwork, OnnxSettings, Pictures, providers
from services.pose.onnx_file import OnnxSizes, WrongNetwork, count_parameters
from training.tiny_onnx import Graph, write_networks

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
SETTINGS = OnnxSettings(device="cpu", num_threads=1)


def doubling(batch: int | str) -> bytes:
    """Twice the picture, and its brightest level."""
    graph = Graph()
    graph.add("Add", "pictures", "pictures", output="twice")
    graph.add("ReduceMax", "pictures", axes=(1, 2, 3), keepdims=0, output="brightest")
    return graph.model({"pictures": (batch, 3, 2, 4)}, {"twice": (batch, 3, 2, 4), "brightest": (batch,)})


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., OnnxNetwork]:
    def load(content: bytes, settings: OnnxSettings = SETTINGS) -> OnnxNetwork:
        path = tmp_path / "network.onnx"
        path.write_bytes(content)
        return OnnxNetwork.load(path, settings)

    return load


@dataclass
class Value:
    name: str
    shape: Sequence[int | str | None]
    type: str = "tensor(float)"


@dataclass
class FakeSession:
    """Gives the mean of each picture, or does what `act` does; remembers how many pictures each run had."""

    batch: int | str = "batch"
    act: Callable[[Pictures], None] = lambda pictures: None
    runs: list[int] = field(default_factory=list)
    working: list[str] = field(default_factory=lambda: [CPU])

    def get_inputs(self) -> list[Any]:
        return [Value("pictures", (self.batch, 3, 2, 4))]

    def get_outputs(self) -> list[Any]:
        return [Value("mean", (self.batch,))]

    def get_providers(self) -> list[str]:
        return self.working

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {CPU: {}, CUDA: {"device_id": "1"}, TENSORRT: {"device_id": "2"}}

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, Pictures]) -> list[Any]:
        pictures = input_feed["pictures"]
        self.runs.append(len(pictures))
        self.act(pictures)
        return [pictures.mean(axis=(1, 2, 3))]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        (pictures,), (mean,) = binding.inputs, binding.outputs
        (mean[:],) = self.run(["mean"], {"pictures": pictures})


@dataclass
class Binding:
    """Arrays of the host by their addresses."""

    inputs: list[Pictures] = field(default_factory=list)
    outputs: list[Pictures] = field(default_factory=list)

    def bind_input(self, *arguments: Any) -> None:
        self.inputs.append(self._array(*arguments))

    def bind_output(self, *arguments: Any) -> None:
        self.outputs.append(self._array(*arguments))

    def _array(self, name: str, kind: str, index: int, dtype: Any, shape: list[int], address: int) -> Pictures:
        assert (kind, index, dtype) == ("cpu", 0, np.float32)
        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        return np.ctypeslib.as_array(memory).reshape(shape)


def pictures(count: int) -> Pictures:
    return np.random.default_rng(0).random((count, 3, 2, 4), dtype=np.float32)


@pytest.mark.parametrize("batch", [1, 3, "any"])
def test_any_number_of_pictures_gives_each_its_own_output(load: Callable[..., OnnxNetwork], batch: int | str) -> None:
    network = load(doubling(batch), OnnxSettings(device="cpu", num_threads=1, max_batch=4))
    for count in (1, 3, 7):
        outputs = network.run(pictures(count))
        np.testing.assert_array_equal(outputs["twice"], 2 * pictures(count))
        np.testing.assert_array_equal(outputs["brightest"], pictures(count).max(axis=(1, 2, 3)))


@pytest.mark.parametrize("batch", [1, 3, "any"])
def test_tensors_are_run_where_they_are(load: Callable[..., OnnxNetwork], batch: int | str) -> None:
    network = load(doubling(batch), OnnxSettings(device="cpu", num_threads=1, max_batch=4))
    assert network.device == torch.device("cpu")
    for count in (1, 3, 7):
        given = torch.from_numpy(pictures(count))
        outputs = network.run_on_device(given)
        np.testing.assert_array_equal(outputs["twice"], 2 * pictures(count))
        np.testing.assert_array_equal(outputs["brightest"], pictures(count).max(axis=(1, 2, 3)))
        np.testing.assert_array_equal(given, pictures(count))


def test_no_pictures_give_empty_outputs(load: Callable[..., OnnxNetwork]) -> None:
    network = load(doubling(1))
    shapes = {"twice": (0, 3, 2, 4), "brightest": (0,)}
    assert {name: values.shape for name, values in network.run(pictures(0)).items()} == shapes
    none = network.run_on_device(torch.from_numpy(pictures(0)))
    assert {name: values.shape for name, values in none.items()} == shapes


@pytest.mark.parametrize(
    ("working", "device"), [([CPU], "cpu"), ([CUDA, CPU], "cuda:1"), ([TENSORRT, CUDA, CPU], "cuda:2")]
)
def test_a_network_is_where_its_first_provider_computes(working: list[str], device: str) -> None:
    session = FakeSession(working=working)
    assert OnnxNetwork(session, "fake").device == torch.device(device)


def test_names_and_sizes_are_read_from_the_file(load: Callable[..., OnnxNetwork]) -> None:
    network = load(doubling("any"))
    assert (network.height, network.width, network.batch) == (2, 4, SETTINGS.max_batch)
    assert network.shapes == {"twice": (3, 2, 4), "brightest": ()}
    assert network.provider == CPU


def test_a_free_first_axis_is_used_up_to_the_limit() -> None:
    session = FakeSession()
    network = OnnxNetwork(session, "fake", max_batch=4)
    session.runs.clear()
    network.run(pictures(10))
    assert session.runs == [4, 4, 2]
    network.run_on_device(torch.from_numpy(pictures(10)))
    assert session.runs == [4, 4, 2] * 2


def test_a_fixed_first_axis_is_filled_up() -> None:
    session = FakeSession(batch=3)
    network = OnnxNetwork(session, "fake", max_batch=8)
    outputs = network.run(pictures(4))
    on_device = network.run_on_device(torch.from_numpy(pictures(4)))
    assert set(session.runs) == {3}
    for means in (outputs["mean"], on_device["mean"]):
        np.testing.assert_allclose(means, pictures(4).mean(axis=(1, 2, 3)), rtol=1e-6)


def test_a_first_axis_that_is_free_in_name_only_is_run_one_by_one(load: Callable[..., OnnxNetwork]) -> None:
    graph = Graph()
    graph.add("Reshape", "pictures", graph.integers(1, 24), output="flat")
    network = load(graph.model({"pictures": ("batch", 3, 2, 4)}, {"flat": ("batch", 24)}))
    assert network.batch == 1
    np.testing.assert_array_equal(network.run(pictures(3))["flat"], pictures(3).reshape(3, 24))


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"a": (1, 3, 2, 4), "b": (1, 3, 2, 4)}, "a tensor"),
        ({"a": (1, 1, 2, 4)}, r"\[1, 1, 2, 4\]"),
        ({"a": (1, 3, 24)}, r"\[1, 3, 24\]"),
        ({"a": (1, 3, "height", 4)}, "height"),
    ],
)
def test_a_file_that_takes_no_pictures_is_named_with_what_it_takes(
    load: Callable[..., OnnxNetwork], inputs: dict[str, tuple[int | str, ...]], named: str
) -> None:
    graph = Graph()
    graph.add("Identity", "a", output="out")
    with pytest.raises(WrongNetwork, match=rf"network\.onnx.*{named}"):
        load(graph.model(inputs, {"out": inputs["a"]}))


def test_a_file_that_is_no_onnx_is_named(load: Callable[..., OnnxNetwork]) -> None:
    with pytest.raises(WrongNetwork, match=r"network\.onnx is not an ONNX file"):
        load(b"a checkpoint of another kind")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongNetwork, match=r"absent\.onnx"):
        OnnxNetwork.load(tmp_path / "absent.onnx", SETTINGS)


def test_a_wrong_file_ends_a_stage_like_a_wrong_bundle() -> None:
    assert issubclass(WrongNetwork, BundleError)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA")
def test_cuda_that_is_asked_for_and_absent_is_an_error(load: Callable[..., OnnxNetwork]) -> None:
    with pytest.raises(WrongNetwork, match=CUDA):
        load(doubling(1), OnnxSettings(device="cuda"))


def test_the_best_device_comes_first_and_the_cpu_last() -> None:
    def chosen(available: Sequence[str], **settings: Any) -> list[str]:
        return [name for name, _ in providers(OnnxSettings(**settings), available)]

    everything = [TENSORRT, CUDA, CPU]
    assert chosen([CPU]) == [CPU]
    assert chosen(everything) == [CUDA, CPU]
    assert chosen(everything, device="cpu") == [CPU]
    assert chosen(everything, tensorrt_cache=Path("engines")) == [TENSORRT, CUDA, CPU]


def test_the_device_number_is_passed_on() -> None:
    chosen = providers(OnnxSettings(device="cuda:2", tensorrt_cache=Path("engines")), [TENSORRT, CUDA, CPU])
    assert [options.get("device_id") for _, options in chosen] == ["2", "2", None]


def test_what_this_build_lacks_is_named() -> None:
    for settings, missing in ((OnnxSettings(device="cuda"), CUDA), (OnnxSettings(tensorrt_cache=Path("x")), TENSORRT)):
        with pytest.raises(WrongNetwork, match=missing):
            providers(settings, [CPU])


@pytest.mark.parametrize("device", ["tpu", "cuda:first", "cuda:-1"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=device):
        providers(OnnxSettings(device=device), [CUDA, CPU])


def test_settings_out_of_bounds_are_refused() -> None:
    for num_threads in (0, 65):
        with pytest.raises(ValueError, match=f"num_threads must be 1 to 64, got {num_threads}"):
            OnnxSettings(num_threads=num_threads)
    with pytest.raises(ValueError, match="max_batch must be at least 1"):
        OnnxSettings(max_batch=0)
    with pytest.raises(ValueError, match="device is cpu"):
        OnnxSettings(device="cpu", tensorrt_cache=Path("engines"))


def failing(text: str) -> Callable[[Pictures], None]:
    """Fails for pictures that are not black, so not while the network is tried."""

    def act(pictures: Pictures) -> None:
        if pictures.any():
            raise states.RuntimeException(text)

    return act


def test_memory_that_is_short_is_said_so() -> None:
    network = OnnxNetwork(FakeSession(act=failing("Failed to allocate memory for requested buffer of size 9")), "fake")
    with pytest.raises(OutOfMemory, match="size 9"):
        network.run(pictures(1))
    with pytest.raises(OutOfMemory, match="size 9"):
        network.run_on_device(torch.from_numpy(pictures(1)))


def arena_of(most: int) -> Callable[[Pictures], None]:
    """Does as an arena that has room for so many pictures."""

    def act(pictures: Pictures) -> None:
        if len(pictures) > most:
            raise states.RuntimeException("Available memory of 256 is smaller than requested bytes of 512")

    return act


@pytest.mark.parametrize(("room", "together"), [(8, 8), (7, 4), (2, 2), (1, 1)])
def test_as_many_pictures_run_together_as_limited_memory_has_room_for(room: int, together: int) -> None:
    session = FakeSession(act=arena_of(room))
    network = OnnxNetwork(session, "fake", is_limited=True)
    assert network.batch == together
    session.runs.clear()
    outputs = network.run(pictures(10))
    np.testing.assert_allclose(outputs["mean"], pictures(10).mean(axis=(1, 2, 3)), rtol=1e-6)
    assert max(session.runs) == together


def test_limited_memory_without_room_for_one_picture_is_said_so() -> None:
    with pytest.raises(OutOfMemory, match="smaller than requested bytes of 512"):
        OnnxNetwork(FakeSession(act=arena_of(0)), "fake", is_limited=True)


def test_an_arena_is_limited_where_the_settings_say_so() -> None:
    [(_, limited), _] = providers(OnnxSettings(device="cuda", arena_bytes=12345), [CUDA, CPU])
    assert limited["gpu_mem_limit"] == "12345"
    assert limited["arena_extend_strategy"] == "kSameAsRequested"
    [(_, free), _] = providers(OnnxSettings(device="cuda"), [CUDA, CPU])
    assert not {"gpu_mem_limit", "arena_extend_strategy"} & free.keys()


def test_a_fault_of_the_device_is_known_to_the_stage() -> None:
    network = OnnxNetwork(FakeSession(act=failing("CUDA failure 700: an illegal memory access")), "fake")
    with pytest.raises(RuntimeError) as caught:
        network.run(pictures(1))
    assert isinstance(device_fault(caught.value), StageBroken)


def test_other_errors_of_onnxruntime_are_left_as_they_are() -> None:
    network = OnnxNetwork(FakeSession(act=failing("a shape does not fit")), "fake")
    with pytest.raises(states.RuntimeException, match="a shape"):
        network.run(pictures(1))


async def test_cancelled_work_stops_before_the_next_batch() -> None:
    entered, leave = threading.Event(), threading.Event()

    def wait(pictures: Pictures) -> None:
        if pictures.any():
            entered.set()
            leave.wait(timeout=10)

    session = FakeSession(batch=1, act=wait)
    network = OnnxNetwork(session, "fake")
    session.runs.clear()
    thread = GpuThread()
    work = asyncio.ensure_future(thread.run(lambda: network.run(pictures(5))))
    await asyncio.to_thread(entered.wait, 10)
    work.cancel()
    # the flag is set by the loop, so it must have had a turn
    await asyncio.sleep(0)
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert session.runs == [1]
    thread.shutdown()


def test_the_weights_of_a_file_are_counted(tmp_path: Path) -> None:
    # 2 x 3 weights and 4 more (dims packed), among fields of other kinds; a tensor without dims is one number
    tensor = b"\x08\x02\x08\x03\x10\x01\x4a\x02\xff\xff"
    packed = b"\x0a\x01\x04\x25\x00\x00\x00\x00"
    graph = b"\x0a\x03abc" + b"".join(b"\x2a" + bytes([len(part)]) + part for part in (tensor, packed, b"\x10\x01"))
    file = tmp_path / "network.onnx"
    file.write_bytes(b"\x08\x08" + b"\x3a" + bytes([len(graph)]) + graph)
    assert count_parameters(file) == 6 + 4 + 1
    write_networks(tmp_path)
    assert count_parameters(tmp_path / "whole_body.onnx") > 133 * 3
    for content in (b"\x3a\x7f", b"\x07", b"", b"\xff" * 12):
        file.write_bytes(content)
        with pytest.raises(WrongNetwork, match=r"network\.onnx is not an ONNX file"):
            count_parameters(file)


def test_the_size_of_pictures_is_read_off_the_file(load: Callable[..., OnnxNetwork], tmp_path: Path) -> None:
    network = load(doubling("any"))
    assert OnnxSizes.of(tmp_path / "network.onnx") == OnnxSizes(0, network.height, network.width)
    load(doubling(3))
    assert OnnxSizes.of(tmp_path / "network.onnx") == OnnxSizes(0, 2, 4)
    write_networks(tmp_path)
    network = OnnxNetwork.load(tmp_path / "whole_body.onnx", SETTINGS)
    sizes = OnnxSizes.of(tmp_path / "whole_body.onnx")
    assert (sizes.height, sizes.width) == (network.height, network.width)
