"""ONNX files -> networks that take pictures, any number at a time.

A network here has one input, float32 [n, 3, height, width]; names and sizes are read from the file. Its outputs come by
name, each [n, ...]. Pictures are given, and outputs come, as arrays of the host or, where the network runs, as tensors:
of a detector's output of megabytes a picture only what may be people is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as states
from torch import Tensor

from bunraku.errors import OutOfMemory
from runtime.gpu import raise_if_cancelled
from services.pose.onnx_file import WrongNetwork

Pictures = npt.NDArray[np.float32]
Outputs = dict[str, npt.NDArray[np.float32]]
TensorOutputs = dict[str, Tensor]

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_UNREADABLE = (
    states.Fail,
    states.InvalidArgument,
    states.InvalidGraph,
    states.InvalidProtobuf,
    states.NoSuchFile,
    states.NotImplemented,
)
_FAILED = (states.Fail, states.RuntimeException, states.EPFail, states.EngineError)
# how its arenas, CUDA and cuDNN say that memory is short
_OUT_OF_MEMORY = (
    "Failed to allocate memory",
    "is smaller than requested bytes",  # an arena at its limit
    "out of memory",
    "ALLOC_FAILED",
    "bad_alloc",
)


@dataclass(frozen=True)
class OnnxSettings:
    """Where networks run.

    Attributes:
        device: `auto` (the first CUDA device if onnxruntime has a working one, else the CPU), `cpu`, `cuda` or `cuda:N`;
            with either of the last two it is an error if CUDA does not work.
        num_threads: of the CPU, for one operator.
        max_batch: the most pictures run together, where the file allows several.
        tensorrt_cache: directory for TensorRT's engines; None: no TensorRT. An engine takes minutes to build and then
            serves one kind of GPU and one version of TensorRT.
        arena_bytes: of a CUDA device, the most that weights, tensors and workspaces of a network take; pictures are run
            together only as far as they fit. None: there is no limit.
    """

    device: str = "auto"
    num_threads: int = min(4, os.cpu_count() or 1)
    max_batch: int = 8
    tensorrt_cache: Path | None = None
    arena_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_threads <= 64:
            raise ValueError(f"num_threads must be 1 to 64, got {self.num_threads}")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}")
        if self.tensorrt_cache and self.device == "cpu":
            raise ValueError("tensorrt_cache is for CUDA devices, device is cpu")


class Value(Protocol):
    """An input or output as onnxruntime describes it; of a shape, a string or None is a size that is not fixed."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class Session(Protocol):
    """What is used of onnxruntime.InferenceSession."""

    def get_inputs(self) -> list[Value]: ...

    def get_outputs(self) -> list[Value]: ...

    def get_providers(self) -> list[str]: ...

    def get_provider_options(self) -> Mapping[str, Mapping[str, str]]: ...

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, Pictures]) -> list[Any]: ...

    def io_binding(self) -> Any: ...

    def run_with_iobinding(self, binding: Any) -> None: ...


