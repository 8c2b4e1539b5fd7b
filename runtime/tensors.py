"""Tensors on the wire: the only code that sees raw bytes, dtypes on the wire and byte order. Needs no torch.

A sender turns tensors into messages with `send_tensors`; a receiver turns a stream of messages into messages and whole
tensors with `receive`, filling one preallocated buffer per tensor: one copy, bounded memory, whatever the size.

`tensor_data` messages are plain protobuf on the wire, but on our side they are not built as message objects, which
would copy the payload three times more: `serialize` and `deserializer` write and read their few bytes of framing.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from bunraku.errors import InvalidRequest
from bunraku.v1 import tensor_pb2

# 256 KiB was the fastest for grpc.aio; larger messages are slower (docs/decisions, benchmarks/tensor_stream.py)
CHUNK_BYTES = 256 * 1024
# What one call may carry in all: far above the largest clip of latents, below what a host can hold
MAX_CALL_BYTES = 4 * 1024**3

DataType = tensor_pb2.DataType
BFLOAT16, FLOAT16, FLOAT32 = DataType.DATA_TYPE_BFLOAT16, DataType.DATA_TYPE_FLOAT16, DataType.DATA_TYPE_FLOAT32
UINT8, INT8, INT32, INT64 = (
    DataType.DATA_TYPE_UINT8,
    DataType.DATA_TYPE_INT8,
    DataType.DATA_TYPE_INT32,
    DataType.DATA_TYPE_INT64,
)
BOOL = DataType.DATA_TYPE_BOOL
FLOATS = (FLOAT32, BFLOAT16, FLOAT16)

# Name as torch has it, and the numpy type of the same bytes (numpy has no bfloat16: its bits are taken as they are)
_TYPES: Mapping[int, tuple[str, npt.DTypeLike]] = {
    BFLOAT16: ("bfloat16", np.uint16),
    FLOAT16: ("float16", np.float16),
    FLOAT32: ("float32", np.float32),
    UINT8: ("uint8", np.uint8),
    INT8: ("int8", np.int8),
    INT32: ("int32", np.int32),
    INT64: ("int64", np.int64),
    BOOL: ("bool", np.bool_),
}
_TYPE_OF_NAME = {name: dtype for dtype, (name, _) in _TYPES.items()}
_NAME = re.compile(r"[a-z0-9_.]{1,128}")
_MAX_AXES = 8
_MAX_EXTENT = 2**62  # strides are signed 64-bit numbers, also those of a tensor without elements
_TENSOR_DATA_TAG = 15 << 3 | 2  # field 15, length-delimited

M = TypeVar("M", bound=Message)


def dtype_name(dtype: int) -> str:
    """Name of a wire type as torch has it, such as `bfloat16`."""
    return _TYPES[dtype][0]


def dtype_of(name: str) -> tensor_pb2.DataType.ValueType:
    """Wire type of a torch or numpy type name; KeyError if it cannot be carried."""
    return cast("tensor_pb2.DataType.ValueType", _TYPE_OF_NAME[name])


def item_size(dtype: int) -> int:
    """Bytes per element."""
    return np.dtype(_TYPES[dtype][1]).itemsize


@dataclass(frozen=True)
class WireTensor:
    """A named tensor as bytes: row-major, little-endian, without padding.

    Attributes:
        data: its bytes, uint8 [size_bytes]. They may lie in shared memory, which is given back when the last array or
            tensor made from them is gone.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes

    def named(self, name: str) -> WireTensor:
        """The same bytes under another name."""
        return WireTensor(name, self.dtype, self.shape, self.data)

    def numpy(self) -> npt.NDArray[Any]:
        """The tensor as an array that shares its bytes.

        Raises:
            InvalidRequest: it is bfloat16, which numpy does not have.
        """
        if self.dtype == BFLOAT16:
            raise InvalidRequest((self.name, "is bfloat16, which cannot be read here"))
        return self.data.view(_TYPES[self.dtype][1]).reshape(self.shape)

    @classmethod
    def from_numpy(cls, name: str, array: npt.NDArray[Any]) -> WireTensor:
        """Shares the bytes of an array (copies only what is not contiguous or not little-endian).

        Raises KeyError for a type that cannot be carried.
        """
        little_endian = array.dtype.newbyteorder("<")
        contiguous = np.ascontiguousarray(array, little_endian).reshape(array.shape)  # it makes a scalar 1-D
        return cls(name, dtype_of(contiguous.dtype.name), contiguous.shape, contiguous.reshape(-1).view(np.uint8))

    @classmethod
    def from_bytes(cls, name: str, content: bytes | memoryview) -> WireTensor:
        """A file or other bytes as uint8 [size]."""
        return cls(name, UINT8, (len(content),), np.frombuffer(content, np.uint8))


