"""The tables of docs/scale.md: bytes, operations and time of every phase, for a 7B and a 70B model, 1,000 tasks, 10⁸ samples.

Arithmetic on shapes (`keeplora.experiment.scale`): nothing is loaded and nothing is timed, so every machine prints the same.

    python benchmarks/scale_plan.py                # print the tables
    python benchmarks/scale_plan.py --write        # put them into docs/scale.md
    python benchmarks/scale_plan.py --tasks 100 --rank 16 --assume tflops=400
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from keeplora.cli.plan_text import PHASE_COLUMNS, counted, phase_rows, size, took
from keeplora.experiment.assumptions import Assumptions
from keeplora.experiment.blueprint import Blueprint
from keeplora.experiment.config import load_config
from keeplora.experiment.footprint import Linear, ModelShape, base_bytes, factor_bytes
from keeplora.experiment.scale import (
    Load,
    basis_bytes,
    last_merge_flops,
    ledger_bytes,
    phases,
    totals,
    turning_points,
    update_bytes,
    verify_flops,
)
from keeplora.methods import method_names
from keeplora.tuner.targets import resolve_targets

PAGE = Path(__file__).parent.parent / "docs/scale.md"
ASSUMED = ("k=0.25", "growth=0.0005")
"""U₀ holds a quarter of the width; a task adds a twentieth of a percent, 2 of 4096 directions."""
POINTS = (1, 10, 100, 500, 1000)
MODELS = {
    "7B": {},  # LlavaConfig() is LLaVA-1.5-7B
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
}  # fmt: skip
"""The language models: LLaMA-2's 70B has grouped keys and values. Both behind CLIP-L/14 at 336 pixels."""


def drawn(name: str, rank: int, assume: Assumptions) -> tuple[ModelShape, list[Linear]]:
    """The shape of a model and its targets, all linears of the language model's blocks, from its config alone."""
    from transformers import LlamaConfig, LlavaConfig

    with tempfile.TemporaryDirectory() as folder:
        text = LlamaConfig(**MODELS[name]) if MODELS[name] else None
        LlavaConfig(text_config=text, dtype="bfloat16").save_pretrained(Path(folder, "llava"))
        task = {"name": "a", "source": "llava", "train": "a.json", "test": "b.json"}
        tuner = {"r": rank, "parts": {"projector": "frozen"}}
        config = load_config(
            {"model": "llava", "base_dir": folder, "tasks": [task], "method": "keeplora++", "tuner": tuner},
            known_methods=method_names(),
        )
        blueprint = Blueprint.draw(config)
    from keeplora.tuner import KeepLoraConfig

    targets = resolve_targets(
        blueprint.model, KeepLoraConfig(r=rank, target_modules=blueprint.target_modules(["language"]))
    )
    shape = blueprint.shape(assume)
    return shape, blueprint.linears(targets, shape)


def table(rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    marks = ["---" if i < 1 else "---:" for i in range(len(columns))]
    lines = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(name: str, rank: int, load: Load, assume: Assumptions) -> str:
    """The tables of one model as Markdown."""
    shape, targets = drawn(name, rank, assume)
    found = phases(shape, targets, load, assume, "bf16")
    k, growth = assume.k, assume.growth
    work, seconds = totals(found, load, sketch=True)
    rows = [row[:1] + row[2:] for row in phase_rows(found)]
    growing = [
        (
            f"{t:,}", size(basis_bytes(targets, t, k, growth)), size(ledger_bytes(targets, t, k, growth)),
            size(update_bytes(targets, t)), counted(last_merge_flops(targets, t)),
            took(last_merge_flops(targets, t) / (1e9 * assume.host_gflops)),
            took(
                verify_flops(targets, t, k, growth) / (1e9 * assume.host_gflops)
                + ledger_bytes(targets, t, k, growth) / (1e9 * assume.disk)
            ),
        )
        for t in POINTS if t <= load.tasks
    ]  # fmt: skip
    turn = turning_points(k, growth)
    assert turn is not None
    return "\n\n".join(
        [
            f"P = {shape.parameters:,} parameters, {size(base_bytes(shape, 'bf16'))} in bf16; {len(targets)} targets, rank "
            f"{rank}: {size(factor_bytes(targets))} of A and B a task.",
            table(rows, (PHASE_COLUMNS[0], *PHASE_COLUMNS[2:])),
            f"All {load.tasks:,} tasks, with sketched gradients: {counted(work)} operations, {took(seconds)} here.",
            table(
                growing, ("after task", "U in memory", "ledger on disk", "updates in memory", "operations of a merge", "its time",
                "verifying"),
            ),
            f"The complement is the smaller side after task {turn[0]:,}; nothing is left after task {turn[1]:,}.",
        ]
    )  # fmt: skip


def blocks(rank: int, load: Load, assume: Assumptions) -> dict[str, str]:
    """Model -> its tables."""
    return {name: tables(name, rank, load, assume) for name in MODELS}


def written(text: str, found: dict[str, str]) -> str:
    """The page with the tables between its marks."""
    for name, body in found.items():
        start, end = f"<!-- scale_plan {name} -->", f"<!-- end {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{body}\n\n{end}{rest.split(end)[1]}"
    return text


def default_load(tasks: int = 1_000, samples: float = 1e8) -> Load:
    return Load(tasks, round(samples / tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--samples", type=float, default=1e8, help="of all tasks together")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="as of keeplora run --dry-run"
    )
    options = parser.parse_args()
    assume = Assumptions.parse([*ASSUMED, *options.assume])
    found = blocks(options.rank, default_load(options.tasks, options.samples), assume)
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name, body in found.items():
        print(f"## {name}\n\n{body}\n")


if __name__ == "__main__":
    main()
