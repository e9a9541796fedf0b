"""Models that several processes hold together, each a part of the weights: what differs from models that each holds whole.

Sharded are the parameters that FSDP2 made `DTensor`s of (`torch.distributed.fsdp.fully_shard`), and those that DeepSpeed ZeRO-3
has partitioned. Both put a layer together for as long as it computes, so hooks see what they always see. But every process
must then call the same layers equally often, also one that has no data left (`in_step`); and what a process holds of a weight
is a stretch of it (`Stretch`), from which all of them put the whole together (`whole`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from keeplora.errors import KeepLoraError
from keeplora.tuner import ranks, zero3

T = TypeVar("T")


def is_partitioned(p: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the parameter."""
    return hasattr(p, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is held by several processes together.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters()) or any(_fsdp_modules(model))


def _fsdp_modules(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and hasattr(fsdp, "FSDPModule"):
        yield from (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))


def settle(model: nn.Module) -> None:
    """Have the engine give back what it has put together, so that the parameters are the sharded ones again; without any message.

    FSDP2's outermost module keeps its parameters whole after a forward pass that nothing follows; DeepSpeed a module whose
    input needs no gradient after a backward pass.
    """
    for module in _fsdp_modules(model):
        module.reshard()
    zero3.release(model)


# ---- a process's part of a weight ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """What this process holds of a weight: entries ``start`` to ``end`` of it, row by row. ``sizes``: of all processes."""

    shape: tuple[int, ...]
    start: int
    end: int
    sizes: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """The rows of a matrix that it touches."""
        width = self.shape[-1]
        return slice(self.start // width, -(-self.end // width))

    def of_rows(self, part: Tensor) -> Tensor:
        """Itself, flat, out of the rows that it touches."""
        first = self.rows.start * self.shape[-1]
        return part.reshape(-1)[self.start - first : self.end - first]


def _even(length: int, parts: int, unit: int = 1) -> list[int]:
    """Sizes of the pieces when ``length`` units are cut as both engines do: all of the same size but for what is lacking.

    >>> _even(7, 3, unit=10)
    [30, 30, 10]
    """
    size = -(-length // parts)
    return [unit * max(0, min(size, length - r * size)) for r in range(parts)]


def stretch(name: str, p: Tensor) -> Stretch:
    """Of a sharded parameter; ``name`` is for the sentence.

    Raises:
        KeepLoraError: it is not divided over all processes by rows, or is kept on the CPU while a GPU computes.
    """
    n = ranks.size()
    if is_partitioned(p):
        shape = tuple(p.ds_shape)  # type: ignore[attr-defined]
        total = int(p.ds_numel)  # type: ignore[attr-defined]
        sizes = _even(total, n)
    else:
        assert isinstance(p, DTensor)
        shape = tuple(p.shape)
        if p.placements != (Shard(0),) or p.device_mesh.size() != n:
            raise KeepLoraError(
                f"the weight of {name} is sharded as {p.placements} over {p.device_mesh.size()} of {n} processes: keeplora "
                "reads weights that fully_shard has divided by rows over all processes; leave out replication (HSDP), tensor "
                "parallelism and shard_placement_fn"
            )
        if p.to_local().device.type != p.device_mesh.device_type:
            raise KeepLoraError(
                f"the weight of {name} is sharded with CPU offload, which is not supported: leave offload_policy out"
            )
        sizes = _even(shape[0], n, unit=p.numel() // max(1, shape[0]))
    start = sum(sizes[: ranks.rank()])
    return Stretch(shape, start, start + sizes[ranks.rank()], tuple(sizes))


def held(p: Tensor, where: Stretch) -> Tensor:
    """The live entries of `stretch`, flat: writing into them writes into the model."""
    if is_partitioned(p):
        flat = p.ds_tensor.detach().view(-1)  # type: ignore[attr-defined]
        return flat[: where.end - where.start]
    live: Any = p.detach()
    return live.to_local().view(-1)


def whole(name: str, p: Tensor) -> Tensor:
    """The parameter's value on the CPU; of a sharded one put together from all processes, which all must ask for it at once."""
    if not isinstance(p, DTensor) and not is_partitioned(p):
        return p.detach().to("cpu")
    where = stretch(name, p)
    return joined_up(name, held(p, where), where)


def joined_up(name: str, piece: Tensor, where: Stretch) -> Tensor:
    """The weight that every process holds its stretch of, on the CPU."""
    return ranks.gathered(f"putting {name} together", piece, where.sizes).reshape(where.shape)


# ---- passes over data ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def going_through(model: nn.Module, what: str) -> Iterator[None]:
    """A pass over each process's data: a failure on one is a failure of all (`ranks.together`).

    Where the model is sharded the others wait for layers within the pass, and cannot be told before the process that failed
    has ended.
    """
    if not is_sharded(model):
        with ranks.together(what):
            yield
        return
    settle(model)
    try:
        yield
    except BaseException as error:
        if (cause := ranks.blame(error)) is not error:
            raise cause from error
        raise
    settle(model)


def in_step(model: nn.Module, batches: Iterable[Any], what: str) -> Iterator[tuple[Any, bool]]:
    """Every batch with True; of a sharded model also batches that another process is at, with False, to go along with.

    All processes then call the model equally often, and at the same time with batches of the same kind: a dual encoder's
    batches of pictures and of prompts go through different layers.

    >>> list(in_step(nn.Linear(2, 2), [1, 2], "a pass"))
    [(1, True), (2, True)]
    """
    if not ranks.active() or not is_sharded(model):
        yield from ((batch, True) for batch in batches)
        return
    source = iter(batches)
    own = next(source, None)
    while True:
        kinds = ranks.exchange(what, None if own is None else _kind(own))
        leader = next((r for r, kind in enumerate(kinds) if kind is not None), None)
        if leader is None:
            return
        lent = None
        if any(kind != kinds[leader] for kind in kinds):
            lent = ranks.agreed(what, own, leader)
        if own is not None and kinds[ranks.rank()] == kinds[leader]:
            yield own, True
            own = next(source, None)
        else:
            yield lent, False


def _kind(batch: Any) -> str:
    """Batches of one kind go through the same layers: they have the same parts."""
    if isinstance(batch, Tensor):
        return f"tensor of {batch.ndim} dimensions"
    if isinstance(batch, Mapping):
        return str(sorted(f"{key}: {_kind(value)}" for key, value in batch.items()))
    if isinstance(batch, (list, tuple)):
        tensors = [item for item in batch if isinstance(item, Tensor)]
        return f"{type(batch).__name__} of {len(batch) if tensors else 'items'}"
    return type(batch).__name__


def per_weight(
    what: str, names: Sequence[str], read: Callable[[str], Tensor], work: Callable[[str, Tensor], T]
) -> dict[str, T]:
    """``work(name, W)`` for every weight, each on one process, and its result on all; one weight is whole at a time in each.

    Args:
        read: gives the whole weight of a name where all processes ask for it at once.
    """
    size, rank = ranks.size(), ranks.rank()
    out: dict[str, Any] = {}
    for start in range(0, len(names), size):
        turn, mine = names[start : start + size], None
        for r, name in enumerate(turn):
            W = read(name)
            if r == rank:
                mine = W
            del W
        made = None
        with ranks.together(what):
            if mine is not None:
                made = work(turn[rank], mine)
        for r, name in enumerate(turn):
            out[name] = ranks.agreed(what, made if r == rank else None, r)
    return out


def shard_update(weight: Tensor, module: nn.Module) -> None:
    """Have FSDP2 shard B as it has sharded the weight that B is beside, and average its gradient; of a weight that it has not,
    nothing."""
    if not isinstance(weight, DTensor):
        return
    from torch.distributed.fsdp import fully_shard

    # Kept whole from the forward to the backward pass: B is small, and one message less.
    fully_shard(module, mesh=weight.device_mesh, reshard_after_forward=False)