def require(
    tensors: Mapping[str, WireTensor], name: str, shape: Sequence[int | None], dtypes: Collection[int]
) -> WireTensor:
    """The tensor of a name, after checking it: shapes and dtypes are decided at the border, inside code trusts them.

    Args:
        tensors: what came with the call.
        name: which tensor.
        shape: length of each axis, None where any will do.
        dtypes: the types that will do.

    Raises:
        InvalidRequest: it is missing, or of another shape or type.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise InvalidRequest((name, "is missing"))
    if tensor.dtype not in dtypes:
        expected = " or ".join(dtype_name(dtype) for dtype in dtypes)
        raise InvalidRequest((name, f"must be {expected}, got {dtype_name(tensor.dtype)}"))
    fits = len(shape) == len(tensor.shape) and all(
        wanted in (None, got) for wanted, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if length is None else str(length) for length in shape)
        raise InvalidRequest((name, f"must have the shape [{expected}], got {list(tensor.shape)}"))
    return tensor


class TensorData:
    """Payload of a `tensor_data` message, without the message."""

    __slots__ = ("payload",)

    def __init__(self, payload: memoryview) -> None:
        self.payload = payload


def serialize(message: Message | TensorData) -> bytes:
    """Serializes a message of a streaming rpc; `TensorData` as the `tensor_data` field of one."""
    if isinstance(message, TensorData):
        return b"".join((_framing(message.payload.nbytes), message.payload))
    return message.SerializeToString()


def deserializer(message_type: type[M]) -> Callable[[bytes], M | TensorData]:
    """The reverse of `serialize`: the payload stays where it was received."""

    def deserialize(received: bytes) -> M | TensorData:
        if received and received[0] == _TENSOR_DATA_TAG:
            start, length = _read_framing(received)
            if start + length == len(received):
                return TensorData(memoryview(received)[start:])
        try:
            return message_type.FromString(received)
        except DecodeError as error:
            raise InvalidRequest(("", f"a message of the stream cannot be read: {error}")) from error

    return deserialize


def _framing(length: int) -> bytes:
    framing = bytearray((_TENSOR_DATA_TAG,))
    while length > 0x7F:
        framing.append(length & 0x7F | 0x80)
        length >>= 7
    framing.append(length)
    return bytes(framing)


def _read_framing(received: bytes) -> tuple[int, int]:
    """Where the payload starts, and its length; a malformed length is left for protobuf to refuse."""
    length = 0
    for position in range(1, min(len(received), 11)):
        byte = received[position]
        length |= (byte & 0x7F) << (7 * position - 7)
        if byte < 0x80:
            return position + 1, length
    return 0, -1


class SendsShared(Protocol):
    """Puts bytes where the other side can read them, if it can; see runtime.shared_memory."""

    def place(self, data: npt.NDArray[np.uint8]) -> tensor_pb2.SharedMemory | None: ...


class TakesShared(Protocol):
    """Finds bytes that the other side placed; see runtime.shared_memory."""

    def take(self, name: str, place: tensor_pb2.SharedMemory, size_bytes: int) -> npt.NDArray[np.uint8]: ...


def send_tensors(
    message_type: type[M],
    tensors: Iterable[WireTensor],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    shared: SendsShared | None = None,
) -> Iterator[M | TensorData]:
    """The messages that carry tensors: a header each, then their bytes unless `shared` took them.

    Args:
        message_type: request or response type of the rpc, with the fields `tensor` and `tensor_data`.
        tensors: in the order in which they are to arrive; read one at a time.
        chunk_bytes: payload of a message.
        shared: hands over through shared memory what it accepts.
    """
    for tensor in tensors:
        header = tensor_pb2.TensorHeader(
            name=tensor.name,
            dtype=cast("tensor_pb2.DataType.ValueType", tensor.dtype),
            shape=tensor.shape,
            size_bytes=tensor.size_bytes,
        )
        place = shared.place(tensor.data) if shared else None
        if place is not None:
            header.shared_memory.CopyFrom(place)
        yield cast("Any", message_type)(tensor=header)
        if place is None:
            data = tensor.data.data
            for start in range(0, data.nbytes, chunk_bytes):
                yield TensorData(data[start : start + chunk_bytes])


class _Incoming:
    """A tensor whose bytes are arriving."""

    def __init__(self, header: tensor_pb2.TensorHeader) -> None:
        self.header = header
        self.buffer = np.empty(header.size_bytes, np.uint8)
        self._view = self.buffer.data
        self.received = 0

    @property
    def complete(self) -> bool:
        return self.received == self.buffer.nbytes

    def add(self, payload: memoryview) -> None:
        end = self.received + payload.nbytes
        if end > self.buffer.nbytes:
            raise InvalidRequest(
                (self.header.name, f"has more than the {self.buffer.nbytes} bytes that its header states")
            )
        self._view[self.received : end] = payload
        self.received = end

    def tensor(self) -> WireTensor:
        return _checked(WireTensor(self.header.name, self.header.dtype, tuple(self.header.shape), self.buffer))


class Receiver(Generic[M]):
    """Turns the messages of one call into its messages and whole tensors. See `receive`."""

    def __init__(self, *, max_bytes: int = MAX_CALL_BYTES, shared: TakesShared | None = None) -> None:
        self.max_bytes = max_bytes
        self.shared = shared
        self.total_bytes = 0
        self._incoming: _Incoming | None = None

    def take(self, message: M | TensorData | None) -> M | WireTensor | None:
        """What this message completes: itself, a tensor, or nothing yet."""
        if message is None:
            # what a client of grpc.aio is given for a message that could not be deserialised
            raise InvalidRequest(("", "a message of the stream cannot be read"))
        if isinstance(message, TensorData):
            return self._take_data(message.payload)
        kind = message.WhichOneof("message")
        if kind == "tensor_data":
            return self._take_data(memoryview(cast("Any", message).tensor_data))
        if self._incoming is not None:
            raise self._truncated()
        if kind == "tensor":
            return self._take_header(cast("Any", message).tensor)
        if kind is None:
            raise InvalidRequest(("", "a message of the stream is empty"))
        return message

    def end(self) -> None:
        """Says that no message will come; an unfinished tensor is an error."""
        if self._incoming is not None:
            raise self._truncated()

    def _take_header(self, header: tensor_pb2.TensorHeader) -> WireTensor | None:
        check_header(header)
        self.total_bytes += header.size_bytes
        if self.total_bytes > self.max_bytes:
            raise InvalidRequest(
                (header.name, f"brings the call to {self.total_bytes} bytes of tensors, the limit is {self.max_bytes}")
            )
        if header.HasField("shared_memory"):
            if self.shared is None:
                raise InvalidRequest((header.name, "lies in shared memory, which was not agreed on for this call"))
            data = self.shared.take(header.name, header.shared_memory, header.size_bytes)
            return _checked(WireTensor(header.name, header.dtype, tuple(header.shape), data))
        self._incoming = _Incoming(header)
        return self._completed()

    def _take_data(self, payload: memoryview) -> WireTensor | None:
        if self._incoming is None:
            raise InvalidRequest(("tensor_data", "comes without a tensor header before it"))
        self._incoming.add(payload)
        return self._completed()

    def _completed(self) -> WireTensor | None:
        if self._incoming is None or not self._incoming.complete:
            return None
        tensor = self._incoming.tensor()
        self._incoming = None
        return tensor

    def _truncated(self) -> InvalidRequest:
        incoming = self._incoming
        assert incoming is not None
        text = f"is truncated: {incoming.received} of {incoming.buffer.nbytes} bytes came"
        return InvalidRequest((incoming.header.name, text), reason="TRUNCATED_TENSOR")


async def receive(
    messages: AsyncIterable[M | TensorData], *, max_bytes: int = MAX_CALL_BYTES, shared: TakesShared | None = None
) -> AsyncIterator[M | WireTensor]:
    """The messages of a call as they come, with tensors whole.

    Args:
        messages: the stream of a request or of a response.
        max_bytes: limit of all tensors of the call together.
        shared: finds what was placed in shared memory; None: nothing was agreed on.

    Raises:
        InvalidRequest: a tensor is truncated, too long, of unknown dtype, of a shape that does not fit its size, or
            over the limit.
    """
    receiver: Receiver[M] = Receiver(max_bytes=max_bytes, shared=shared)
    async for message in messages:
        taken = receiver.take(message)
        if taken is not None:
            yield taken
    receiver.end()


async def receive_call(
    messages: AsyncIterable[M | TensorData],
    names: Collection[str],
    *,
    max_bytes: int = MAX_CALL_BYTES,
    shared: TakesShared | None = None,
) -> tuple[M, dict[str, WireTensor]]:
    """A whole call: its parameters, which come first, and its tensors by name.

    Args:
        messages: the stream of a request whose first message is `parameters`.
        names: the tensors that the rpc takes; a name that ends in `.` stands for all that begin with it.
        max_bytes, shared: as in `receive`.

    Raises:
        InvalidRequest: as `receive`, and if the parameters are missing or come twice, or a tensor is unknown or comes
            twice.
    """
    parameters: M | None = None
    tensors: dict[str, WireTensor] = {}
    async for item in receive(messages, max_bytes=max_bytes, shared=shared):
        if isinstance(item, WireTensor):
            if parameters is None:
                raise InvalidRequest(("parameters", "must be the first message"))
            if not any(item.name == name or (name.endswith(".") and item.name.startswith(name)) for name in names):
                raise InvalidRequest((item.name, f"is not a tensor of this rpc (it takes {', '.join(names)})"))
            if item.name in tensors:
                raise InvalidRequest((item.name, "came twice"))
            tensors[item.name] = item
        elif parameters is None:
            parameters = item
        else:
            raise InvalidRequest(("parameters", "came twice"))
    if parameters is None:
        raise InvalidRequest(("parameters", "are missing"))
    return parameters, tensors


def check_header(header: tensor_pb2.TensorHeader) -> None:
    """Refuses a header that cannot be: the buffer is made only for one that can.

    Raises:
        InvalidRequest: name, dtype, shape or size_bytes is wrong.
    """
    name = header.name if _NAME.fullmatch(header.name) else "tensor.name"
    if name != header.name:
        raise InvalidRequest((name, f"must be 1 to 128 characters of a-z, 0-9, _ and ., got {header.name[:40]!r}"))
    if header.dtype not in _TYPES:
        raise InvalidRequest((name, f"has the unknown dtype {header.dtype}"), reason="UNKNOWN_DTYPE")
    if len(header.shape) > _MAX_AXES or any(length < 0 for length in header.shape):
        raise InvalidRequest(
            (name, f"must have at most {_MAX_AXES} axes of length 0 or more, got {list(header.shape)}")
        )
    if math.prod(max(1, length) for length in header.shape) * item_size(header.dtype) > _MAX_EXTENT:
        raise InvalidRequest((name, f"has axes that are too long: {list(header.shape)}"))
    size_bytes = math.prod(header.shape) * item_size(header.dtype)
    if size_bytes != header.size_bytes:
        text = f"of shape {list(header.shape)} and {dtype_name(header.dtype)} has {size_bytes} bytes, the header states {header.size_bytes}"
        raise InvalidRequest((name, text))


def _checked(tensor: WireTensor) -> WireTensor:
    if tensor.dtype == BOOL and tensor.size_bytes and int(tensor.data.max()) > 1:
        raise InvalidRequest((tensor.name, "is bool but has bytes other than 0 and 1"))
    return tensor
