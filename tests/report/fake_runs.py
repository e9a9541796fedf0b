"""Synthetic run directories of the documented format, for the report's tests: plausible, seeded, any part left out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from keeplora.evaluation import summary
from keeplora.files import atomic_write_json, atomic_write_text

TASKS = ["emoji", "road signs", "digits", "textile defects", "clip-art"]
PROBES = ["pictograms", "flags"]
# How much of what a task gained is lost per later task, and how far probes and unseen tasks sink.
KEEP = {
    "keeplora++": (0.04, 0.8),
    "keeplora": (0.06, 1.2),
    "lora": (0.24, 3.6),
    "full-ft": (0.19, 3.0),
    "zero-shot": (0, 0),
}


def accuracy_rows(method: str, n: int, probes: int, seed: int) -> tuple[list[list[float]], list[list[float]]]:
    """Rows 0..n of tasks and probes in percent."""
    rng = random.Random(f"{method}-{seed}")
    loss, sink = KEEP.get(method, (0.1, 2.0))
    base = [random.Random(j).uniform(22, 52) for j in range(n)]
    probe_base = [46.8, 19.4, 33.0][:probes]
    gain = [0.0 if method == "zero-shot" else random.Random(j + 50).uniform(25, 45) for j in range(n)]
    rows, probe_rows = [base], [probe_base]
    for i in range(1, n + 1):
        row = []
        for j in range(n):
            learned = base[j] + gain[j] * (1 - loss) ** (i - j - 1) if i > j else None
            value = base[j] - sink * i * 0.4 if learned is None else learned
            row.append(round(min(99, max(2, value + (rng.gauss(0, 0.7) if sink else 0))), 3))
        rows.append(row)
        probe_rows.append(
            [round(max(1, p - sink * i * 0.7 + (rng.gauss(0, 0.5) if sink else 0)), 3) for p in probe_base]
        )
    return rows, probe_rows


def fake_layers(n_done: int, method: str, blocks: int = 12) -> list[dict[str, Any]]:
    if not method.startswith("keeplora"):
        return []
    rng, layers = random.Random(3), []
    for tower, start, depth in (("vision", 0.45, blocks), ("text", 0.12, blocks // 2)):
        for block in range(depth):
            for kind in ("query", "key", "value", "dense"):
                k, used = round(384 * (start + 0.1 * block / depth)), []
                used.append(k)
                for t in range(n_done):
                    k = min(384, k + round(384 * rng.uniform(0.02, 0.09) / (1 + 0.4 * t)))
                    used.append(k)
                scale = 0.2 + 0.8 * block / (depth - 1) if method == "keeplora++" and depth > 1 else 1.0
                layers.append(
                    {
                        "layer": f"{tower}_model.encoder.layer.{block}.attention.{kind}",
                        "tower": tower, "depth": block, "blocks": depth, "in": 384, "out": 384,
                        "scale": scale, "used": used, "rank": [16] * n_done,
                    }
                )  # fmt: skip
    return layers


def make_run(
    root: Path,
    name: str,
    method: str = "keeplora++",
    *,
    seed: int = 0,
    tasks: list[str] | None = None,
    probes: list[str] | None = None,
    done: int | None = None,
    state: str = "finished",
    key: str = "c0ffee",
    variant: str = "text",
    audit: bool = True,
    warnings: list[str] | None = None,
    error: str | None = None,
    blocks: int = 12,
) -> Path:
    """Write a run directory under ``root`` and return it; ``done`` < number of tasks makes a partial one."""
    tasks = TASKS if tasks is None else tasks
    probes = PROBES if probes is None else probes
    done = len(tasks) if done is None else done
    rows, probe_rows = accuracy_rows(method, len(tasks), len(probes), seed)
    rows, probe_rows = rows[: done + 1], probe_rows[: done + 1]
    trains = method != "zero-shot"
    rng = random.Random(seed)
    info, events = [], []
    for task in tasks[:done] if trains else []:
        epochs = []
        for epoch in range(1, 4):
            loss = round(2.4 * 0.5**epoch + rng.uniform(0, 0.1), 4)
            epochs.append({"epoch": epoch, "loss": loss})
            events.append(
                {"event": "epoch", "task": task, "epoch": epoch, "loss": loss, "train_accuracy": 100 - 20 * loss,
                 "lr": 1e-3 / epoch, "seconds": 9.1}
            )  # fmt: skip
        events.append({"event": "task_finished", "task": task})
        seconds = {"statistics": 4.2 if method.startswith("keeplora") else 0.0, "training": 31.5, "evaluation": 8.3}
        info.append(
            {
                "name": task,
                "seconds": seconds,
                "epochs": epochs,
                "best_epoch": None,
                "trained_parameters": 442368,
                "accepted": True,
            }
        )
    layers = fake_layers(done, method, blocks)
    leak = [
        {"layer": layer["layer"], "task": task, "factor_leak": 3.1e-7, "weight_leak": 4.4e-6, "weight_floor": 3.9e-6}
        for layer in layers
        for task in tasks[:done]
    ]
    results = {
        "format": "keeplora-results", "version": 0, "name": name, "method": method, "variant": variant, "model": "embedded",
        "suite": "demo", "seed": seed, "comparison_key": key, "tasks": tasks, "probes": probes, "accuracy": rows,
        "probe_accuracy": probe_rows, "test_counts": {s: 150 + 10 * i for i, s in enumerate([*tasks, *probes])},
        "chance": {s: 100 / (8 + 2 * i) for i, s in enumerate([*tasks, *probes])},
        "metrics": summary(rows, probe_rows if probes else []), "layers": layers, "tasks_info": info,
        "cost": {"seconds": 44.0 * done + 12, "statistics_seconds": 4.2 * done, "training_seconds": 31.5 * done,
                 "evaluation_seconds": 8.3 * (done + 1), "peak_memory_bytes": 1_650_000_000,
                 "trained_parameters": 442368 if trains else 0},
        "audit": {"factor_leak_max": 3.1e-7, "rows": leak} if audit and leak else None, "warnings": warnings or [],
    }  # fmt: skip
    sets = [
        {"name": s, "kind": "task" if i < len(tasks) else "probe", "classes": [f"{s} class {c}" for c in range(8 + 2 * i)],
         "train": 340 if i < len(tasks) else 0, "test": 150 + 10 * i, "fingerprint": f"{i:02x}" * 32,
         "licence": "CC BY 4.0" if i % 2 else "Apache-2.0", "warnings": []}
        for i, s in enumerate([*tasks, *probes])
    ]  # fmt: skip
    path = root / name
    path.mkdir(parents=True)
    atomic_write_json(path / "results.json", results)
    atomic_write_json(path / "data.json", {"tasks": sets})
    status = {"state": state, "tasks_done": done, "error": error, "started": "2026-06-20T10:00:00Z",
              "updated": "2026-06-20T10:05:00Z", "seconds": 232.0}  # fmt: skip
    atomic_write_json(path / "status.json", status)
    environment = {
        "python": "3.11.9", "packages": {"torch": "2.8.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "machine": {"cpu": "x86_64, 2 cores", "threads": 2}, "git": {"commit": "0123abc", "dirty": False},
    }  # fmt: skip
    atomic_write_json(path / "environment.json", environment)
    config = f"method: {method}\nsuite: demo\nseed: {seed}\ntraining:\n  epochs: 3\n  lr: 1.0e-3\ntuner:\n  r: 16\n  alpha: 16\n"
    atomic_write_text(path / "config.yaml", config)
    atomic_write_text(path / "metrics.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    return path
