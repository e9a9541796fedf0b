"""What `keeplora run --dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from keeplora.experiment.plan import Footprint, Plan
    from keeplora.experiment.scale import Phase

SHARES = (0.1, 0.25, 0.5, 0.75)
# What a row of the memory table is called, which field of `Memory` it shows, and the arithmetic in short.
ROWS = (
    ("weights of the model", "base", "e P; 8bit Q + 4 rows, 4bit Q/2 + Q/16, and 2 (P - Q)"),
    ("factors A, B of the task", "factors", "4 r (in + out)"),
    ("gradient of B and AdamW", "optimiser", "12 per trained parameter"),
    ("activations, micro-batch", "activations", "b T L block"),
    ("... checkpointed", "activations_checkpointed", "b T (L e H + block)"),
    ("G of all targets", "gradients", "8 out in; sketched 8 l in + 4 l out once"),
    ("C of all inputs", "covariances", "8 in^2"),
    ("keys and values, answering", "cache", "2 e L g d (T + new) eval_batch_size"),
    ("each past task beside it", "past", "4 r (in + out), quantised bases alone"),
    ("DEVICE, at its fullest", "device", "weights + past + the largest phase"),
    ("copies of W0 on the host", "copies", "e out in, from the first merge on"),
    ("HOST, at its fullest", "host", "copies + 2 U + every task's A, B + one G or C"),
)


def size(count: int) -> str:
    """GiB, MiB below one.

    >>> size(3 * 2**30), size(5 * 2**19)
    ('3.00 GiB', '2.5 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def print_plan(experiment: Any, assumed: Sequence[str]) -> None:
    """The plan of a run; of a generative model its footprint too, and that alone where its weights are not there."""
    from keeplora.cli.console import wide_console
    from keeplora.experiment.assumptions import Assumptions
    from keeplora.experiment.plan import assume_measured, make_footprint, make_plan, needs_footprint

    console = wide_console()
    config, assume, alone = experiment.config, Assumptions.parse(assumed), needs_footprint(experiment.config)
    if alone:
        footprint = make_footprint(config, assume)
        _print_tasks(console, config, footprint.tasks)
        if footprint.missing:
            console.print(f"sizes of the tasks are assumed: {footprint.missing}", highlight=False)
        _print_targets(console, footprint.targets, footprint.settings.trained)
        console.print(f"the weights of {config.model.name} are not here: what follows is arithmetic on its config.json")
        _print_footprint(console, config, footprint)
    else:
        setup = experiment.setup
        plan = make_plan(setup)
        _print_tasks(console, config, plan.tasks)
        for probe in setup.probes:
            what = f"pictures, {len(probe.classes)} classes" if probe.kind == "classification" else "questions"
            console.print(f"probe {probe.name}: {len(probe.test)} {what}, never trained on")
        _print_targets(console, plan.targets, plan.trained_parameters)
        _print_measured(console, setup, plan)
        if setup.kind.name == "generation":
            given = {pair.partition("=")[0] for pair in assumed}
            _print_footprint(console, config, make_footprint(config, assume_measured(assume, plan, given), setup))
    for item in config.overridden:
        console.print(f"differs from preset {config.preset}: {item}", highlight=False)


def _print_tasks(console: Console, config: Any, rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from keeplora.cli.console import print_table

    table = Table(title=f"{config.label}: {config.method}, seed {config.seed} → {config.output_path}")
    what = "scorer" if rows and "scorer" in rows[0] else "classes"
    keys = ("name", what, "train", "validation", "test", "epochs", "steps")
    for key in keys:
        table.add_column("task" if key == "name" else key, justify="left" if key in ("name", "scorer") else "right")
    for row in rows:
        table.add_row(*(str(row[key]) for key in keys))
    print_table(console, table)


def _print_targets(console: Console, targets: Sequence[Any], trained: int) -> None:
    towers: dict[str, int] = {}
    for target in targets:
        towers[target.tower] = towers.get(target.tower, 0) + 1
    console.print(f"targets: {', '.join(f'{n} in {tower}' for tower, n in towers.items())}")
    console.print(f"trained parameters per task: {trained:,}")


def _print_measured(console: Console, setup: Any, plan: Plan) -> None:
    from keeplora.experiment.progress import duration

    console.print(f"precision: {setup.precision.name} on {setup.precision.device}")
    console.print(f"memory: about {plan.memory_bytes / 2**30:.1f} GiB (measured on one trained batch)")
    parts = _phases_told(setup.config, plan.seconds)
    console.print(f"time: about {duration(plan.total_seconds)} ({parts}; scaled up from one timed batch)")


def _phases_told(config: Any, seconds: Mapping[str, float]) -> str:
    """A pass that ``statistics_tolerance`` may end is told as what it takes at most."""
    from keeplora.experiment.progress import duration

    ends = {"statistics": "at most "} if config.tuner.statistics_tolerance is not None else {}
    return ", ".join(f"{phase} {ends.get(phase, '')}{duration(value)}" for phase, value in seconds.items())


def _print_footprint(console: Console, config: Any, plan: Footprint) -> None:
    from rich.table import Table

    from keeplora.cli.console import print_table
    from keeplora.experiment.footprint import BASES, subspace_bytes
    from keeplora.experiment.progress import duration

    assume, shape, settings = plan.assume, plan.shape, plan.settings
    told = ", ".join(f"{key}={value:g}" for key, value in vars(assume).items() if key not in ("image_tokens", "tasks"))
    console.print(f"assumed (change with --assume NAME=VALUE): {told}", highlight=False)
    t = shape.language
    console.print(
        f"P = {shape.parameters:,} parameters, Q = {shape.quantised:,} of them in the language model's linears; L = {t.blocks}, "
        f"H = {t.hidden}, I = {t.intermediate}, h = {t.heads}, g = {t.kv_heads}, d = {t.head_dim}; T = {t.tokens}, of which "
        f"{shape.image_tokens} for a picture; b = {settings.micro_batch}", highlight=False,
    )  # fmt: skip
    table = Table(title="memory with the base held in ... (* this run)")
    table.add_column("")
    for base in BASES:
        table.add_column(f"{base} *" if base == plan.base else base, justify="right", no_wrap=True)
    table.add_column("bytes", overflow="fold")
    for label, field, how in ROWS:
        values = [getattr(plan.memory[base], field) for base in BASES]
        if any(values):
            table.add_row(label, *(size(value) if value else "-" for value in values), how)
    print_table(console, table)
    if settings.protects:
        held = ", ".join(f"{share:.0%} {size(subspace_bytes(plan.linears, share))}" for share in SHARES)
        console.print(
            f"U in float32 on the host, by k/in: {held}; k is known after U₀'s decomposition alone (the table takes "
            f"{assume.k:.0%}, an assumption)", highlight=False,
        )  # fmt: skip
    console.print(
        f"state carried from task to task: the model and {plan.keeps}; ledger: {size(plan.ledger_bytes)} per task (A, B"
        + (", what is free)" if settings.free else ")")
        + (", and U once in all" if settings.protects else ""), highlight=False,
    )  # fmt: skip
    seconds = plan.seconds[plan.base]
    parts = _phases_told(config, seconds)
    console.print(
        f"time at {assume.tflops:g} TFLOP/s: about {duration(sum(seconds.values()))} ({parts}; from operation counts, nothing "
        "was timed)", highlight=False,
    )  # fmt: skip
    if settings.protects and settings.trained:
        _print_phases(console, plan)


def counted(n: float) -> str:
    """Operations, or seconds, in powers of ten.

    >>> counted(0), counted(1.5e12)
    ('-', '1.5e12')
    """
    return f"{n:.1e}".replace("e+0", "e").replace("e+", "e") if n else "-"


def took(seconds: float) -> str:
    """Minutes and hours, or days where there are many.

    >>> took(65.2), took(200_000)
    ('1:05', '2.3 days')
    """
    from keeplora.experiment.progress import duration

    return f"{seconds / 86_400:,.1f} days" if seconds >= 2 * 86_400 else duration(seconds)


def phase_rows(found: Sequence[Phase]) -> list[tuple[str, ...]]:
    """The cells of the table of phases: name, when, operations, device, host, disk, seconds."""

    def held(count: int) -> str:
        return size(count) if count else "-"

    return [
        (p.name, p.when, counted(p.flops), held(p.device), held(p.host), held(p.disk), took(p.seconds)) for p in found
    ]  # fmt: skip


PHASE_COLUMNS = ("phase", "", "operations", "device", "host", "disk", "time")


def _print_phases(console: Console, plan: Footprint) -> None:
    """Bytes and operations of every phase, for the run's tasks or as many as are assumed."""
    from rich.table import Table

    from keeplora.cli.console import print_table
    from keeplora.experiment.scale import Load, phases, turning_points

    s, assume = plan.settings, plan.assume
    own = len(s.epochs)
    load = Load(
        assume.tasks or own, round(sum(s.samples) / own), round(sum(s.epochs) / own), round(sum(s.gradient_samples) / own),
        round(sum(s.feature_samples) / own), s.micro_batch, s.checkpointing,
    )  # fmt: skip
    table = Table(title=f"phases of {load.tasks} tasks (docs/scale.md), base in {plan.base}")
    for column in PHASE_COLUMNS:
        table.add_column(
            column, justify="left" if column in ("phase", "") else "right", no_wrap=column not in ("phase", "")
        )
    for row in phase_rows(phases(plan.shape, plan.linears, load, assume, plan.base)):
        table.add_row(*row)
    print_table(console, table)
    turn = turning_points(assume.k, assume.growth)
    if turn is not None:
        console.print(
            f"U from {assume.k:.0%} of the width, {assume.growth:.2%} more each task: its complement is the smaller side after "
            f"{turn[0]} tasks, nothing is left after {turn[1]}", highlight=False,
        )  # fmt: skip
