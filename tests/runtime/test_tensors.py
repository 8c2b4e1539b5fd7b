"""Tensors as streams of messages: what comes out is what went in, and what cannot be is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from bunraku.errors import InvalidRequest
from bunraku.v1 import tensor_pb2, vae_pb2
from runtime import tensors as wire
from runtime.tensors import (
    CHUNK_BYTES,
    MAX_CALL_BYTES,
    Receiver,
    TensorData,
    WireTensor,
    check_header,
    deserializer,
    dtype_name,
    dtype_of,
    item_size,
    receive,
    receive_call,
    require,
    send_tensors,
    serialize,
)
from tests.runtime.fakes import FIRST_ENCODE

Request = vae_pb2.EncodeRequest
deserialize = deserializer(Request)
DTYPES = {
    "bfloat16": (1, np.uint16),
    "float16": (2, np.float16),
    "float32": (3, np.float32),
    "uint8": (4, np.uint8),
    "int8": (5, np.int8),
    "int32": (6, np.int32),
    "int64": (7, np.int64),
    "bool": (8, np.bool_),
}
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def wire_tensors(draw: st.DrawFn, name: str = "frames") -> WireTensor:
    """Any dtype, any shape, any bits (only 0 and 1 for bool)."""
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape: tuple[int, ...] = draw(shapes)
    size = int(np.prod(shape, dtype=int)) * item_size(dtype_of(dtype))
    content = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    return WireTensor(name, dtype_of(dtype), shape, content & np.uint8(1 if dtype == "bool" else 255))


def on_the_wire(messages: Iterable[Any]) -> list[Any]:
    """What the other side reads when these messages are sent to it."""
    return [deserialize(serialize(message)) for message in messages]


async def as_they_come(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


async def received(messages: Iterable[Any], **options: Any) -> list[Any]:
    return [item async for item in receive(as_they_come(messages), **options)]


def header(name: str = "frames", dtype: int = wire.UINT8, shape: Iterable[int] = (4,), size_bytes: int = 4) -> Request:
    described = tensor_pb2.TensorHeader(name=name, dtype=dtype, shape=shape, size_bytes=size_bytes)  # type: ignore[arg-type]
    return Request(tensor=described)


def data(content: bytes) -> TensorData:
    return TensorData(memoryview(content))


def same(got: WireTensor, sent: WireTensor) -> bool:
    return (got.name, got.dtype, got.shape, got.data.tobytes()) == (
        sent.name,
        sent.dtype,
        sent.shape,
        sent.data.tobytes(),
    )


@given(wire_tensors(), st.integers(1, 40))
async def test_every_type_shape_and_chunk_size_is_carried_bit_exactly(sent: WireTensor, chunk_bytes: int) -> None:
    messages = on_the_wire(send_tensors(Request, [sent], chunk_bytes=chunk_bytes))
    [got] = await received(messages)
    assert same(got, sent)
    assert len(messages) == 1 + -(-sent.size_bytes // chunk_bytes)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_types_have_the_numbers_and_sizes_of_the_contract(name: str) -> None:
    number, numpy_type = DTYPES[name]
    assert (dtype_of(name), dtype_name(number)) == (number, name)
    assert tensor_pb2.DataType.Name(dtype_of(name)) == f"DATA_TYPE_{name.upper()}"
    assert item_size(number) == np.dtype(numpy_type).itemsize


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"bfloat16"}))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_an_array_comes_back_equal(name: str, shape: tuple[int, ...]) -> None:
    array: npt.NDArray[Any] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[name][1])
    back = WireTensor.from_numpy("frames", array).numpy()
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert np.array_equal(back, array)


def test_an_array_that_is_transposed_or_big_endian_is_sent_in_order() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    sent = WireTensor.from_numpy("frames", array)
    assert sent.data.tobytes() == b"".join(int(value).to_bytes(4, "little") for value in (0, 3, 1, 4, 2, 5))


def test_a_contiguous_array_is_sent_without_a_copy() -> None:
    array = np.zeros((2, 3), np.float32)
    assert np.shares_memory(WireTensor.from_numpy("frames", array).data, array)
    assert np.shares_memory(WireTensor.from_numpy("frames", array).numpy(), array)


def test_a_type_that_cannot_be_carried_is_an_error() -> None:
    with pytest.raises(KeyError):
        WireTensor.from_numpy("frames", np.zeros(2, np.float64))


def test_bytes_are_a_tensor_of_uint8() -> None:
    sent = WireTensor.from_bytes("video", b"\x00\xff")
    assert (sent.dtype, sent.shape, sent.size_bytes) == (wire.UINT8, (2,), 2)
    assert sent.named("other").name == "other"
    assert sent.named("other").data is sent.data


def test_bfloat16_has_no_numpy_array() -> None:
    with pytest.raises(InvalidRequest, match="frames: is bfloat16"):
        WireTensor("frames", wire.BFLOAT16, (1,), np.zeros(2, np.uint8)).numpy()


@given(st.binary(max_size=300))
def test_the_fast_framing_is_what_protobuf_writes(payload: bytes) -> None:
    assert serialize(data(payload)) == Request(tensor_data=payload).SerializeToString()
    got = deserialize(Request(tensor_data=payload).SerializeToString())
    assert isinstance(got, TensorData)
    assert got.payload == payload


@pytest.mark.parametrize("size_bytes", [127, 128, 16383, 16384, CHUNK_BYTES, 2**21 - 1, 2**21])
def test_the_framing_of_long_payloads_is_what_protobuf_writes(size_bytes: int) -> None:
    payload = bytes(size_bytes)
    assert serialize(data(payload)) == Request(tensor_data=payload).SerializeToString()
    assert deserialize(serialize(data(payload))).payload.nbytes == size_bytes  # type: ignore[union-attr]


def test_a_payload_is_read_where_it_lies() -> None:
    content = Request(tensor_data=b"abc").SerializeToString()
    got = deserialize(content)
    assert isinstance(got, TensorData)
    assert got.payload.obj is content


@given(st.binary(max_size=30))
def test_any_bytes_are_a_message_or_a_bad_request(content: bytes) -> None:
    try:
        readable = isinstance(deserialize(content), TensorData | Request)
    except InvalidRequest:
        readable = False
    assert readable or not _readable(content)


def _readable(content: bytes) -> bool:
    try:
        Request.FromString(content)
    except DecodeError:
        return False
    return True


def test_data_followed_by_another_field_is_left_to_protobuf() -> None:
    got = deserialize(Request(tensor_data=b"abc").SerializeToString() + FIRST_ENCODE.SerializeToString())
    assert got == FIRST_ENCODE


@given(wire_tensors(), st.integers(1, 40))
async def test_a_plain_protobuf_sender_is_understood(sent: WireTensor, chunk_bytes: int) -> None:
    head = tensor_pb2.TensorHeader(
        name=sent.name,
        dtype=sent.dtype,  # type: ignore[arg-type]
        shape=sent.shape,
        size_bytes=sent.size_bytes,
    )
    content = sent.data.tobytes()
    chunks = [content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes)]
    plain = [Request(tensor=head), *(Request(tensor_data=chunk) for chunk in chunks)]
    for messages in (plain, [deserialize(message.SerializeToString()) for message in plain]):
        [got] = await received(messages)
        assert same(got, sent)


@given(wire_tensors(), st.integers(1, 40))
def test_a_plain_protobuf_receiver_understands(sent: WireTensor, chunk_bytes: int) -> None:
    content = [serialize(message) for message in send_tensors(Request, [sent], chunk_bytes=chunk_bytes)]
    head, *rest = [Request.FromString(message) for message in content]
    assert (head.tensor.name, list(head.tensor.shape)) == (sent.name, list(sent.shape))
    assert head.tensor.size_bytes == sent.size_bytes
    assert b"".join(message.tensor_data for message in rest) == sent.data.tobytes()


async def test_messages_and_tensors_come_in_the_order_sent() -> None:
    first, second = WireTensor.from_bytes("frames", b"ab"), WireTensor.from_bytes("frames", b"c")
    messages = [FIRST_ENCODE, *send_tensors(Request, [first]), FIRST_ENCODE, *send_tensors(Request, [second])]
    got = await received(on_the_wire(messages))
    assert got[0] == got[2] == FIRST_ENCODE
    assert same(got[1], first)
    assert same(got[3], second)


async def test_tensors_are_read_one_at_a_time_by_the_sender() -> None:
    made: list[int] = []

    def making() -> Iterable[WireTensor]:
        for number in range(3):
            made.append(number)
            yield WireTensor.from_bytes("frames", b"x")

    messages = send_tensors(Request, making())
    next(messages)
    assert made == [0]


TRUNCATED: dict[str, list[Any]] = {
    "no data": [header()],
    "too little data": [header(), data(b"abc")],
    "a message in between": [header(), data(b"abc"), FIRST_ENCODE, data(b"d")],
    "another tensor in between": [header(), data(b"abc"), header(), data(b"abcd")],
}


@pytest.mark.parametrize("case", TRUNCATED)
async def test_a_truncated_tensor_is_refused(case: str) -> None:
    with pytest.raises(InvalidRequest, match=r"frames: is truncated: [03] of 4 bytes came") as error:
        await received(TRUNCATED[case])
    assert error.value.reason == "TRUNCATED_TENSOR"


REFUSED: dict[str, tuple[list[Any], str]] = {
    "too much data": ([header(), data(b"abcde")], "frames: has more than the 4 bytes"),
    "data after the end": ([header(), data(b"abcd"), data(b"e")], "tensor_data: comes without a tensor header"),
    "data first": ([data(b"a")], "tensor_data: comes without a tensor header"),
    "plain data first": ([Request(tensor_data=b"a")], "tensor_data: comes without a tensor header"),
    "no dtype": ([header(dtype=0)], "frames: has the unknown dtype 0"),
    "unknown dtype": ([header(dtype=9)], "frames: has the unknown dtype 9"),
    "size too small": ([header(size_bytes=3)], r"frames: of shape \[4\] and uint8 has 4 bytes, the header states 3"),
    "size too large": ([header(dtype=wire.FLOAT32, size_bytes=17)], "frames: .* has 16 bytes, the header states 17"),
    "negative axis": ([header(shape=(-2, -2))], r"axes of length 0 or more, got \[-2, -2\]"),
    "nine axes": ([header(shape=[1] * 9, size_bytes=1)], "at most 8 axes"),
    "axes beyond any memory": ([header(shape=(2**62, 2**62), size_bytes=0)], "axes that are too long"),
    "empty, but of long axes": ([header(shape=(0, 2**40, 2**40), size_bytes=0)], "axes that are too long"),
    "no name": ([header(name="")], "tensor.name: must be 1 to 128"),
    "name with a capital": ([header(name="Frames")], "tensor.name: must be 1 to 128"),
    "long name": ([header(name="x" * 129)], "tensor.name: must be 1 to 128"),
    "bool of 2": ([header(dtype=wire.BOOL), data(b"\x00\x01\x02\x00")], "frames: is bool but has bytes other"),
    "empty message": ([Request()], "a message of the stream is empty"),
    "unreadable message": ([None], "a message of the stream cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_stream_that_cannot_be_is_refused(case: str) -> None:
    messages, text = REFUSED[case]
    with pytest.raises(InvalidRequest, match=text):
        await received(messages)


@pytest.mark.parametrize("shape", [[1] * 8, [2**31, 0], [0] * 8, []])
def test_the_longest_and_the_emptiest_shapes_are_allowed(shape: list[int]) -> None:
    size_bytes = int(np.prod(shape, dtype=int))
    check_header(header(name="x" * 128, shape=shape, size_bytes=size_bytes).tensor)
    empty = WireTensor("frames", wire.UINT8, tuple(shape), np.zeros(size_bytes, np.uint8))
    assert empty.numpy().shape == tuple(shape)


async def test_a_tensor_over_the_limit_is_refused_before_it_has_a_buffer() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match=r"frames: brings the call to 1000000 bytes .* the limit is 999999"):
            await received([header(shape=(1_000_000,), size_bytes=1_000_000)], max_bytes=999_999)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


async def test_the_limit_holds_for_all_tensors_of_a_call_together() -> None:
    messages = [header(), data(b"abcd"), header(), data(b"abcd")]
    assert len(await received(messages, max_bytes=8)) == 2
    with pytest.raises(InvalidRequest, match="brings the call to 8 bytes"):
        await received(messages, max_bytes=7)


def test_the_default_limit_is_4_gib() -> None:
    assert MAX_CALL_BYTES == 4 * 2**30
    assert Receiver().max_bytes == MAX_CALL_BYTES


async def test_shared_memory_that_was_not_agreed_on_is_refused() -> None:
    message = header()
    message.tensor.shared_memory.segment = "bunraku-0123456789abcdef.1"
    with pytest.raises(InvalidRequest, match="which was not agreed on for this call"):
        await received([message])


class Shared:
    """Takes over what is at least 3 bytes long."""

    def __init__(self) -> None:
        self.placed: list[npt.NDArray[np.uint8]] = []

    def place(self, content: npt.NDArray[np.uint8]) -> tensor_pb2.SharedMemory | None:
        if content.nbytes < 3:
            return None
        self.placed.append(content.copy())
        return tensor_pb2.SharedMemory(segment="here", generation=len(self.placed))

    def take(self, name: str, place: tensor_pb2.SharedMemory, size_bytes: int) -> npt.NDArray[np.uint8]:
        assert name == "frames"
        return self.placed[place.generation - 1][:size_bytes]


async def test_what_shared_memory_takes_is_not_sent_and_the_rest_is() -> None:
    shared = Shared()
    sent = [WireTensor.from_bytes("frames", content) for content in (b"abcd", b"xy", b"efg")]
    messages = on_the_wire(send_tensors(Request, sent, shared=shared))
    assert [type(message) for message in messages] == [Request, Request, TensorData, Request]
    got = await received(messages, shared=shared)
    assert all(same(*pair) for pair in zip(got, sent, strict=True))


async def test_bool_in_shared_memory_is_checked_too() -> None:
    shared = Shared()
    sent = WireTensor("frames", wire.BOOL, (3,), np.array([0, 1, 2], np.uint8))
    with pytest.raises(InvalidRequest, match="is bool"):
        await received(on_the_wire(send_tensors(Request, [sent], shared=shared)), shared=shared)


async def called(messages: Iterable[Any], names: Iterable[str] = ("frames", "extra.")) -> tuple[Any, Any]:
    return await receive_call(as_they_come(messages), list(names))


async def test_a_call_is_its_parameters_and_its_tensors_by_name() -> None:
    sent = [WireTensor.from_bytes("frames", b"ab"), WireTensor.from_bytes("extra.one", b"c")]
    parameters, got = await called([FIRST_ENCODE, *send_tensors(Request, sent)])
    assert parameters == FIRST_ENCODE
    assert list(got) == ["frames", "extra.one"]
    assert same(got["extra.one"], sent[1])


BAD_CALLS: dict[str, tuple[list[Any], str]] = {
    "no parameters": ([], "parameters: are missing"),
    "tensor first": ([header(), data(b"abcd"), FIRST_ENCODE], "parameters: must be the first message"),
    "parameters twice": ([FIRST_ENCODE, FIRST_ENCODE], "parameters: came twice"),
    "tensor twice": ([FIRST_ENCODE, *[header(), data(b"abcd")] * 2], "frames: came twice"),
    "unknown": ([FIRST_ENCODE, header(name="other"), data(b"abcd")], "other: is not a tensor of this rpc .*frames"),
    "extra alone": ([FIRST_ENCODE, header(name="extra"), data(b"abcd")], "extra: is not a tensor of this rpc"),
    "no prefix": ([FIRST_ENCODE, header(name="frames.one"), data(b"abcd")], "frames.one: is not a tensor"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
async def test_a_call_that_cannot_be_is_refused(case: str) -> None:
    messages, text = BAD_CALLS[case]
    with pytest.raises(InvalidRequest, match=text):
        await called(messages)


FOUND = {"latents": WireTensor("latents", wire.FLOAT16, (1, 16, 2), np.zeros(64, np.uint8))}
MISFITS = {
    "missing": ("frames", (None,), wire.FLOATS, "frames: is missing"),
    "type": ("latents", (1, 16, 2), (wire.FLOAT32, wire.UINT8), "latents: must be float32 or uint8, got float16"),
    "length": ("latents", (1, 15, None), wire.FLOATS, r"must have the shape \[1, 15, any\], got \[1, 16, 2\]"),
    "axes": ("latents", (1, 16), wire.FLOATS, r"must have the shape \[1, 16\], got \[1, 16, 2\]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_refused_with_what_would(case: str) -> None:
    name, shape, dtypes, text = MISFITS[case]
    with pytest.raises(InvalidRequest, match=text):
        require(FOUND, name, shape, dtypes)


def test_a_tensor_that_fits_is_given() -> None:
    assert require(FOUND, "latents", (1, None, 2), wire.FLOATS) is FOUND["latents"]
