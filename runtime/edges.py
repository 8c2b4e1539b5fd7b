"""What passes between the gateway and a stage, told to the trace and to the metrics: each tensor's bytes and time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, Literal

from runtime import telemetry
from runtime.tensors import TensorData, WireTensor


class Edge:
    """One direction of one call; tensors pass one after another.

    Args:
        stage: the other side.
        direction: as the gateway sees it.
    """

    def __init__(self, stage: str, direction: Literal["sent", "received"]) -> None:
        self._stage, self._direction = stage, direction
        self._begun = 0.0
        self._transport = "bytes"

    def sending(self, messages: Iterable[Any]) -> Iterator[Any]:
        """The messages of a tensor, looked at as they go."""
        for message in messages:
            self._look_at(message)
            yield message

    async def receiving(self, messages: AsyncIterable[Any]) -> AsyncIterator[Any]:
        """The messages of a call, looked at as they come."""
        async for message in messages:
            self._look_at(message)
            yield message

    def passed(self, tensor: WireTensor) -> None:
        """The tensor whose header went by last has arrived, or has been sent."""
        labels = {"stage": self._stage, "direction": self._direction, "transport": self._transport}
        telemetry.TENSOR_BYTES.add(tensor.size_bytes, **labels)
        telemetry.event(
            telemetry.EVENT_SENT if self._direction == "sent" else telemetry.EVENT_RECEIVED,
            {
                telemetry.ATTRIBUTE_TENSOR: tensor.name,
                telemetry.ATTRIBUTE_SIZE_BYTES: tensor.size_bytes,
                telemetry.ATTRIBUTE_MILLISECONDS: (time.monotonic() - self._begun) * 1000,
                telemetry.ATTRIBUTE_TRANSPORT: self._transport,
            },
        )

    def _look_at(self, message: Any) -> None:
        if isinstance(message, TensorData) or message is None or message.WhichOneof("message") != "tensor":
            return
        self._begun = time.monotonic()
        self._transport = "shared_memory" if message.tensor.HasField("shared_memory") else "bytes"
