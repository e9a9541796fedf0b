"""What many tasks on a large model take: bytes and operations of every phase, from shapes alone (docs/scale.md).

Symbols as in `keeplora.experiment.footprint`; besides, t is a task's number from 1, k_t the columns of a target's U after it,
and l = min(out, r + p) the rows of a sketched gradient. A formula counts the products that grow with the model: additions,
norms and softmax are left out. Products are checked against torch's own counter, bytes against files and tensors, on small models
(tests/experiment/test_scale.py); of eigh it is Golub & Van Loan's count. Decompositions are those of whole matrices: M4 and M8
decompose what U leaves of them, which is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keeplora.experiment import footprint
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.footprint import Linear, ModelShape
from keeplora.math import held_bytes
from keeplora.math import sketch_rows as rows_of_sketch


def columns(n_in: int, t: int, start: float, growth: float) -> int:
    """k_t = min(in, ⌊in (start + t growth) + 1/2⌋): U₀ has ``start`` of the width, and each task adds ``growth`` of it.

    >>> [columns(4096, t, 0.25, 0.0005) for t in (0, 1, 1000, 2000)]
    [1024, 1026, 3072, 4096]
    """
    return min(n_in, int(n_in * (start + t * growth) + 0.5))


def turning_points(start: float, growth: float) -> tuple[int, int] | None:
    """(tasks until U passes half the width and its complement is the smaller side, tasks until nothing is left); None: never.

    >>> turning_points(0.25, 0.0005)
    (500, 1500)
    """
    if growth <= 0:
        return None
    return (
        max(0, -(-round((0.5 - start) * 1e9) // round(growth * 1e9))),
        -(-round((1 - start) * 1e9) // round(growth * 1e9)),
    )


def basis_bytes(targets: Sequence[Linear], t: int, start: float, growth: float) -> int:
    """U of all targets in memory after task t: Σ 4 in min(k_t, in − k_t), float32."""
    return sum(held_bytes(target.n_in, columns(target.n_in, t, start, growth)) for target in targets)


def entry_bytes(targets: Sequence[Linear], added: Sequence[int], valued: Sequence[int]) -> int:
    """A task's tensors in the ledger: A and B, Σ 4 r' (in + out), the directions that it adds, Σ 4 in Δk, and what every
    direction that tasks have added so far is worth, Σ 4 (k_t − k_0).

    Args:
        added: Δk of each target. valued: k_t − k_0 of each.
    """
    return footprint.factor_bytes(targets) + sum(
        4 * (t.n_in * new + known) for t, new, known in zip(targets, added, valued, strict=True)
    )


def ledger_bytes(targets: Sequence[Linear], tasks: int, start: float, growth: float) -> int:
    """The tensors of the ledger on disk after so many tasks: U₀ (its smaller side), and every task's entry."""
    values = 0
    for n_in in {t.n_in for t in targets}:
        count, first = sum(t.n_in == n_in for t in targets), columns(n_in, 0, start, growth)
        values += count * sum(4 * (columns(n_in, t, start, growth) - first) for t in range(1, tasks + 1))
    directions = sum(
        4 * t.n_in * (columns(t.n_in, tasks, start, growth) - columns(t.n_in, 0, start, growth)) for t in targets
    )
    return basis_bytes(targets, 0, start, growth) + tasks * footprint.factor_bytes(targets) + directions + values


def checkpoint_bytes(trained: int, frozen: int) -> int:
    """A checkpoint inside a task: B and AdamW's two moments, 12 per trained parameter, and A, 4 per entry."""
    return 12 * trained + 4 * frozen


def sketch_rows(target: Linear) -> int:
    """l of a target, by the rule of a run's default."""
    return rows_of_sketch(target.n_out, target.r)


def outer_flops(targets: Sequence[Linear]) -> int:
    """G of one sample: Σ 2 in out T."""
    return sum(2 * t.n_in * t.n_out * t.tokens for t in targets)


def sketch_flops(targets: Sequence[Linear]) -> int:
    """(Ψ gᵀ) x of one sample: Σ 2 l (in + out) T."""
    return sum(2 * sketch_rows(t) * (t.n_in + t.n_out) * t.tokens for t in targets)


