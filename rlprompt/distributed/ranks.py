"""Several ranks as one run: what each does alone, and where they meet.

Every rank holds the same prompt, the same optimizer and, after the rollout, the same batch. What
costs time is divided: each completion is drawn, scored and learned from on one rank. Groups stay
whole where there are as many as ranks, and always for rewards. The gradient of the prompt, a few
kilobytes, is summed once per update, so that every number is that of a run with one rank, up to the
order of a sum. Only the first rank writes.

All meetings run over gloo on the CPU with a time limit: a rank that dies or hangs ends the others
within `timeout_s`, with one sentence.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.settings import Settings

T = TypeVar("T")


class DistributedSettings(Settings):
    """How a run uses several ranks; with one rank only `base: sharded` has an effect."""

    base: Literal["replicated", "sharded"] = "replicated"
    """Every rank holds the base whole, or its share of every weight (DeepSpeed ZeRO-3)."""
    timeout_s: int = Field(default=900, ge=2)
    """Seconds that ranks wait for each other before the run ends. The slowest rollout, reward or
    evaluation must be shorter."""
    gather: Literal["auto", "whole", "layers"] = "auto"
    """For rollouts under a sharded base: gather it whole once per rollout, or each layer at each
    token. auto = whole when it takes at most half of the memory that is free."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards of a sharded base lie when they are not in use."""
    nvme_path: str | None = None
    """Folder on a local disk for offload: nvme."""
    secondary_shards: int | None = Field(default=None, ge=2)
    """Keep a second set of shards among this many ranks, usually those of a node, so that weights
    are gathered inside it (ZeRO++ hpZ). Costs a second shard of memory."""

    @model_validator(mode="after")
    def _have_effect(self) -> DistributedSettings:
        if self.base == "replicated":
            for name in ("gather", "offload", "nvme_path", "secondary_shards"):
                if getattr(self, name) != DistributedSettings.model_fields[name].default:
                    raise ValueError(f"{name} has no effect with base: replicated; remove it")
        if (self.offload == "nvme") != (self.nvme_path is not None):
            raise ValueError("offload: nvme and nvme_path need each other; give both or none")
        return self


