"""Synthetic run directories of models that answer questions: predictions and samples of the documented format, drawn pictures."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from fake_runs import make_run
from PIL import Image, ImageDraw

from keeplora.evaluation import summary
from keeplora.files import atomic_write_json

SETS = {"counting": "exact", "signs": "exact", "captions": "rouge-l"}
GENERAL = {"general": "exact"}
ITEMS = 40
WORDS = ("one", "two", "three", "four", "five")


def picture(n: int, seed: int, size: int = 112) -> bytes:
    """``n`` discs on a pale ground."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), tuple(rng.randint(215, 250) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(n):
        x, y, r = rng.randint(10, size - 34), rng.randint(10, size - 34), rng.randint(8, 14)
        draw.ellipse((x, y, x + 2 * r, y + 2 * r), fill=tuple(rng.randint(20, 200) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85)
    return buffer.getvalue()


def write_predictions(path: Path, after: int, name: str, rows: list[dict[str, Any]]) -> None:
    file = path / "predictions" / f"after-{after}" / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(name: str, scores: list[float], question: str = "How many discs are there?") -> list[dict[str, Any]]:
    """Lines of one prediction file; the answer tells its own number and score."""
    return [
        {
            "key": f"{name}-{k}", "question": question, "references": [WORDS[k % 5]],
            "prediction": f"answer {k} worth {score:g}", "score": score,
        }
        for k, score in enumerate(scores)
    ]  # fmt: skip


def write_samples(path: Path, name: str, count: int = 12, question: str = "How many discs are there?") -> None:
    entries = []
    for n in range(count):
        place = f"samples/{name}/{n}.webp"
        (path / place).parent.mkdir(parents=True, exist_ok=True)
        (path / place).write_bytes(picture(n % 5 + 1, n))
        entries.append(
            {
                "n": n,
                "key": f"{name}-{n}",
                "question": question,
                "references": [WORDS[n % 5]],
                "picture": place,
                "pictures": 1,
            }
        )
    atomic_write_json(path / "samples" / f"{name}.json", entries)


def make_answers(
    root: Path, name: str, method: str = "keeplora++", *, done: int | None = None, seed: int = 0, **more: Any
) -> Path:
    """A run over `SETS` with `GENERAL` beside it: every answer's score at every moment, the matrix its mean."""
    tasks, probes = list(SETS), list(GENERAL)
    done = len(tasks) if done is None else done
    path = make_run(
        root, name, method, seed=seed, tasks=tasks, probes=probes, done=done, key=more.pop("key", "questions"), **more
    )
    rng = random.Random(f"{method}-{seed}")
    keep = {"keeplora++": 0.95, "lora": 0.6, "zero-shot": 1.0}.get(method, 0.8)
    state = {s: [float(rng.random() < 0.25) for _ in range(ITEMS)] for s in (*tasks, *probes)}
    rows: dict[str, list[list[float]]] = {"task": [], "probe": []}
    for after in range(done + 1):
        for j, one in enumerate(state):
            if after and method != "zero-shot":
                learning = j == after - 1
                for k in range(ITEMS):
                    if learning and rng.random() < 0.8:
                        state[one][k] = round(rng.uniform(0.3, 1), 2) if SETS.get(one) == "rouge-l" else 1.0
                    elif not learning and rng.random() > keep:
                        state[one][k] = 0.0
            write_predictions(path, after, one, rows_of(one, state[one]))
        means = {s: 100 * sum(values) / ITEMS for s, values in state.items()}
        rows["task"].append([means[s] for s in tasks])
        rows["probe"].append([means[s] for s in probes])
    for one in state:
        write_samples(path, one)
    results = json.loads((path / "results.json").read_text())
    results |= {
        "kind": "generation", "accuracy": rows["task"], "probe_accuracy": rows["probe"], "chance": {},
        "metrics": summary(rows["task"], rows["probe"]), "scorers": SETS | GENERAL,
        "components": {"captions": {"rouge-l-plain": 41.25}}, "test_counts": dict.fromkeys(state, ITEMS), "model": "stand-in",
    }  # fmt: skip
    atomic_write_json(path / "results.json", results)
    sets = json.loads((path / "data.json").read_text())["tasks"]
    for entry in sets:
        entry |= {"classes": [], "scorer": (SETS | GENERAL)[entry["name"]], "max_new_tokens": 16, "prompt": None}
    atomic_write_json(path / "data.json", {"tasks": sets})
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        event.pop("train_accuracy", None)  # answers are generated after training
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


__all__ = ["GENERAL", "ITEMS", "SETS", "make_answers", "picture", "rows_of", "write_predictions", "write_samples"]
