"""What an ONNX file says of its network, read without onnxruntime."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.bundles import BundleError

# protobuf's wire format, and the fields of ONNX that lead to the weights and to the size of the input
_VARINT, _BYTES, _FIXED_SIZES = 0, 2, {1: 8, 5: 4}
_GRAPH, _INITIALIZER, _DIMS = 7, 5, 1
_INPUT, _TYPE, _TENSOR, _SHAPE, _DIM, _DIM_VALUE = 11, 2, 1, 2, 1, 1


class WrongNetwork(BundleError):
    """A file is not the network that is needed, or cannot run where it was to; the message names the file and why."""


@dataclass(frozen=True)
class OnnxSizes:
    """Of a network of pictures: numbers in its weights, of any type; height and width of a picture, 0 if not fixed."""

    parameters: int
    height: int
    width: int

    @classmethod
    def of(cls, path: Path) -> OnnxSizes:
        """Reads them off a file without running it; onnxruntime does not tell how many parameters there are.

        The file is a protobuf: ModelProto.graph (7), GraphProto.initializer (5), TensorProto.dims (1); and
        GraphProto.input (11), whose type (2) is a tensor_type (1) with a shape (2) of dim (1) with dim_value (1).

        Raises:
            WrongNetwork: it is not one.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                graphs = list(_messages(data, slice(0, len(data)), _GRAPH))
                tensors = [tensor for graph in graphs for tensor in _messages(data, graph, _INITIALIZER)]
                parameters = sum(math.prod(_numbers(data, tensor, _DIMS)) for tensor in tensors)
                inputs = [value for graph in graphs for value in _messages(data, graph, _INPUT)]
                return cls(parameters, *(_sides(data, inputs[0]) if inputs else (0, 0)))
        except (OSError, ValueError, IndexError) as error:
            raise WrongNetwork(f"{path} is not an ONNX file: {error}") from error


def count_parameters(path: Path) -> int:
    """Numbers in the weights of an ONNX file. Raises WrongNetwork: it is not one."""
    return OnnxSizes.of(path).parameters


def _sides(data: mmap.mmap, value: slice) -> tuple[int, int]:
    """The last two sizes of an input; 0 for one that is not fixed."""
    parts = [value]
    for field in (_TYPE, _TENSOR, _SHAPE, _DIM):
        parts = [inner for part in parts for inner in _messages(data, part, field)]
    sizes = [next(_numbers(data, part, _DIM_VALUE), 0) for part in parts]
    height, width = [0, 0, *sizes][-2:]
    return height, width


def _messages(data: mmap.mmap, part: slice, wanted: int) -> Iterator[slice]:
    """Where the messages in a field of a message are."""
    for field, value in _fields(data, part):
        if field == wanted and isinstance(value, slice):
            yield value


def _numbers(data: mmap.mmap, part: slice, wanted: int) -> Iterator[int]:
    """The whole numbers in a field of a message, one by one or packed."""
    for field, value in _fields(data, part):
        if field == wanted and isinstance(value, int):
            yield value
        elif field == wanted and isinstance(value, slice):
            at = value.start
            while at < value.stop:
                number, at = _varint(data, at)
                yield number


def _fields(data: mmap.mmap, part: slice) -> Iterator[tuple[int, int | slice]]:
    """Fields of the message in a part of the file: numbers, and where bytes are; those of fixed size are left out."""
    at = part.start
    while at < part.stop:
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield field, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if size > part.stop - at:
                raise ValueError("it is cut off")
            yield field, slice(at, at + size)
            at += size
        elif kind in _FIXED_SIZES:
            at += _FIXED_SIZES[kind]
        else:
            raise ValueError(f"unknown kind of field {kind}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of up to ten bytes of seven bits, the lowest first; and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        number, at = number | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return number, at
    raise ValueError("a number is too long")
