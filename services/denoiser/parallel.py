"""One forward pass over several processes: tokens over its ranks (Ulysses), guidance branches over its two halves.

Every rank has all weights, the whole latents and the solver's state, and takes every step with the others; what they
share is the work of the blocks. Applied to a finished model from outside. The ranks talk through torch.distributed:
NCCL between GPUs, gloo otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # missing in its stubs

from runtime.gpu import WorkCancelled, raise_if_cancelled
from services.denoiser.attention import Attention, PlainAttending
from services.denoiser.model import Block, DiffusionTransformer, Head, TimeEmbedding
from services.denoiser.rope import Rope

# The ranks wait for each other in every block; what lasts longest is the first use of a kernel that has to be compiled
COLLECTIVE_TIMEOUT = timedelta(seconds=120)


def connect(store: Store, rank: int, world_size: int, device: torch.device) -> None:
    """Makes this process a rank of torch.distributed's default group; tensors of the CPU may be sent in either case."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


@dataclass(frozen=True)
class Ranks:
    """Some of the ranks, and which of them this process is."""

    members: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None  # None: this process alone

    @property
    def size(self) -> int:
        return len(self.members)

    def gathered(self, tensor: Tensor) -> Tensor:
        """[size, *shape]: the tensor of each rank, in the order of the ranks."""
        every = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(every.unbind(0)), tensor.contiguous(), group=self.group)
        return every

    def exchanged(self, parts: Tensor) -> tuple[Tensor, dist.Work]:
        """parts [size, ...], one for each rank -> what each rank has for this one, once it is waited for."""
        received = torch.empty_like(parts)
        return received, dist.all_to_all_single(received, parts, group=self.group, async_op=True)


def ranks_of(groups: Sequence[Sequence[int]]) -> Ranks:
    """This process's group of several that have no rank in common; to be called by all ranks in the same order."""
    mine = dist.get_rank()
    found = None
    for members in groups:
        group = dist.new_group(list(members), timeout=COLLECTIVE_TIMEOUT) if len(members) > 1 else None
        if mine in members:
            found = Ranks(tuple(members), members.index(mine), group)
    assert found is not None
    return found