def gram_flops(targets: Sequence[Linear]) -> int:
    """C of one sample: Σ 2 in² T over the targets that read a tensor of their own."""
    return sum(2 * t.n_in**2 * t.tokens for t in targets if not t.shared)


def merge_flops(targets: Sequence[Linear], tasks: int) -> int:
    """W₀ + Σ s B A of so many tasks, summed anew from the factors in their order, as opening a ledger and rolling back do:
    tasks · Σ 2 r' in out."""
    return tasks * sum(2 * t.rank * t.n_in * t.n_out for t in targets)


def sum_is_held(target: Linear, tasks: int) -> bool:
    """Whether Σ s B A of so many tasks is kept (`WeightStore`): from two on, once the factors are as many numbers as it is."""
    return tasks > 1 and tasks * target.rank * (target.n_in + target.n_out) >= target.n_in * target.n_out


def last_merge_flops(targets: Sequence[Linear], tasks: int) -> int:
    """The merge of the last of so many tasks: one product where the sum of those before is held, and all of them elsewhere."""
    return sum(
        (1 if sum_is_held(t, tasks - 1) else tasks) * 2 * t.rank * t.n_in * t.n_out for t in targets
    )  # fmt: skip


def update_bytes(targets: Sequence[Linear], tasks: int) -> int:
    """What a learner with a ledger holds of its updates: A and B, 4 r' (in + out) a task, or in their place the sum, 4 in out."""
    return sum(
        4 * (t.n_in * t.n_out if sum_is_held(t, tasks) else tasks * t.rank * (t.n_in + t.n_out)) for t in targets
    )  # fmt: skip


def verify_flops(targets: Sequence[Linear], tasks: int, start: float, growth: float) -> int:
    """`keeplora ledger verify`: of each task and target UᵀU, 2 in k_t², A Aᵀ, 2 r'² in, and A U, 2 r' in k_{t−1}."""
    total = 0
    for n_in, rank, count in sorted({(t.n_in, t.rank, _like(targets, t)) for t in targets}):
        k = [columns(n_in, t, start, growth) for t in range(tasks + 1)]
        total += count * sum(2 * n_in * (k[t] ** 2 + rank**2 + rank * k[t - 1]) for t in range(1, tasks + 1))
    return total


def _like(targets: Sequence[Linear], one: Linear) -> int:
    return sum((t.n_in, t.rank) == (one.n_in, one.rank) for t in targets)


@dataclass(frozen=True)
class Phase:
    """One thing that a sequence of tasks does.

    Attributes:
        when: "once", "task" (each of them; the last, where tasks differ) or "end" (after the last).
        flops: operations. seconds: at the assumed speeds; reading and writing files counts too.
        device, host: bytes held beside the model while it lasts. disk: bytes written, or read where nothing is.
    """

    name: str
    when: str
    flops: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Load:
    """How much there is to learn: tasks, and of each the samples, epochs, and samples of the statistics passes; micro-batch."""

    tasks: int
    samples: int
    epochs: int = 1
    gradient_samples: int = 1_000
    feature_samples: int = 1_000
    micro_batch: int = 4
    checkpointing: bool = True