class OnnxNetwork:
    """A network of pictures.

    Attributes:
        source: the file, for messages.
        height, width: of the pictures that it takes.
        batch: pictures that are run together: what the file fixes it at, else `max_batch`; 1 if the file claims to take
            any number and fails with two.
        shapes: of each output, without the first axis.
        provider: onnxruntime's execution provider that does most of it.
        device: where that is.
    """

    def __init__(self, session: Session, source: str, max_batch: int = 8, *, is_limited: bool = False) -> None:
        """Tries the network once, on black; where its memory is limited, with as many pictures as will run together.

        Raises:
            WrongNetwork: it does not take pictures.
            OutOfMemory: its memory is limited to too little for one picture.
        """
        self._session, self.source, self.provider = session, source, session.get_providers()[0]
        self.device = _device_of(session)
        self._input, (fixed, self.height, self.width) = _picture_input(session, source)
        self._names = [output.name for output in session.get_outputs()]
        self._batch_is_fixed = fixed is not None
        self.batch = fixed or (max_batch if max_batch == 1 or self._takes_two() else 1)
        while is_limited and not self._batch_is_fixed and self.batch > 1 and not self._fits(self.batch):
            self.batch //= 2
        tried = self._run_together(self._black(fixed or 1))
        self.shapes = {name: values.shape[1:] for name, values in tried.items()}

    @classmethod
    def load(cls, path: Path, settings: OnnxSettings) -> OnnxNetwork:
        """Raises WrongNetwork: the file cannot be read, does not take pictures, or cannot run on that device."""
        is_limited = settings.arena_bytes is not None
        return cls(open_session(path, settings), str(path), settings.max_batch, is_limited=is_limited)

    @property
    def gives(self) -> str:
        """Its outputs in words, for messages."""
        return ", ".join(f"{name} [n, {', '.join(map(str, shape))}]" for name, shape in self.shapes.items())

    def run(self, pictures: Pictures) -> Outputs:
        """Outputs for any number of pictures, `batch` at a time.

        Args:
            pictures: float32 [n, 3, height, width].

        Returns:
            each output by name, [n, ...].

        Raises:
            OutOfMemory: the device has too little memory.
        """
        done: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in self._names}
        for start in range(0, len(pictures), self.batch):
            raise_if_cancelled()
            for name, values in self._run_some(pictures[start : start + self.batch]).items():
                done[name].append(values)
        return {name: np.concatenate(parts) if parts else self._none(name) for name, parts in done.items()}

    def run_on_device(self, pictures: Tensor) -> TensorOutputs:
        """As `run`, with tensors of the network's device, from which and to which nothing is copied.

        Args:
            pictures: float32 [n, 3, height, width], contiguous.

        Raises:
            OutOfMemory: the device has too little memory.
        """
        filled, count = pictures, len(pictures)
        if self._batch_is_fixed and (missing := -count % self.batch):
            filled = torch.cat([pictures, pictures.new_zeros((missing, *pictures.shape[1:]))])
        outputs = {name: pictures.new_empty((len(filled), *shape)) for name, shape in self.shapes.items()}
        for start in range(0, count, self.batch):
            raise_if_cancelled()
            part = slice(start, start + self.batch)
            self._run_bound(filled[part], {name: values[part] for name, values in outputs.items()})
        return {name: values[:count] for name, values in outputs.items()}

    def _run_bound(self, pictures: Tensor, outputs: TensorOutputs) -> None:
        """Runs the network on pictures where they are, into outputs that are there for it."""
        binding = self._session.io_binding()
        places = [(binding.bind_input, self._input, pictures)]
        places += [(binding.bind_output, name, values) for name, values in outputs.items()]
        for bind, name, values in places:
            shape, index = list(values.shape), values.device.index or 0
            bind(name, values.device.type, index, np.float32, shape, values.data_ptr())
        if pictures.is_cuda:
            # onnxruntime has a stream of its own: it begins when the pictures are there, and returns when it is done
            torch.cuda.current_stream(pictures.device).synchronize()
        with self._faults():
            self._session.run_with_iobinding(binding)

    def _run_some(self, pictures: Pictures) -> Outputs:
        """Outputs for at most `batch` pictures, filled up with black ones where the file fixes the number."""
        missing = self.batch - len(pictures) if self._batch_is_fixed else 0
        filled = np.concatenate([pictures, self._black(missing)]) if missing else pictures
        return {name: values[: len(pictures)] for name, values in self._run_together(filled).items()}

    def _run_together(self, pictures: Pictures) -> Outputs:
        with self._faults():
            values = self._session.run(self._names, {self._input: np.ascontiguousarray(pictures)})
        return dict(zip(self._names, values, strict=True))

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Gives onnxruntime's errors that mean something to the stage their types."""
        try:
            yield
        except _FAILED as error:
            if any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise OutOfMemory(f"{self.source} does not fit the memory of the device: {error}") from error
            if "CUDA" in str(error) or "CUDNN" in str(error):
                # in the words by which runtime.gpu knows that the device is broken
                raise RuntimeError(f"CUDA error in {self.source}: {error}") from error
            raise

    def _takes_two(self) -> bool:
        """Whether two pictures give two results. Exported graphs may name the first axis as free and still fix it inside."""
        try:
            outputs = self._run_together(self._black(2))
        except (*_FAILED, *_UNREADABLE, OutOfMemory):
            return False
        return all(len(values) == 2 for values in outputs.values())

    def _fits(self, count: int) -> bool:
        try:
            self._run_together(self._black(count))
        except OutOfMemory:
            return False
        return True

    def _black(self, count: int) -> Pictures:
        return np.zeros((count, 3, self.height, self.width), np.float32)

    def _none(self, name: str) -> npt.NDArray[np.float32]:
        return np.zeros((0, *self.shapes[name]), np.float32)