def tokens_between(num_heads: int, world_size: int) -> int:
    """How many ranks share the tokens of a pass with guidance: a half of an even number, else all.

    Raises:
        ValueError: they cannot share the heads evenly.
    """
    between = world_size // 2 if world_size % 2 == 0 else world_size
    if num_heads % between:
        able = [size for size in range(1, 2 * num_heads + 1) if num_heads % (size // 2 if size % 2 == 0 else size) == 0]
        raise ValueError(
            f"{num_heads} attention heads cannot be divided among {between} ranks, as a group of {world_size} needs; "
            f"groups may have {', '.join(map(str, able))} ranks"
        )
    return between


class Share:
    """The tokens of one pass among some ranks: each has a contiguous part; the last ones are padded to be as long."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.length = 0  # all tokens of the pass under way, without padding

    def own(self, tokens: Tensor, time: TimeEmbedding, rope: Rope) -> tuple[Tensor, TimeEmbedding, Rope]:
        self.length = tokens.shape[1]
        row = time.row if time.row.shape[1] == 1 else self._part(time.row, 1)
        own = TimeEmbedding(time.embedding, time.projection, row)
        return self._part(tokens, 1), own, Rope(self._part(rope.cos, 0), self._part(rope.sin, 0))

    def predicted(self, head: Head, tokens: Tensor, time: TimeEmbedding, count: int) -> Tensor:
        every = self.ranks.gathered(head(tokens, time))  # [ranks, B, l, p]
        return every.transpose(0, 1).flatten(1, 2)[:, :count]

    def to_heads(self, tokens: Tensor) -> tuple[Tensor, dist.Work]:
        """[B, l, H, d] of the own tokens -> [B, L, H/size, d] of all tokens, padding last, once it is waited for."""
        by_rank = torch.unflatten(tokens, 2, (self.ranks.size, -1)).permute(2, 0, 1, 3, 4).contiguous()
        received, work = self.ranks.exchanged(by_rank)  # [size, B, l, H/size, d]
        return received, work

    def to_tokens(self, heads: Tensor) -> Tensor:
        """[B, L, H/size, d] of the own heads -> [B, l, H, d] of all heads."""
        by_rank = torch.unflatten(heads, 1, (self.ranks.size, -1)).transpose(0, 1).contiguous()
        received, work = self.ranks.exchanged(by_rank)  # [size, B, l, H/size, d]
        work.wait()
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _part(self, whole: Tensor, axis: int) -> Tensor:
        """The own part along the axis of the tokens; a copy, so that the whole need not be kept."""
        part = -(-whole.shape[axis] // self.ranks.size)
        start = min(self.ranks.index * part, whole.shape[axis])
        end = min(start + part, whole.shape[axis])
        own = whole.narrow(axis, start, end - start)
        shape = list(whole.shape)
        shape[axis] = part - (end - start)
        return torch.cat((own, whole.new_zeros(shape)), dim=axis)


@dataclass(frozen=True)
class Ulysses:
    """Attention of all tokens to all tokens where each rank has some tokens: each computes some heads for all of them.

    Source: Jacobs et al. 2023 (arXiv:2309.14509).
    """

    attention: Attention
    team: DeviceTeam
    dtype: torch.dtype | None = None  # ranks exchange what the linears make

    @property
    def name(self) -> str:
        return f"{self.attention.name}+ulysses"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        share = self.team.share
        if share is None:
            return self.attention(queries, keys, values)
        sent = [share.to_heads(tensor) for tensor in (queries, keys, values)]
        every = []
        for received, work in sent:
            work.wait()
            every.append(received.transpose(0, 1).flatten(1, 2))  # [B, L, H/size, d]
        queries, keys, values = every
        # nobody attends to padding; what padding attends to is dropped at the end
        attended = self.attention(queries, keys[:, : share.length], values[:, : share.length])
        return share.to_tokens(attended)

    def over(self, keys: Tensor, values: Tensor) -> PlainAttending:
        return PlainAttending(self, keys, values)


class DeviceTeam:
    """All ranks of the default group as the `team` of a model.

    An even number computes the two guidance branches at the same time, a half of the ranks each; without guidance, or
    if their number is odd, all of them share the tokens (or the halves do the same, where the heads do not divide).

    Attributes:
        share: how the tokens of the pass under way are shared; None: each rank has all.
    """

    def __init__(self, num_heads: int) -> None:
        """All ranks call it at the same time. Raises ValueError if the heads cannot be shared."""
        world = dist.get_world_size()
        between = tokens_between(num_heads, world)
        every = list(range(world))
        self._all = ranks_of([every])
        self._half: Ranks | None = None
        if world % 2 == 0:
            self._half = ranks_of([every[:between], every[between:]])
            self._pair = ranks_of([[rank, rank + between] for rank in every[:between]])
        whole = self._all if num_heads % world == 0 else self._half
        assert whole is not None
        self._whole = _share(whole)
        self._of_half = None if self._half is None else _share(self._half)
        self.share = self._whole

    @property
    def shares(self) -> tuple[Share | None, Share | None]:
        """How the tokens are shared with guidance, and without."""
        return self._whole if self._half is None else self._of_half, self._whole

    def join(self, model: DiffusionTransformer) -> None:
        """Makes a loaded model compute with the others'; `check` is then to be called in front of every block."""
        model.team = self
        for block in model.blocks:
            assert isinstance(block, Block)
            block.self_attn.attention = Ulysses(block.self_attn.attention, self)

    def own(self, tokens: Tensor, time: TimeEmbedding, rope: Rope) -> tuple[Tensor, TimeEmbedding, Rope]:
        return (tokens, time, rope) if self.share is None else self.share.own(tokens, time, rope)

    def predicted(self, head: Head, tokens: Tensor, time: TimeEmbedding, count: int) -> Tensor:
        if self.share is None:
            patches: Tensor = head(tokens[:, :count], time.tokens(slice(count)))
            return patches
        return self.share.predicted(head, tokens, time, count)

    def both(self, positive: Callable[[], Tensor], negative: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        if self._half is None:
            return positive(), negative()
        with self._in_halves():
            own = (positive, negative)[self._pair.index]()
        first, second = self._pair.gathered(own)
        return first, second

    def check(self) -> None:
        """Ends the work of all ranks in front of the same block if it was cancelled on one: raises WorkCancelled.

        All ranks run equally many blocks, whichever branch is theirs, so they are asked equally often.
        """
        cancelled = torch.tensor(_is_cancelled(), dtype=torch.int32)  # on the CPU: the host has to know
        dist.all_reduce(cancelled, op=dist.ReduceOp.MAX, group=self._all.group)
        if cancelled.item():
            raise WorkCancelled

    @contextmanager
    def _in_halves(self) -> Iterator[None]:
        self.share = self._of_half
        try:
            yield
        finally:
            self.share = self._whole


def _share(ranks: Ranks) -> Share | None:
    return Share(ranks) if ranks.size > 1 else None


def _is_cancelled() -> bool:
    try:
        raise_if_cancelled()
    except WorkCancelled:
        return True
    return False
