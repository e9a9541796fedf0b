"""Several processes, one learner: the only place that knows of torch.distributed.

A process group that is initialised when the learner is made (``torchrun``, ``accelerate launch``, Lightning, a Trainer) is
used as it is; without one, or with one process, everything here does nothing. Words as torch has them: a *rank* is one of
the processes, and there are ``size()`` of them.

What is kept apart from the training's own traffic: a gloo group for short messages, so that the outcome of every stage is
known on every rank. A stage that fails on one rank fails on all of them, with a sentence that names the rank and the cause.
A rank that is gone (killed, out of memory) is noticed when its connection closes; one that hangs, after
``KEEPLORA_RANK_TIMEOUT`` minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from keeplora.errors import ConfigError, RankError

T = TypeVar("T")

TIMEOUT = "KEEPLORA_RANK_TIMEOUT"
"""Environment variable: minutes that a rank waits for another before it gives up. The slowest stage of the slowest rank must
fit: a pass over its share of the data, or its share of the linear algebra."""
DEFAULT_TIMEOUT = 120.0
_GRACE = 3.0
"""Seconds in which a rank that is leaving has said why, or its process is seen to be gone."""


def active() -> bool:
    """Whether there is more than one process to agree with.

    >>> active(), rank(), size()
    (False, 0, 1)
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if active() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if active() else 1


def is_first() -> bool:
    """Whether this is rank 0, the one that writes."""
    return rank() == 0


def minutes_to_wait() -> float:
    """What `TIMEOUT` says; `ConfigError` where it is no number above 0."""
    told = os.environ.get(TIMEOUT, "") or DEFAULT_TIMEOUT
    try:
        minutes = float(told)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ConfigError(f"{TIMEOUT} is {told!r}, but must be a number of minutes above 0")
    return minutes


# ---- the group of short messages -----------------------------------------------------------------------------------


@dataclass
class _Peer:
    """A rank's process: how it is told of, and whether it still runs."""

    host: str
    pid: int

    def is_gone(self) -> bool | None:
        """None: it is on another machine, where it cannot be looked up."""
        if self.host != platform.node():
            return None
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
        except FileNotFoundError:
            if Path("/proc/self/stat").exists():
                return True
        except (OSError, IndexError):
            pass
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False