class RankLostError(RuntimeError):
    """Another rank has ended, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone by default, where every meeting is free."""

    rank: int = 0
    size: int = 1
    timeout_s: int = 900
    group: Any = None
    """The gloo group of all ranks; None with one rank."""
    local_rank: int = 0
    """Number of this rank on its node."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of a list, in order; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def piece(self, groups: int, size: int) -> tuple[int, range]:
        """This rank's part of a batch with fewer groups than ranks: a run of one group.

        Ranks are shared out over the groups, and completions of a group over its ranks, as evenly
        as whole numbers allow; a rank gets nothing where its group has more ranks than completions.

        Args:
            groups: the number of groups, at least 1 and below the number of ranks.
            size: the completions of a group.

        Returns:
            The group's number, and the numbers of the completions.
        """
        group = ((self.rank + 1) * groups - 1) // self.size
        start, stop = (edge * self.size // groups for edge in (group, group + 1))
        among = Ranks(self.rank - start, stop - start)
        own = among.share(size)
        return group, range(own.start, own.stop)

    def same(self, work: Callable[[], T], what: str) -> T:
        """Do the same on every rank, and give every rank the first one's result.

        Where the results are equal, as they should be, a digest of each is all that travels.

        Args:
            work: what is done; the text form of its result tells whether two are equal.
            what: what it is, for the sentence when a rank is missing.

        Raises:
            InputError: raised on any rank.
            RankLostError: see the class.
        """
        done: list[T] = []

        def digest() -> bytes:
            done.append(work())
            return hashlib.sha256(repr(done[0]).encode()).digest()

        digests = self.each(digest, what)
        if len(set(digests)) == 1:
            return done[0]
        return self.first(lambda: done[0], what)

    def first(self, work: Callable[[], T], what: str = "the first rank") -> T:
        """Do something on the first rank only; every rank gets the result, or its InputError.

        Raises:
            InputError: raised there.
            RankLostError: see the class.
        """
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_first:
            box = list(_attempt(work))
        self._meet(what, lambda: dist.broadcast_object_list(box, src=0, group=self.group))
        result: T = _result(box)
        return result

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        """Do something on every rank; every rank gets all results, or the first InputError.

        Raises:
            InputError: raised on any of them.
            RankLostError: see the class.
        """
        if self.size == 1:
            return [work()]
        boxes: list[Any] = [None] * self.size
        mine = _attempt(work)
        self._meet(what, lambda: dist.all_gather_object(boxes, mine, group=self.group))
        return [_result(box) for box in boxes]

    def agree(self, reason: str | None) -> str | None:
        """The reason to stop of the lowest rank that has one, on every rank.

        Says which rank is missing when one is.
        """
        if self.size == 1:
            return reason
        limit = datetime.timedelta(seconds=self.timeout_s)
        self._meet(
            "the end of a step",
            lambda: dist.monitored_barrier(self.group, timeout=limit, wait_all_ranks=True),
        )
        reasons = self.each(lambda: reason, "the end of a step")
        return next((each for each in reasons if each is not None), None)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give every rank the sum of all ranks' gradients; a rank without one counts as zero."""
        if self.size == 1 or not parameters:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.detach().reshape(-1).to("cpu", torch.float64) for g in grads])
        self._meet("the gradients", lambda: dist.all_reduce(flat, group=self.group))
        parts = flat.split([g.numel() for g in grads])
        for parameter, grad, part in zip(parameters, grads, parts, strict=True):
            parameter.grad = part.view_as(grad).to(grad)

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        box = torch.tensor([value])
        self._meet("a count", lambda: dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group))
        return int(box)

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by the first rank's, so that no rank drifts by its own rounding."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in tensors])
        self._meet("the prompt", lambda: dist.broadcast(flat, src=0, group=self.group))
        parts = flat.split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def _meet(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise self.lost(what, error) from error

    def lost(self, what: str, error: RuntimeError) -> RankLostError:
        """The sentence for a meeting that failed."""
        reason = " ".join(str(error).split())[:200]
        return RankLostError(
            f"rank {self.rank} of {self.size} waited for the others at {what}, and one of them "
            f"has ended or gave no answer within {self.timeout_s} s ({reason}); the log of "
            "that rank says why; the run goes on from its last checkpoint with --resume"
        )


@contextmanager
def join_ranks(settings: DistributedSettings) -> Iterator[Ranks]:
    """Meet the other ranks, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    A process without WORLD_SIZE, or with WORLD_SIZE 1, is alone. LOCAL_RANK chooses the GPU.

    Raises:
        InputError: the variables contradict each other or the settings, or the others do not come
            in time.
    """
    size = _number("WORLD_SIZE", 1)
    needs_group = size > 1 or settings.base == "sharded"
    if not needs_group:
        yield Ranks(timeout_s=settings.timeout_s)
        return
    rank = _number("RANK", 0 if size == 1 else None)
    if not 0 <= rank < size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE is {size}; ranks count from 0")
    _check_shards(settings, size)
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(f"WORLD_SIZE is {size} but {name} is not set; set it on every rank")
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(_number("LOCAL_RANK", rank) % torch.cuda.device_count())
    limit = datetime.timedelta(seconds=settings.timeout_s)
    try:
        # NCCL only moves shards of the base; ranks meet over gloo, which tells who is missing.
        backend = "nccl" if has_gpu and settings.base == "sharded" else "gloo"
        place = meeting_place(os.environ["MASTER_ADDR"], _number("MASTER_PORT", None))
        dist.init_process_group(
            backend, init_method=place, rank=rank, world_size=size, timeout=limit
        )
        group = dist.new_group(backend="gloo", timeout=limit)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"rank {rank} of {size} did not meet the others at {where} within "
            f"{settings.timeout_s} s ({' '.join(str(error).split())[:200]}); start every rank, and "
            "check MASTER_ADDR"
        ) from error
    local_rank = _number("LOCAL_RANK", rank)
    ranks = Ranks(rank, size, settings.timeout_s, group if size > 1 else None, local_rank)
    try:
        yield ranks
    except RuntimeError as error:
        # Weights in shards are gathered while the base runs, past the meetings of `Ranks`.
        if size > 1 and not isinstance(error, RankLostError) and _is_of_a_meeting(error):
            raise ranks.lost("the weights of the base", error) from error
        raise
    finally:
        dist.destroy_process_group()


def meeting_place(address: str, port: int) -> str:
    """Where ranks meet, as torch.distributed takes it.

    Args:
        address: name or address of the first rank's node; of IPv6 with brackets or without.
        port: port there.
    """
    host = address.strip("[]")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _check_shards(settings: DistributedSettings, size: int) -> None:
    if settings.secondary_shards is not None and size % settings.secondary_shards:
        raise InputError(
            f"distributed.secondary_shards is {settings.secondary_shards}, which does not divide "
            f"the number of ranks, {size}; set a divisor, or remove it"
        )
    if settings.nvme_path is not None and not Path(settings.nvme_path).is_dir():
        raise InputError(
            f"distributed.nvme_path is '{settings.nvme_path}', which is no folder here; name one "
            "on a local disk of every node"
        )
    if settings.offload == "nvme" and not torch.cuda.is_available():
        raise InputError(
            "distributed.offload is nvme, which DeepSpeed cannot do for a base on CPUs (it runs "
            "out of buffers in the first backward, see docs/log.md); set distributed.offload: none"
        )


def _is_of_a_meeting(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo raises plain errors that name its source files."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "gloo:" in str(error)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _number(name: str, otherwise: int | None) -> int:
    text = os.environ.get(name)
    if text is None and otherwise is not None:
        return otherwise
    try:
        return int(text or "")
    except ValueError as error:
        told = "is not set" if text is None else f"is {text!r}"
        raise InputError(f"{name} {told}; it must be a number, see docs/cluster.md") from error


def _attempt(work: Callable[[], T]) -> tuple[T | None, InputError | None]:
    try:
        return work(), None
    except InputError as error:
        return None, InputError(str(error))


def _result(box: Sequence[Any]) -> Any:
    value, error = box
    if error is not None:
        raise error
    return value
