"""Tensors through shared memory: between calls, between processes, and when either side dies."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bunraku.errors import InvalidRequest, NotReady
from bunraku.v1 import stage_pb2, stage_pb2_grpc, tensor_pb2, vae_pb2
from runtime import client as client_module
from runtime import shared_memory
from runtime.client import Budget, StageClient
from runtime.gpu import raise_if_cancelled
from runtime.shared_memory import MIN_BYTES, SharedMemory, Sharing, boot_id
from runtime.stage import Limits
from runtime.tensors import WireTensor
from tests.runtime.fakes import (
    FIRST_DECODE,
    FakeVae,
    Stage,
    Tensors,
    channel,
    client,
    decode,
    encode,
    stage,
    until,
    zeros,
)
from tests.runtime.processes import SIZE, running

LARGE = 2 * MIN_BYTES


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where segments lie; nothing may be left in it."""
    yield tmp_path
    assert names(tmp_path) == []


@pytest.fixture
def pair(directory: Path) -> Iterator[tuple[SharedMemory, SharedMemory]]:
    """Two processes' worth of shared memory in this one."""
    sender, receiver = SharedMemory(directory), SharedMemory(directory)
    yield sender, receiver
    sender.close()
    receiver.close()


def filled(value: int, size_bytes: int = LARGE) -> npt.NDArray[np.uint8]:
    return np.full(size_bytes, value, np.uint8)