class _Line:
    """The gloo group over all ranks, made once for a process group."""

    def __init__(self, world: Any) -> None:
        self.world = world
        wait = timedelta(minutes=minutes_to_wait())
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=wait))
        self._left = False
        self.peers: list[_Peer] = []
        mine = (platform.node(), os.getpid())
        self.peers = [_Peer(*told) for told in self.exchange("the start", mine)]

    def exchange(self, what: str, value: Any) -> list[Any]:
        found: list[Any] = [None] * size()
        self.call(what, lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def broadcast(self, what: str, value: T, src: int) -> T:
        held = [value]
        self.call(what, lambda: dist.broadcast_object_list(held, src=src, group=self.group))
        return held[0]

    def call(self, what: str, work: Callable[[], Any]) -> None:
        """One collective operation; `RankError` names the rank that it failed for."""
        try:
            work()
        except RuntimeError as error:  # torch's DistError is one, and so is what gloo throws
            raise self.gone(what, error) from error
        if self._left:  # it is back: whoever started it caught the error
            self._left = False
            with contextlib.suppress(Exception):
                self._store.delete_key(f"keeplora/left/{rank()}")

    # -- who left ------------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        return dist.distributed_c10d._get_default_store()

    def leave(self, cause: str, *, own: bool) -> None:
        """Say why this rank stops, for those who will wait for it in vain; ``own``: and it is not because of another."""
        self._left = True
        with contextlib.suppress(Exception):  # the store may be gone with the rank that held it
            self._store.set(f"keeplora/left/{rank()}", json.dumps({"cause": cause, "own": own}))

    def _said(self, r: int) -> dict[str, Any] | None:
        key = f"keeplora/left/{r}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def gone(self, what: str, error: BaseException) -> RankError:
        """Why the others do not answer: what one of them said, whose process is gone, or what torch says."""
        told = self._who(what) or f"{what}: another rank does not answer ({_first_line(error)})"
        self.leave(told, own=False)
        return RankError(f"{told}; nothing that is half done is kept")

    def _who(self, what: str) -> str | None:
        others = [r for r in range(size()) if r != rank()]
        until = time.monotonic() + _GRACE
        while True:
            with contextlib.suppress(Exception):
                for r in others:
                    said = self._said(r)
                    if said is not None and said["own"]:
                        return f"rank {r} stopped: {said['cause']}"
            for r in others:
                if self.peers and self.peers[r].is_gone():
                    time.sleep(0.2)  # it may have said so just before
                    with contextlib.suppress(Exception):
                        if (said := self._said(r)) is not None:
                            if said["own"]:
                                return f"rank {r} stopped: {said['cause']}"
                            continue
                    peer = self.peers[r]
                    return (
                        f"rank {r} (process {peer.pid} on {peer.host}) is gone: it was killed, ran out of memory, or its own "
                        f"output says why; this rank waited for it in {what}"
                    )
            if time.monotonic() > until:
                with contextlib.suppress(Exception):
                    for r in others:
                        if (said := self._said(r)) is not None:
                            return str(said["cause"])
                return None
            time.sleep(0.1)


_line: _Line | None = None


def _the_line() -> _Line:
    global _line
    world = dist.group.WORLD
    if _line is None or _line.world is not world:
        _line = _Line(world)
    return _line


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


# ---- agreeing --------------------------------------------------------------------------------------------------------


def exchange(what: str, value: T) -> list[T]:
    """What every rank gave, by rank."""
    return cast("list[T]", _the_line().exchange(what, value)) if active() else [value]


def agreed(what: str, value: T, source: int = 0) -> T:
    """The value of rank ``source`` on every rank; whatever can be pickled."""
    return _the_line().broadcast(what, value, source) if active() else value


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block that every rank goes through by itself: where it raises on one rank, it raises on all of them.

    Nothing in the block may wait for another rank.

    Raises:
        RankError: on the ranks where nothing was wrong; the sentence names one where something was.
    """
    if not active():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    except BaseException as stopped:  # an interrupt does not wait for anybody
        _the_line().leave(_first_line(stopped), own=True)
        raise
    told = exchange(what, None if error is None else _first_line(error))
    if error is not None:
        raise error
    for r, cause in enumerate(told):
        if cause is not None:
            raise RankError(f"rank {r} failed in {what}: {cause}")


def first(what: str, work: Callable[[], T]) -> T:
    """What ``work`` returned on rank 0, which alone does it, on every rank; what it raised there is raised on every rank."""
    if not active():
        return work()
    told: Any = None
    error: Exception | None = None
    if is_first():
        try:
            told = (True, work())
        except Exception as raised:
            error, told = raised, (False, _portable(raised, what))
        except BaseException as stopped:
            _the_line().leave(_first_line(stopped), own=True)
            raise
    worked, found = agreed(what, told)
    if error is not None:
        raise error
    if not worked:
        raise found
    return found


def _portable(error: Exception, what: str) -> Exception:
    """The error as other ranks can raise it: itself, where it survives the journey."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if isinstance(again, Exception) and str(again) == str(error):
            return error
    except Exception:
        pass
    return RankError(f"rank 0 failed in {what}: {_first_line(error)}")


def spread(what: str, names: Sequence[str], work: Callable[[Sequence[str]], list[T]]) -> dict[str, T]:
    """Of every name what ``work`` makes of it on one rank, on all ranks: bits do not depend on who computes twice.

    Args:
        work: from names to a result for each, such as `over_layers` gives; nothing in it may wait for another rank.

    >>> spread("lengths", ["a", "bc"], lambda names: [len(name) for name in names])
    {'a': 1, 'bc': 2}
    """
    if not active():
        return dict(zip(names, work(names), strict=True))
    own: dict[str, T] = {}
    with together(what):
        mine = names[rank() :: size()]
        own = dict(zip(mine, work(mine), strict=True))
    return {name: agreed(what, own.get(name), i % size()) for i, name in enumerate(names)}  # type: ignore[misc]


def summed(what: str, found: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Sum of every rank's tensors, by name, float64; a rank that lacks one adds nothing. In place where it can be.

    Args:
        names: all that any rank may hold, in the same order on all ranks.
    """
    if not active():
        return dict(found)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for held in exchange(what, {name: (tensor.device.type, tuple(tensor.shape)) for name, tensor in found.items()}):
        kinds |= held
    out = {}
    for name in names:
        if name in kinds:
            kind, shape = kinds[name]
            tensor = found[name] if name in found else torch.zeros(shape, dtype=torch.float64)
            out[name] = _sum(what, tensor, kind)
    return out


def gathered(what: str, piece: Tensor, sizes: Sequence[int]) -> Tensor:
    """The flat pieces of all ranks one after another, on the CPU, bit for bit.

    Args:
        piece: this rank's, (sizes[rank],). sizes: entries of every rank's piece; they may differ.
    """
    piece = piece.detach().to("cpu").contiguous()
    if not active():
        return piece.clone()
    line, most = _the_line(), max(sizes) * piece.element_size()
    mine = torch.zeros(most, dtype=torch.uint8)
    mine[: piece.numel() * piece.element_size()] = piece.view(torch.uint8)
    found = [torch.empty_like(mine) for _ in sizes]
    line.call(what, lambda: dist.all_gather(found, mine, group=line.group))
    pieces = [f[: n * piece.element_size()] for f, n in zip(found, sizes, strict=True)]
    return torch.cat(pieces).view(piece.dtype)


def total(what: str, tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, on its device; the same bits on all ranks. In place where it can be."""
    return _sum(what, tensor, tensor.device.type) if active() else tensor


def _sum(what: str, tensor: Tensor, kind: str) -> Tensor:
    line, device = _the_line(), tensor.device
    if kind != "cpu" and dist.get_backend() == "nccl":
        tensor = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        line.call(what, lambda: dist.all_reduce(tensor))
        return tensor
    on_cpu = tensor.cpu().contiguous()
    line.call(what, lambda: dist.all_reduce(on_cpu, group=line.group))
    return on_cpu.to(device)


def totals(what: str, *numbers: float) -> list[float]:
    """Sums over the ranks, in float64 (whole numbers below 2⁵³ are exact).

    >>> totals("counts", 3, 0.5)
    [3.0, 0.5]
    """
    if not active():
        return [float(n) for n in numbers]
    line, held = _the_line(), torch.tensor(numbers, dtype=torch.float64)
    line.call(what, lambda: dist.all_reduce(held, group=line.group))
    return held.tolist()


def blame(error: BaseException) -> BaseException:
    """The error to raise out of a block that every rank is in: the one that was caught, unless another rank is the cause.

    The other ranks learn of this one's error where they next wait for it.
    """
    if not active() or isinstance(error, RankError):
        return error
    line = _the_line()
    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _is_lost(error)):
        return line.gone("the training", error)
    line.leave(_first_line(error), own=True)
    return error


def _is_lost(error: BaseException) -> bool:
    """Whether a collective of the training lost a peer; gloo has no type of its own for that."""
    told = str(error)
    return any(
        word in told
        for word in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
    )