def _device_of(session: Session) -> torch.device:
    """Where the provider that comes first computes."""
    provider = session.get_providers()[0]
    if provider not in (_CUDA, _TENSORRT):
        return torch.device("cpu")
    return torch.device("cuda", int(session.get_provider_options()[provider]["device_id"]))


def _picture_input(session: Session, source: str) -> tuple[str, tuple[int | None, int, int]]:
    """Name of the only input; pictures that it takes at a time (None: any number), their height and width."""
    inputs = session.get_inputs()
    described = ", ".join(f"{value.name} {value.type} {list(value.shape)}" for value in inputs)
    if len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4:
        batch, channels, height, width = inputs[0].shape
        if channels == 3 and isinstance(height, int) and isinstance(width, int):
            return inputs[0].name, (batch if isinstance(batch, int) else None, height, width)
    raise WrongNetwork(
        f"{source}: must take one float32 [n, 3, height, width] of fixed height and width, has {described}"
    )


def open_session(path: Path, settings: OnnxSettings) -> Session:
    """onnxruntime's session of a file. Raises WrongNetwork: it cannot be read, or cannot run on that device."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.num_threads
    options.inter_op_num_threads = 1
    # threads that wait must not take processor time from the other stages of the machine
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    # a pattern asks for all tensors of a run as one block, beside those that the arena has from a run before
    options.enable_mem_pattern = settings.arena_bytes is None
    wanted = providers(settings, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(path, options, providers=wanted)
    except _UNREADABLE as error:
        raise WrongNetwork(f"{path} is not an ONNX file that can be run: {error}") from error
    # a device that fails must not silently become the CPU
    session.disable_fallback()
    working = session.get_providers()
    required = [_TENSORRT] if settings.tensorrt_cache else [_CUDA] if settings.device.startswith("cuda") else []
    for provider in required:
        if provider not in working:
            raise WrongNetwork(f"{path}: {provider} does not work here, only {', '.join(working)}")
    return session


def providers(settings: OnnxSettings, available: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """onnxruntime's execution providers with their options, the first that can do it does it.

    Raises:
        WrongNetwork: what the settings ask for is not in this build of onnxruntime.
        ValueError: a device of another kind.
    """
    kind, _, index = settings.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {settings.device!r}")
    needed = [_CUDA] if kind == "cuda" else []
    if settings.tensorrt_cache:
        needed.append(_TENSORRT)
    for provider in needed:
        if provider not in available:
            raise WrongNetwork(f"this onnxruntime has no {provider}, only {', '.join(available)}")
    chosen: list[tuple[str, dict[str, str]]] = []
    device_id = {"device_id": index or "0"}
    # blocks of the size asked for: the default doubles each new one, up to twice of what is needed
    arena = {"gpu_mem_limit": str(settings.arena_bytes), "arena_extend_strategy": "kSameAsRequested"}
    limits = {} if settings.arena_bytes is None else arena
    if settings.tensorrt_cache:
        cache = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(settings.tensorrt_cache)}
        chosen.append((_TENSORRT, device_id | cache))
    if kind != "cpu" and _CUDA in available:
        # heuristic: the default tries every convolution algorithm, for each new batch size, at the first request
        chosen.append((_CUDA, device_id | {"cudnn_conv_algo_search": "HEURISTIC"} | limits))
    return [*chosen, (_CPU, {})]
