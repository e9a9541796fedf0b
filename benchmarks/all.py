"""The whole table of ratios, in one command: every aim of docs/speed.md beside what this machine measures.

    python benchmarks/all.py                                        # everything: hours on two cores
    python benchmarks/all.py --output bench.json                    # kept section by section, and as bench.md
    python benchmarks/all.py --output bench.json --resume           # goes on where it was interrupted
    python benchmarks/all.py --only step inference --models llama --threads 1
    python benchmarks/all.py --device cuda --dtype bf16 --models clip llama --budget 95
    python benchmarks/all.py --quick                                # narrow models: tries the code, says nothing about speed

A ratio is ours over the other's, the two run in turn in this process on the same work: median over the repeats (least–most).
A section that raises becomes a row with its reason, the others go on, and the exit code is 1.

- boundary: against a straightforward one (straightforward.py), float32 on both sides: linear algebra, passes, the whole, the
  whole with the sample-saving stop, peak memory, and how far the subspaces lie apart (a sine, not a ratio).
- step: a training step against stock PEFT LoRA and against its floor (step.py); peak memory; on a GPU also tokens or pictures
  a second.
- inference: the merged model against the base model.
- data: a step with 100 class prompts against one with prompts of 77 tokens (data_path.py).
- sketch: what the gradient of a 4096-wide layer takes, sketched against whole (sketch.py).
- state: bytes of a ledger with its adapters, against the base model's.
- ranks: two processes of one thread against one of two (ranks.py; gloo, CPU).
- fifty: the boundary of task 50 against task 2.

Models: clip (CLIP ViT-B/16) and llama (100 M, LLaMA style), both at random weights; demo (the embedded one, where
`keeplora assets fetch` was run). data, sketch and ranks have a model of their own, whichever are named. Times are of the clock,
with --cpu of the processor: for a busy machine, with --threads 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import machine
from sections import MODELS, SECTIONS, Bench, NotHere
from table import Budget, Row, Table, failure, left_out, line

from keeplora.experiment.environment import collect_environment


def units(only: Sequence[str], models: Sequence[str]) -> list[tuple[str, str]]:
    """(section, model) in the order in which they run; a section that has no such choice of models runs once, as its own."""
    return [
        (name, model)
        for name in SECTIONS
        if name in only
        for model in ([m for m in models if m in SECTIONS[name].models] or [])
        + ([m for m in SECTIONS[name].models if m not in MODELS])
    ]


def measure(bench: Bench, section: str, model: str) -> list[Row]:
    """The rows of one unit; whatever it raises becomes a row."""
    try:
        return SECTIONS[section].run(bench, model)
    except NotHere as reason:
        return [left_out(section, model, str(reason))]
    except Exception as error:
        traceback.print_exc()
        return [failure(section, model, error)]
    finally:
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--output", type=Path, help="JSON, written after every section; the table beside it as .md")
    parser.add_argument("--resume", action="store_true", help="keep what --output holds, and measure the rest")
    parser.add_argument("--quick", action="store_true", help="narrow models and one repeat: to try the code")
    parser.add_argument(
        "--rounds", type=int, default=5, help="repeats of a pair; where one takes minutes, three at most"
    )
    parser.add_argument("--budget", type=float, help="seconds for all: fewer repeats (at least one), fewer blocks")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor, not of the clock")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32",
                        help="of step, inference and data; the boundary is float32")  # fmt: skip
    parser.add_argument("--batch", type=int, help="pictures or sequences of a step")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round float32 factors to TF32")
    given = parser.parse_args(argv)
    if given.resume and given.output is None:
        parser.error("--resume goes on with a file: name it by --output FILE.json")
    if given.output is not None and given.output.suffix == ".md":
        parser.error(
            f"--output is the JSON file, and the table comes beside it as .md: {given.output.with_suffix('.json')}"
        )
    if given.output is not None and given.output.exists() and not given.resume:
        parser.error(f"{given.output} is there: --resume goes on with it; or name another file, or delete it")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if given.device == "cuda" and given.cpu:
        parser.error("--cpu: processor seconds say nothing about a GPU's work")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    given = parse(argv)
    os.environ["KEEPLORA_NO_CACHE"] = "1"  # the bases of the weights are to be computed, on both sides
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = given.tf32
    git = collect_environment(Path(__file__).parent)["git"] or {}
    settings = {
        "quick": given.quick, "device": given.device, "dtype": given.dtype, "threads": torch.get_num_threads(),
        "cpu": given.cpu, "batch": given.batch, "tf32": given.tf32, "commit": git.get("commit"),
    }  # fmt: skip
    about = f"{machine()}; {given.device}, {given.dtype}, {'processor' if given.cpu else 'clock'} seconds"
    about += f", load {os.getloadavg()[0]:.1f}, commit {str(git.get('commit'))[:10]}{' and changes' * bool(git.get('dirty'))}"
    about += "; **narrow models: no figure here says anything about speed**" * given.quick
    table = Table(settings, about, given.output)
    if given.resume:
        try:
            table.resume()
        except ValueError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
    bench = Bench(
        torch.device(given.device), given.dtype, Budget(given.budget), 1 if given.quick else given.rounds, given.cpu,
        given.quick, given.batch,
    )  # fmt: skip
    asked = [unit for unit in units(given.only, given.models) if unit not in table.done]
    print(table.markdown(), flush=True)
    for i, (section, model) in enumerate(asked):
        weights = [SECTIONS[name].weight for name, _ in asked[i:]]
        bench.budget.begin(weights[0], sum(weights))
        started = time.perf_counter()
        rows = measure(bench, section, model)
        table.add(section, model, rows)
        for row in rows:
            print(line(row), flush=True)
        print(f"{section} {model}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