def phases(shape: ModelShape, targets: Sequence[Linear], load: Load, assume: Assumptions, base: str) -> list[Phase]:
    """Every phase of ``load.tasks`` tasks with KeepLoRA++ (A frozen, features as the memory), base held as ``base``.

    Args:
        assume: `k` is U₀'s share of the width, `growth` what a task adds to it.
    """
    fast, slow, host, disk = (
        1e12 * assume.tflops,
        1e12 * assume.fp32_tflops,
        1e9 * assume.host_gflops,
        1e9 * assume.disk,
    )
    T, k0, growth = load.tasks, assume.k, assume.growth
    A_B = footprint.factor_bytes(targets)
    trained, frozen = sum(t.rank * t.n_out for t in targets), sum(t.rank * t.n_in for t in targets)
    forward, backward = footprint.forward_flops(shape), footprint.backward_flops(shape)
    head = 4 * shape.language.hidden * shape.vocabulary * assume.answer_tokens
    again = 2 * shape.language.linear * shape.language.tokens if load.checkpointing else 0
    step = forward + backward + head + footprint.adapter_flops(targets) + again
    passed = forward + backward + head + again
    ranks = round(sum(t.rank for t in targets) / shape.language.blocks)

    def activations(statistics: bool) -> int:
        return footprint.activation_bytes(
            shape, base, samples=load.micro_batch, answer_tokens=assume.answer_tokens, ranks=ranks,
            checkpointing=load.checkpointing, statistics=statistics,
        )  # fmt: skip

    held, U0 = footprint.base_bytes(shape, base), basis_bytes(targets, 0, k0, growth)
    vectors = sum(footprint.vectors_flops(t) for t in targets)
    of_sketches = sum(footprint.vectors_flops(replace(t, n_out=sketch_rows(t))) for t in targets)
    eigh = sum(footprint.eigh_flops(t.n_in) for t in targets)
    G = footprint.exact_bytes(targets)
    copies = footprint.element(base) * sum(t.n_in * t.n_out for t in targets)  # W₀, from the first merge on
    U = max(basis_bytes(targets, t, k0, growth) for t in range(T + 1)) if T <= 10_000 else U0
    added = [columns(t.n_in, T, k0, growth) - columns(t.n_in, T - 1, k0, growth) for t in targets]
    valued = [columns(t.n_in, T, k0, growth) - columns(t.n_in, 0, k0, growth) for t in targets]
    entry, ledger = entry_bytes(targets, added, valued), ledger_bytes(targets, T, k0, growth)
    checkpoint, merge = checkpoint_bytes(trained, frozen), last_merge_flops(targets, T)
    opened = merge_flops(targets, T)
    verify = verify_flops(targets, T, k0, growth)
    g, f, n = load.gradient_samples, load.feature_samples, load.samples * load.epochs
    largest = max(8 * t.n_in**2 for t in targets)
    return [
        Phase("weights of the model", "once", device=held, disk=held, seconds=held / disk),
        Phase("U₀: singular vectors of every target", "once", vectors, host=U0, disk=U0, seconds=vectors / host + U0 / disk),
        Phase(
            "gradient pass, exact", "task", g * (passed + outer_flops(targets)), G + activations(True),
            seconds=g * (passed / fast + outer_flops(targets) / slow),
        ),
        Phase("A of exact gradients: singular vectors", "task", vectors, host=A_B, seconds=vectors / host),
        Phase(
            "gradient pass, sketched", "task", g * (passed + sketch_flops(targets)),
            footprint.sketch_bytes(targets) + activations(True),
            seconds=g * (passed / fast + sketch_flops(targets) / slow),
        ),
        Phase("A of sketched gradients: singular vectors", "task", of_sketches, host=A_B, seconds=of_sketches / host),
        Phase("training", "task", n * step, A_B + 12 * trained + activations(False), seconds=n * step / fast),
        Phase("a checkpoint", "task", disk=checkpoint, seconds=checkpoint / disk),
        Phase("merge, at the last task", "task", merge, host=update_bytes(targets, T) + copies, seconds=merge / host),
        Phase(
            "covariance pass", "task", f * (forward + gram_flops(targets)), footprint.covariance_bytes(targets),
            seconds=f * (forward / fast + gram_flops(targets) / slow),
        ),
        Phase("new directions: an eigh per target", "task", eigh, host=largest + U, seconds=eigh / host),
        Phase("entry of the ledger", "task", disk=entry, seconds=entry / disk),
        Phase("the whole ledger", "end", disk=ledger, seconds=ledger / disk),
        Phase(
            "opening it, or rolling back", "end", opened, host=T * A_B + copies + U, disk=T * A_B,
            seconds=opened / host + T * A_B / disk,
        ),
        Phase("verifying it", "end", verify, host=U, disk=ledger, seconds=verify / host + ledger / disk),
        Phase("export of all tasks as one adapter", "end", disk=T * A_B, seconds=2 * T * A_B / disk),
        Phase("export merged", "end", disk=held, seconds=held / disk),
    ]  # fmt: skip


def totals(found: Sequence[Phase], load: Load, *, sketch: bool) -> tuple[float, float]:
    """(operations, seconds) of the whole sequence: what is once, and every task's, each as the last one's."""
    left_out = "exact" if sketch else "sketched"
    work, seconds = 0.0, 0.0
    for phase in found:
        if phase.when == "end" or left_out in phase.name:
            continue
        times = 1.0 if phase.when == "once" else load.tasks
        work, seconds = work + times * phase.flops, seconds + times * phase.seconds
    return work, seconds
