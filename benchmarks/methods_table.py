"""Methods × paired seeds on a packaged suite: the two tables of docs/results.md.

    python benchmarks/methods_table.py tune     # each method's own learning rate (and γ), on validation pictures alone
    python benchmarks/methods_table.py run      # shared and tuned settings, every seed; resumable, skips what is done
    python benchmarks/methods_table.py table    # Markdown from what is there, however little

`tune` sees the first two tasks only, holds out a quarter of their *training* pictures, and never opens a test picture.
Every method gets six trials at one seed that no table uses. The criterion, fixed beforehand: the mean of the 2 × 2
validation accuracy matrix (what Avg is over all tasks): learning, keeping and transfer weigh in. Runs use one thread
each, two at a time, so that the pairing holds on a busy machine and results do not depend on thread counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

METHODS = ("lora", "full-ft", "keeplora", "keeplora++")
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
# Shared setting, fixed before any test run: the `default` preset's (one-cycle, 1e-3, γ = 0.2 for KeepLoRA++).
TRIALS: dict[str, list[dict[str, float]]] = {
    "lora": [{"training.learning_rate": lr} for lr in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)],
    "full-ft": [{"training.learning_rate": lr} for lr in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)],
    "keeplora": [{"training.learning_rate": lr} for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)],
    "keeplora++": [
        {"training.learning_rate": lr, "tuner.gamma": gamma} for gamma in (0.2, 0.5) for lr in (2e-3, 4e-3, 8e-3)
    ],
}
METRICS = ("transfer", "average", "last", "probe", "forgetting", "bwt")


def trial(suite: str, method: str, overrides: dict[str, float]) -> float:
    """The criterion of one trial: mean of the validation matrix over the first two tasks, in percent."""
    import tempfile

    from keeplora import Experiment
    from keeplora.suites import load_suite

    tasks = [spec["name"] for spec in load_suite(suite)["tasks"]]
    with tempfile.TemporaryDirectory() as folder:
        values = {"suite": suite, "method": method, "validation": 0.25, "seed": TUNING_SEED, "threads": 1}
        experiment = Experiment(values, {**overrides, "output": f"{folder}/run"}, quiet=True)
        setup = experiment.setup
        del setup.tasks[2:], setup.probes[:]
        assert [t.name for t in setup.tasks] == tasks[:2]
        for task in setup.tasks:
            assert task.validation is not None
            task.test = task.validation
            held_out = setup.sets[task.name].validation
            assert held_out is not None
            setup.sets[task.name].test = held_out
        matrix = experiment.run()["accuracy"][1:]
    return sum(map(sum, matrix)) / sum(map(len, matrix))


def tune(suite: str, folder: Path, jobs: int) -> dict[str, dict[str, float]]:
    """Run what trials are missing, in processes of their own; returns the best setting of each method."""
    file = folder / "trials.json"
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    wanted = [(m, t) for m in METHODS for t in TRIALS[m] if json.dumps([m, t]) not in known]

    def one(job: tuple[str, dict[str, float]]) -> None:
        command = [sys.executable, __file__, "trial", "--suite", suite, "--job", json.dumps(job)]
        value = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        known[json.dumps(list(job))] = value
        file.write_text(json.dumps(known, indent=1))
        print(f"{job[0]:12} {job[1]}: {value:.1f}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, wanted))
    # On a tie the smaller learning rate (listed first) wins.
    return {m: max(TRIALS[m], key=lambda t: known[json.dumps([m, t])]) for m in METHODS}


def run(suite: str, folder: Path, jobs: int, methods: list[str], settings: list[str]) -> None:
    """Every method, setting and seed that is not finished."""
    tuned = tune(suite, folder, jobs) if "tuned" in settings else {}
    queue = []
    for seed in SEEDS:  # seeds outermost: an interrupted study has whole pairs
        for setting in settings:
            for method in methods:
                overrides = tuned.get(method, {}) if setting == "tuned" else {}
                queue.append((setting, method, seed, overrides))

    def one(job: tuple[str, str, int, dict[str, Any]]) -> None:
        setting, method, seed, overrides = job
        output = folder / setting / f"{method}-seed{seed}"
        status = output / "status.json"
        if status.exists() and json.loads(status.read_text())["state"] == "finished":
            return
        base = [sys.executable, "-m", "keeplora"]
        if (output / "config.yaml").exists():
            command = [*base, "resume", str(output)]
        else:
            command = [*base, "run", "--suite", suite, "--method", method, "--seed", str(seed), "--output", str(output)]
            for key, value in {**overrides, "threads": 1}.items():
                command += ["-o", f"{key}={value}"]
        done = subprocess.run(command, capture_output=True, text=True)
        print(f"{setting} {method} seed {seed}: {'done' if done.returncode == 0 else done.stderr[-400:]}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, queue))


def load(folder: Path, setting: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Finished results by method and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / setting).glob("*/results.json")):
        if json.loads((path.parent / "status.json").read_text())["state"] == "finished":
            value = json.loads(path.read_text())
            found.setdefault(value["method"], {})[value["seed"]] = value
    return found


def interval(low: float | None, mean: float, high: float | None) -> str:
    return f"{mean:+.1f}" if low is None or high is None else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(folder: Path, setting: str) -> str:
    """Means with 95 % t-intervals, and the paired differences of every method against sequential LoRA."""
    from keeplora.evaluation.stats import mean_interval, paired_difference

    found = load(folder, setting)
    lines = ["| method | n | " + " | ".join(METRICS) + " | first task after the last |", "|--|--|" + "--|" * 7]

    def values(method: str, key: str) -> dict[int, float]:
        if key == "first":
            return {seed: r["accuracy"][-1][0] for seed, r in found[method].items()}
        if key == "keep":  # the second target: the mean of Transfer and Probe
            return {s: (r["metrics"]["transfer"] + r["metrics"]["probe"]) / 2 for s, r in found[method].items()}
        return {seed: r["metrics"][key] for seed, r in found[method].items()}

    for method in [m for m in ("zero-shot", *METHODS, "keeplora-cls", "keeplora++-cls") if m in found]:
        cells = []
        for key in (*METRICS, "first"):
            v = list(values(method, key).values())
            half = mean_interval(v)
            spread = "" if half["low"] is None else f" ± {half['mean'] - half['low']:.1f}"
            cells.append(f"{half['mean']:.1f}{spread}")
        lines.append(f"| {method} | {len(found[method])} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| paired difference | n | last | mean of transfer and probe | average | forgetting |",
        "|--|--|--|--|--|--|",
    ]
    pairs = [(m, "lora") for m in ("keeplora++", "keeplora", "full-ft")] + [("keeplora++", "keeplora")]
    for a, b in pairs:
        if a not in found or b not in found:
            continue
        cells, n = [], 0
        for key in ("last", "keep", "average", "forgetting"):
            va, vb = values(a, key), values(b, key)
            seeds = sorted(set(va) & set(vb))
            n = len(seeds)
            d = paired_difference([va[s] for s in seeds], [vb[s] for s in seeds])
            cells.append(interval(d["low"], d["mean"], d["high"]))
        lines.append(f"| {a} − {b} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "run", "table", "trial"))
    parser.add_argument("--suite", default="demo-small")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["zero-shot", *METHODS])
    parser.add_argument("--settings", nargs="+", default=["shared", "tuned"], choices=("shared", "tuned"))
    parser.add_argument("--output", type=Path, default=None, help="default runs/study-SUITE")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.output or Path("runs") / f"study-{options.suite}"
    if options.what == "trial":
        method, overrides = json.loads(options.job)
        print(trial(options.suite, method, overrides))
    elif options.what == "tune":
        for method, best in tune(options.suite, folder, options.jobs).items():
            print(f"best for {method}: {best}")
    elif options.what == "run":
        run(options.suite, folder, options.jobs, options.methods, options.settings)
    if options.what in ("run", "table"):
        for setting in options.settings:
            print(f"\n## {setting}\n\n{table(folder, setting)}")


if __name__ == "__main__":
    main()