def segments(directory: Path, memory: SharedMemory) -> list[str]:
    return sorted(path.name for path in directory.glob(f"bunraku-{memory.instance}.[0-9]*"))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_tensor_is_found_where_it_was_placed(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    sent = np.random.default_rng(0).integers(0, 256, LARGE, np.uint8)
    lent = sender.place(sent, receiver.instance)
    assert lent is not None
    got = receiver.take("frames", lent.place, LARGE, sender.instance)
    assert np.array_equal(got, sent)


def test_few_bytes_are_not_worth_it(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    assert sender.place(filled(1, MIN_BYTES - 1), receiver.instance) is None
    assert sender.place(filled(1, MIN_BYTES), receiver.instance) is not None


def test_memory_is_given_back_when_the_last_view_is_gone(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(7), receiver.instance)
    assert lent is not None
    data = receiver.take("frames", lent.place, LARGE, sender.instance)
    view = WireTensor("frames", 3, (LARGE // 4,), data).numpy()[3:].reshape(1, -1)
    del data
    assert not lent.own.free
    del view
    assert lent.own.free


def test_a_torch_tensor_keeps_memory_too(pair: tuple[SharedMemory, SharedMemory]) -> None:
    import torch

    from runtime.torch_tensors import to_torch

    sender, receiver = pair
    lent = sender.place(filled(7), receiver.instance)
    assert lent is not None
    tensor = to_torch(
        WireTensor("latents", 1, (LARGE // 2,), receiver.take("latents", lent.place, LARGE, sender.instance))
    )
    view = tensor.reshape(2, -1)[1:].view(torch.int16)
    del tensor
    assert not lent.own.free
    assert view[0, 0].item() == 0x0707
    del view
    assert lent.own.free


def test_a_segment_is_used_again_once_it_is_free_and_not_before(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    first = sender.place(filled(1), receiver.instance)
    assert first is not None
    held = receiver.take("frames", first.place, LARGE, sender.instance)
    second = sender.place(filled(2), receiver.instance)
    assert second is not None
    assert second.own is not first.own
    assert held[0] == 1
    del held
    third = sender.place(filled(3, LARGE - 1), receiver.instance)
    assert third is not None
    assert third.own is first.own
    assert third.use == 2
    assert len(segments(sender.directory, sender)) == 2


def test_little_of_a_segment_is_never_used(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    for size_bytes in (MIN_BYTES + 1, 1_000_003, 2**22 + 1):
        before = sender.own_bytes
        assert sender.place(filled(0, size_bytes), receiver.instance) is not None
        assert size_bytes <= sender.own_bytes - before <= size_bytes * 9 // 8 + 4096


def test_beyond_the_capacity_nothing_is_placed_until_memory_is_free(directory: Path) -> None:
    sender, receiver = SharedMemory(directory, capacity_bytes=3 * LARGE), SharedMemory(directory)
    lent = [sender.place(filled(n), receiver.instance) for n in range(4)]
    assert [each is not None for each in lent] == [True, True, True, False]
    assert lent[0] is not None
    receiver.take("frames", lent[0].place, LARGE, sender.instance)  # dropped at once, and so given back
    assert sender.place(filled(9, 2 * LARGE), receiver.instance) is None
    assert sender.place(filled(9), receiver.instance) is not None
    assert sender.own_bytes <= 3 * LARGE
    sender.close()
    receiver.close()


def test_free_segments_make_room_for_a_larger_one(directory: Path) -> None:
    sender, receiver = SharedMemory(directory, capacity_bytes=3 * LARGE), SharedMemory(directory)
    for each in [sender.place(filled(n), receiver.instance) for n in range(3)]:
        assert each is not None
        receiver.take("frames", each.place, LARGE, sender.instance)
    assert sender.place(filled(9, 2 * LARGE), receiver.instance) is not None
    assert sender.own_bytes <= 3 * LARGE
    sender.close()
    receiver.close()


def test_a_full_directory_places_nothing_and_leaves_nothing(
    pair: tuple[SharedMemory, SharedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    sender, receiver = pair
    assert sender.place(filled(1), receiver.instance) is None
    assert segments(sender.directory, sender) == []


def test_a_directory_that_is_not_there_is_no_shared_memory(tmp_path: Path) -> None:
    assert SharedMemory.create(tmp_path / "missing") is None
    memory = SharedMemory.create(tmp_path, 123)
    assert memory is not None
    assert memory.capacity_bytes == 123
    memory.close()


def changed(place: tensor_pb2.SharedMemory, **fields: Any) -> tensor_pb2.SharedMemory:
    other = tensor_pb2.SharedMemory()
    other.CopyFrom(place)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def test_a_place_that_is_not_the_peers_is_refused(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(1), receiver.instance)
    assert lent is not None
    own, other = f"bunraku-{sender.instance}", f"bunraku-{receiver.instance}"
    names = ["", "../etc/passwd", f"/dev/shm/{own}.1", f"x/{own}.1", f"{own}.1/../{own}.1", f"{own}.lease"]
    for name in [*names, f"{other}.1", f"{own}.1\n", f"{own}.0000000001", f"{own.upper()}.1"]:
        with pytest.raises(InvalidRequest, match="frames: lies in a segment that is not the caller's"):
            receiver.take("frames", changed(lent.place, segment=name), LARGE, sender.instance)


def test_a_place_outside_its_segment_is_refused(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(1), receiver.instance)
    assert lent is not None
    too_large = lent.own.segment.size_bytes + 1
    for place, size_bytes in (
        (lent.place, too_large),
        (changed(lent.place, offset_bytes=0), LARGE),
        (changed(lent.place, offset_bytes=8192), LARGE),
        (changed(lent.place, offset_bytes=2**63), LARGE),
    ):
        with pytest.raises(InvalidRequest, match="frames: lies outside its segment"):
            receiver.take("frames", place, size_bytes, sender.instance)


def test_a_place_of_another_use_is_refused(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(1), receiver.instance)
    assert lent is not None
    for generation in (0, 2, 2**63):
        with pytest.raises(InvalidRequest, match="lies in a segment that was used again"):
            receiver.take("frames", changed(lent.place, generation=generation), LARGE, sender.instance)


def test_a_place_that_is_gone_may_be_agreed_on_anew(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    too_small, missing = sender.nonce_segment(bytes(16)), f"bunraku-{sender.instance}.99"
    for name in (too_small, missing):
        place = tensor_pb2.SharedMemory(segment=name, offset_bytes=4096, generation=1)
        with pytest.raises(NotReady, match="frames lies in a segment that is gone") as error:
            receiver.take("frames", place, LARGE, sender.instance)
        assert error.value.reason == "SHARED_MEMORY_LOST"


def test_a_segment_that_is_a_link_is_not_followed(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(1), receiver.instance)
    assert lent is not None
    link = sender.directory / f"bunraku-{sender.instance}.77"
    link.symlink_to(lent.own.segment.path)
    with pytest.raises(NotReady):
        receiver.take("frames", changed(lent.place, segment=link.name), LARGE, sender.instance)
    assert receiver.read_nonce(link.name) is None


def test_a_nonce_is_16_bytes_of_a_named_instance(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    segment = sender.nonce_segment(b"0123456789abcdef")
    assert receiver.read_nonce(segment) == (sender.instance, b"0123456789abcdef")
    for wrong in (b"", b"0123456789abcde", b"0123456789abcdefg"):
        other = sender.nonce_segment(wrong)
        assert receiver.read_nonce(other) is None
    for name in ("", "../x", "bunraku-0123456789abcdef.1", f"bunraku-{sender.instance}.lease"):
        assert receiver.read_nonce(name) is None


def test_what_nobody_took_is_taken_back_and_what_is_held_is_not(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    sharing = Sharing(sender, receiver.instance)
    taken, untaken = sharing.place(filled(1)), sharing.place(filled(2))
    assert taken is not None
    assert untaken is not None
    held = receiver.take("frames", taken, LARGE, sender.instance)
    sharing.ended()
    assert segments(sender.directory, sender) == [taken.segment]
    with pytest.raises(NotReady):
        receiver.take("frames", untaken, LARGE, sender.instance)
    assert held[0] == 1


def test_a_later_use_of_a_segment_is_not_taken_back_with_an_earlier_one(
    pair: tuple[SharedMemory, SharedMemory],
) -> None:
    sender, receiver = pair
    first, second = Sharing(sender, receiver.instance), Sharing(sender, receiver.instance)
    place = first.place(filled(1))
    assert place is not None
    receiver.take("frames", place, LARGE, sender.instance)
    again = second.place(filled(2))
    assert again is not None
    assert again.segment == place.segment
    first.ended()
    assert segments(sender.directory, sender) == [again.segment]
    assert receiver.take("frames", again, LARGE, sender.instance)[0] == 2


def test_what_nobody_came_for_in_ten_minutes_is_taken_back(
    pair: tuple[SharedMemory, SharedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared_memory._UNTAKEN_S == 600
    sender, receiver = pair
    lent = [sender.place(filled(n), receiver.instance) for n in range(2)]
    assert lent[0] is not None
    held = receiver.take("frames", lent[0].place, LARGE, sender.instance)
    sender.sweep()
    assert len(segments(sender.directory, sender)) == 2
    monkeypatch.setattr(shared_memory, "_UNTAKEN_S", -1.0)
    sender.sweep()
    assert segments(sender.directory, sender) == [lent[0].own.segment.path.name]
    assert held[0] == 0


def test_closing_gives_up_what_was_lent_to_others_but_not_what_they_read(directory: Path) -> None:
    sender, receiver = SharedMemory(directory), SharedMemory(directory)
    lent = sender.place(filled(5), receiver.instance)
    assert lent is not None
    held = receiver.take("frames", lent.place, LARGE, sender.instance)
    sender.close()
    assert held.sum() == 5 * LARGE
    assert sender.place(filled(5), receiver.instance) is None
    receiver.close()
    sender.close()


def test_a_peer_that_ended_gives_all_back(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(5), receiver.instance)
    assert lent is not None
    held = receiver.take("frames", lent.place, LARGE, sender.instance)
    sender.sweep()
    assert sender.own_bytes > 0
    assert sender.is_alive(receiver.instance)
    receiver.close()
    assert not sender.is_alive(receiver.instance)
    sender.sweep()
    assert sender.own_bytes == 0
    assert held[0] == 5


def test_the_mapping_of_a_segment_that_is_gone_is_closed(pair: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = pair
    lent = sender.place(filled(5), receiver.instance)
    assert lent is not None
    receiver.take("frames", lent.place, LARGE, sender.instance)
    assert len(receiver._foreign) == 1
    receiver.sweep()
    assert len(receiver._foreign) == 1
    lent.own.segment.path.unlink()
    receiver.sweep()
    assert receiver._foreign == {}


def test_leases_that_a_process_died_in_the_middle_of_are_removed_later(directory: Path) -> None:
    young, old = directory / "bunraku-0123456789abcdef.starting", directory / "bunraku-fedcba9876543210.starting"
    young.touch()
    old.touch()
    os.utime(old, (time.time() - 61, time.time() - 61))
    memory = SharedMemory(directory)
    memory.sweep()
    assert young.exists()
    assert not old.exists()
    young.unlink()
    memory.close()


def test_a_process_sweeps_by_itself(directory: Path) -> None:
    dead, segment = directory / "bunraku-0123456789abcdef.lease", directory / "bunraku-0123456789abcdef.3"
    dead.touch()
    segment.touch()
    memory = SharedMemory(directory, sweep_interval_s=0.01)
    for path in (dead, segment):
        for _ in range(1000):
            if not path.exists():
                break
            time.sleep(0.005)
    memory.close()


def test_memory_that_is_dropped_does_not_sweep_on(directory: Path) -> None:
    before = threading.active_count()
    memory = SharedMemory(directory, sweep_interval_s=0.01)
    memory.close()
    del memory
    gc.collect()
    for _ in range(1000):
        if threading.active_count() <= before:
            break
        time.sleep(0.005)
    assert threading.active_count() <= before


# Over gRPC


@dataclass(frozen=True)
class Shared:
    """A stage and a caller on one host."""

    stage: Stage
    caller: StageClient[Any]
    of_stage: SharedMemory
    of_caller: SharedMemory

    async def all_free(self) -> None:
        """Waits until nothing is lent any more."""
        gc.collect()
        await until(lambda: all(own.free for own in [*self.of_stage._own, *self.of_caller._own]))


@asynccontextmanager
async def shared(directory: Path, *, kind: type[FakeVae] = FakeVae, max_concurrent: int = 8) -> AsyncIterator[Shared]:
    of_stage, of_caller = SharedMemory(directory), SharedMemory(directory)
    limits = Limits(max_concurrent=max_concurrent)
    async with (
        stage(kind=kind, shared_memory=of_stage, limits=limits) as serving,
        client(serving.address, shared_memory=of_caller) as caller,
    ):
        yield Shared(serving, caller, of_stage, of_caller)
    of_caller.close()


def numbered(number: int) -> WireTensor:
    return WireTensor.from_numpy("frames", np.full(LARGE, number, np.uint8))


async def test_tensors_go_both_ways_through_shared_memory(directory: Path) -> None:
    async with shared(directory) as both:
        for number in (1, 2):
            [got] = await encode(both.caller, numbered(number))
            assert got.data.tobytes() == bytes([number]) * LARGE
            assert len(both.of_stage._own) == len(both.of_caller._own) == 1
            del got
            await both.all_free()


async def test_small_tensors_go_beside_large_ones(directory: Path) -> None:
    async with shared(directory) as both:
        small = WireTensor.from_bytes("extra.small", b"abc")
        got = await encode(both.caller, numbered(1), small)
        assert [tensor.size_bytes for tensor in got] == [LARGE, 3]
        assert got[1].data.tobytes() == b"abc"
        assert len(both.of_caller._own) == 1


async def test_calls_at_the_same_time_do_not_mix(directory: Path) -> None:
    async with shared(directory) as both:
        answers = await asyncio.gather(*(encode(both.caller, numbered(number)) for number in range(8)))
        for number, [got] in enumerate(answers):
            assert got.data.tobytes() == bytes([number]) * LARGE
        del answers, got
        await both.all_free()


async def test_a_series_reuses_the_segments_that_the_caller_has_read(directory: Path) -> None:
    def frames(tensors: Tensors) -> Iterator[WireTensor]:
        for number in range(20):
            yield numbered(number)

    async with shared(directory) as both:
        both.stage.service.decode_work = frames
        numbers = []
        async for tensor in decode(both.caller):
            numbers.append(int(tensor.data[0]))
            del tensor
        assert numbers == list(range(20))
        assert len(both.of_stage._own) < 20


async def test_without_room_tensors_go_as_bytes_and_nobody_notices(directory: Path) -> None:
    async with shared(directory) as both:
        both.of_caller.capacity_bytes = both.of_stage.capacity_bytes = LARGE // 2
        [got] = await encode(both.caller, numbered(3))
        assert got.data.tobytes() == b"\x03" * LARGE
        assert both.of_stage.own_bytes == both.of_caller.own_bytes == 0


async def test_another_boot_id_declines(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "boot_id", lambda: "another host's")
    async with shared(directory) as both:
        [got] = await encode(both.caller, numbered(3))
        assert got.data.tobytes() == b"\x03" * LARGE
        assert both.of_stage.own_bytes == both.of_caller.own_bytes == 0
        assert both.stage.runtime.sessions == {}


async def test_another_directory_declines(directory: Path) -> None:
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    memory = SharedMemory(elsewhere)
    async with (
        stage(shared_memory=SharedMemory(directory)) as serving,
        client(serving.address, shared_memory=memory) as caller,
    ):
        [got] = await encode(caller, numbered(3))
        assert got.data.tobytes() == b"\x03" * LARGE
        assert memory.own_bytes == 0
    memory.close()
    elsewhere.rmdir()


async def test_a_side_without_shared_memory_gets_bytes(directory: Path) -> None:
    for of_stage, of_caller in ((None, SharedMemory(directory)), (SharedMemory(directory), None)):
        async with stage(shared_memory=of_stage) as serving, client(serving.address, shared_memory=of_caller) as caller:
            [got] = await encode(caller, numbered(4))
            assert got.data.tobytes() == b"\x04" * LARGE
        for memory in (of_stage, of_caller):
            if memory is not None:
                assert memory.own_bytes == 0
                memory.close()


async def test_an_agreement_needs_the_nonce(directory: Path) -> None:
    of_caller = SharedMemory(directory)
    async with stage(shared_memory=SharedMemory(directory)) as serving, channel(serving.address) as opened:
        stub = stage_pb2_grpc.StageServiceStub(opened)
        segment = of_caller.nonce_segment(b"0123456789abcdef")
        for nonce, named in ((b"0123456789abcdeF", segment), (b"", segment), (b"0123456789abcdef", "../x")):
            request = stage_pb2.OpenSharedMemoryRequest(segment=named, nonce=nonce, boot_id=boot_id())
            answer = await stub.OpenSharedMemory(request)
            assert (answer.accepted, answer.segment, answer.session) == (False, "", "")
        assert serving.runtime.sessions == {}
    of_caller.close()


async def test_a_call_that_is_cancelled_gives_up_what_nobody_took(directory: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def waits(tensors: Tensors) -> Iterable[WireTensor]:
        begun.set()
        assert go_on.wait(10)
        return []

    async with shared(directory, max_concurrent=1) as both:
        both.stage.service.encode_work = waits
        first = asyncio.create_task(encode(both.caller, numbered(1)))
        await until(begun.is_set)
        second = asyncio.create_task(encode(both.caller, numbered(2)))
        await until(lambda: len(both.of_caller._own) == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert len(both.of_caller._own) == 1
        go_on.set()
        await first
        await both.all_free()


async def test_a_request_that_the_stage_did_not_read_is_taken_back(directory: Path) -> None:
    class Hasty(FakeVae):
        async def Encode(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            yield vae_pb2.EncodeResponse(progress=vae_pb2.VaeProgress())

    async with shared(directory, kind=Hasty) as both:
        for _ in range(5):
            await encode(both.caller, *[numbered(1)] * 3)
        assert both.of_caller.own_bytes == 0


async def test_answers_that_the_caller_leaves_are_taken_back(directory: Path) -> None:
    def endless(tensors: Tensors) -> Iterator[WireTensor]:
        while True:
            raise_if_cancelled()
            time.sleep(0.001)
            yield numbered(1)

    async with shared(directory) as both:
        both.stage.service.decode_work = endless
        for _ in range(3):
            async with both.caller.call(Budget.of(5)) as call:
                await anext(call.stream(call.stub.Decode, FIRST_DECODE))
            await until(lambda: not both.stage.runtime.status().work)
        await both.all_free()


async def test_what_was_sent_before_an_error_still_arrives(directory: Path) -> None:
    """As the checkpoint of a run that is given back."""

    def given_back(tensors: Tensors) -> Iterator[WireTensor]:
        yield numbered(7)
        yield numbered(8)
        raise NotReady("draining", reason="STAGE_DRAINING")

    async with shared(directory) as both:
        both.stage.service.decode_work = given_back
        answers = decode(both.caller)
        await anext(answers)
        await until(lambda: not both.stage.runtime.status().work)
        got = await anext(answers)
        assert got.data.tobytes() == b"\x08" * LARGE
        with pytest.raises(NotReady, match="draining"):
            await anext(answers)


async def test_a_stage_that_was_restarted_is_agreed_with_anew(directory: Path) -> None:
    of_caller = SharedMemory(directory)
    async with stage(shared_memory=SharedMemory(directory)) as first:
        port = first.server.port
        async with client(first.address, shared_memory=of_caller) as caller:
            await encode(caller, numbered(1))
            await first.server.drain(0)
            async with stage(port=port, shared_memory=SharedMemory(directory)) as second:

                async def attempt(number: int) -> list[WireTensor]:
                    return await encode(caller, numbered(2))

                retry = client_module.Retry(attempts=20, first_wait_s=0.01, longest_wait_s=0.05)
                [got] = await client_module.retrying(attempt, Budget.of(10), retry)
                assert got.data.tobytes() == b"\x02" * LARGE
                assert list(second.runtime.sessions.values()) == [of_caller.instance]
    of_caller.close()


async def test_a_session_of_another_process_is_refused_in_a_way_that_is_retried(directory: Path) -> None:
    async with shared(directory) as both:
        await encode(both.caller, numbered(1))
        both.stage.runtime.sessions.clear()
        with pytest.raises(NotReady, match="has not agreed on shared memory") as error:
            await encode(both.caller, numbered(1))
        assert error.value.reason == "SHARED_MEMORY_LOST"
        [got] = await encode(both.caller, numbered(6))
        assert got.data.tobytes() == b"\x06" * LARGE
        assert len(both.stage.runtime.sessions) == 1


async def test_a_stage_that_cannot_be_asked_yet_is_asked_again(directory: Path) -> None:
    of_caller = SharedMemory(directory)
    port = free_port()
    async with client(f"127.0.0.1:{port}", shared_memory=of_caller) as caller:
        with pytest.raises(NotReady):
            await encode(caller, numbered(1))
        async with stage(port=port, shared_memory=SharedMemory(directory)):

            async def attempt(number: int) -> list[WireTensor]:
                return await encode(caller, numbered(2))

            retry = client_module.Retry(attempts=50, first_wait_s=0.02, longest_wait_s=0.1)
            await client_module.retrying(attempt, Budget.of(10), retry)
            await encode(caller, numbered(2))
            assert of_caller.own_bytes > 0
    of_caller.close()


# Between processes


async def test_tensors_go_between_processes_and_a_killed_stage_frees_them(directory: Path) -> None:
    port = free_port()
    memory = SharedMemory(directory)
    async with (
        running("serve", port, directory) as stage_process,
        client(f"127.0.0.1:{port}", shared_memory=memory) as caller,
    ):
        sent = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
        [got] = await encode(caller, WireTensor.from_numpy("frames", sent))
        assert np.array_equal(got.data, sent)
        [own] = memory._own
        # the stage keeps what it was sent, and this process what it was answered
        assert not own.free
        memory.sweep()
        assert memory.own_bytes > 0
        assert len(names(directory)) >= 4
        await stage_process.kill()
        memory.sweep()
        assert memory.own_bytes == 0
        assert names(directory) == [f"bunraku-{memory.instance}.lease"]
        assert np.array_equal(got.data, sent)
    memory.close()


async def test_a_killed_caller_frees_what_it_held_and_ends_the_work(directory: Path) -> None:
    async with stage(shared_memory=SharedMemory(directory)) as serving:
        memory = serving.runtime.shared_memory
        assert memory is not None
        closed = threading.Event()

        def endless(tensors: Tensors) -> Iterator[WireTensor]:
            try:
                while True:
                    time.sleep(0.001)
                    yield zeros(SIZE)
            finally:
                closed.set()

        serving.service.decode_work = endless
        async with running("call", serving.server.port, directory) as caller_process:
            assert any(not own.free for own in memory._own)
            assert not closed.is_set()
            await caller_process.kill()
            await until(closed.is_set)
            await until(lambda: not serving.runtime.status().work)
            memory.sweep()
            assert all(own.free for own in memory._own)
            assert all(memory.instance in name for name in names(directory))


async def test_a_stage_that_is_told_to_end_leaves_nothing(directory: Path) -> None:
    port = free_port()
    memory = SharedMemory(directory)
    async with (
        running("serve", port, directory) as process,
        client(f"127.0.0.1:{port}", shared_memory=memory) as caller,
    ):
        await encode(caller, numbered(1))
        assert await process.terminate() == 0
        assert all(memory.instance in name for name in names(directory))
    memory.close()


async def test_many_calls_of_which_some_are_cancelled_leave_nothing_behind(directory: Path) -> None:
    """Results are right or there is none, and afterwards every call, slot and segment is free."""
    chance = random.Random(5)

    def series(tensors: Tensors) -> Iterator[WireTensor]:
        for number in range(10):
            raise_if_cancelled()
            time.sleep(0.001)
            yield numbered(number)

    async def one(both: Shared, number: int) -> None:
        if number % 2:
            [got] = await encode(both.caller, numbered(number))
            assert got.data.tobytes() == bytes([number]) * LARGE
        else:
            numbers = [int(tensor.data[-1]) async for tensor in decode(both.caller)]
            assert numbers == list(range(10))

    async with shared(directory, max_concurrent=4) as both:
        both.stage.service.decode_work = series
        tasks = [asyncio.create_task(one(both, number)) for number in range(12)]
        for task in tasks[::3]:
            await asyncio.sleep(chance.random() * 0.02)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
        assert None in results
        await until(lambda: not both.stage.runtime.status().work)
        del tasks, task
        await both.all_free()
        [endpoint] = await both.caller.endpoints()
        assert endpoint.calls == 0
