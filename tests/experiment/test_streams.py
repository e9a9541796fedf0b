"""Runs that learn from streams: the numbers of runs on the same samples in memory, and resumed runs bit for bit."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from keeplora.data import load_task
from keeplora.data.streams import ROWS
from keeplora.errors import ConfigError, DataError, KeepLoraError
from keeplora.experiment import Experiment
from keeplora.experiment import runner as runner_module
from keeplora.experiment.order import ShuffledBatches
from keeplora.experiment.plan import make_plan
from keeplora.experiment.several import place
from keeplora.experiment.streams import StreamOrder
from tests.cli.tiny_world import ledger_tensors, record_of, results_of, same_tensors
from tests.experiment.deaths import dies
from tests.experiment.generation_world import COLOURS, make_world

SHARDS = (9, 8, 13)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(runner_module, "render_report", lambda path: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def parquet(world: Any, name: str, folder: Path, shards: tuple[int, ...], mixed: bool = True) -> None:
    """A task of the tiny world as parquet files, its training pictures mixed over the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        root = world.root / name / split
        classes = sorted(p.name for p in root.iterdir())
        files = [
            (f, c) for i in range(10) for c, label in enumerate(classes) if (f := root / label / f"{i}.png").is_file()
        ]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
        rows = [{"image": {"bytes": f.read_bytes(), "path": None}, "label": c} for f, c in files]
        start = 0
        for n, count in enumerate(shards if split == "train" else (len(rows),)):
            part = datasets.Dataset.from_list(rows[start : start + count], features=features)
            part.to_parquet(folder / f"{split}-{n}.parquet")
            start += count


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="RANK=1 and WORLD_SIZE=1"):
        place()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert place() == (1, 4)


@pytest.fixture(scope="module")
def streamed(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("streamed")
    parquet(world, "paint", root / "paint", SHARDS)
    parquet(world, "stripes", root / "stripes", (10, 10))
    return root


def config(world: Any, streamed: Path, path: Path, buffer: int = 16, **changes: Any) -> dict[str, Any]:
    tasks = [
        {
            "name": name,
            "source": "datasets",
            "path": str(streamed / name),
            "streaming": {"samples": n, "buffer": buffer},
        }
        for name, n in (("paint", 30), ("stripes", 20))
    ]
    training = {"epochs": 2, "checkpoint_steps": 2, "checkpoint_minutes": None, **changes.pop("training", {})}
    return world.config(**{"tasks": tasks, "probes": [], "output": str(path), "training": training, **changes})


def run(settings: dict[str, Any]) -> dict[str, Any]:
    return Experiment(settings, quiet=True).run()


# ---- the order --------------------------------------------------------------------------------------------------------


def stream_of(streamed: Path, **streaming: Any) -> Any:
    spec = {
        "name": "paint",
        "source": "datasets",
        "path": "paint",
        "streaming": {"samples": 30, "buffer": 16, **streaming},
    }
    return load_task(spec, streamed).train


def numbers(batches: Any) -> list[list[int]]:
    return [[sample.number for sample in batch] for batch in batches]


def test_passes_bring_every_sample_once_in_another_order_each(streamed):
    stream = stream_of(streamed)
    order = StreamOrder(stream, 4, seed=5)
    first, second = numbers(order), numbers(order)
    assert len(order) == len(first) == 8
    assert [len(batch) for batch in first] == [4] * 7 + [2]
    everything = sorted(shard * ROWS + row for shard, count in enumerate(SHARDS) for row in range(count))
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second)) == everything
    assert first != second
    assert numbers(StreamOrder(stream, 4, seed=5)) == first
    assert numbers(StreamOrder(stream, 4, seed=6)) != first
    plain = StreamOrder(stream_of(streamed, buffer=0), 4, seed=5)
    assert list(chain.from_iterable(numbers(plain))) == everything


@pytest.mark.parametrize("buffer", [0, 1, 9, 16, 1000])
def test_an_order_is_entered_at_any_batch(streamed, buffer):
    stream = stream_of(streamed, buffer=buffer)
    whole = StreamOrder(stream, 4, seed=5)
    list(whole)
    expected, places = [], []
    for batch in numbers(whole):
        expected.append(batch)
        places.append(json.loads(json.dumps(whole.position(len(expected)))))
    for behind in range(9):
        for position in (places[behind - 1] if behind else None, None):
            again = StreamOrder(stream, 4, seed=5)
            again.fast_forward(1, behind, position)
            assert numbers(again) == expected[behind:]
    again.fast_forward(1, 8, places[-1])
    assert numbers(again) == []


def test_with_a_position_what_is_behind_is_not_read(streamed, monkeypatch):
    stream = stream_of(streamed)
    order = StreamOrder(stream, 4, seed=5)
    batches = iter(order)
    for _ in range(5):
        next(batches)
    position = order.position(5)
    read: list[int] = []
    make = stream.make
    monkeypatch.setattr(stream, "make", lambda *args: read.append(1) or make(*args))
    again = StreamOrder(stream, 4, seed=5)
    again.fast_forward(0, 5, position)
    assert numbers(again) == numbers(batches)
    assert len(read) == 14  # the second block; the first is not read again


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_batches_of_all_ranks_are_those_of_one_process(streamed, world_size):
    stream = stream_of(streamed)
    whole = numbers(StreamOrder(stream, 6, seed=5))
    parts = [numbers(StreamOrder(stream, 6, seed=5, rank=r, world=world_size)) for r in range(world_size)]
    for i, batch in enumerate(whole):
        assert sorted(batch) == sorted(n for part in parts for n in part[i])
    sharded = stream_of(streamed, split_by="shards", samples=24)
    parts = [numbers(StreamOrder(sharded, 6, seed=5, rank=r, world=3)) for r in range(3)]
    assert [[len(b) for b in part] for part in parts] == [[2] * 4] * 3
    shards = [{n // ROWS for batch in part for n in batch} for part in parts]
    assert sorted(map(sorted, shards)) == [[0], [1], [2]]


def test_a_stream_that_is_shorter_than_told_is_named(streamed):
    with pytest.raises(
        DataError, match=r"ends after 30 samples, and one pass is to have 31; set `streaming: \{samples: 30\}`"
    ):
        list(StreamOrder(stream_of(streamed, samples=31), 4, seed=5))


# ---- whole runs -------------------------------------------------------------------------------------------------------


def test_a_streamed_run_gives_the_factors_of_a_run_in_memory(world, streamed, tmp_path, monkeypatch):
    """Both see the samples in the files' order; the memory-mapped set is told to keep it."""
    monkeypatch.setattr(
        ShuffledBatches,
        "_draw",
        lambda self: [list(range(self.n))[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)],
    )
    one = run(config(world, streamed, tmp_path / "stream", buffer=0))
    tasks = [{"name": name, "source": "datasets", "path": str(streamed / name)} for name in ("paint", "stripes")]
    other = run(config(world, streamed, tmp_path / "map", tasks=tasks))
    assert one["accuracy"] == other["accuracy"]
    assert same_tensors(ledger_tensors(tmp_path / "stream"), ledger_tensors(tmp_path / "map"))
    assert [e["loss"] for e in one["tasks_info"][0]["epochs"]] == [e["loss"] for e in other["tasks_info"][0]["epochs"]]


def test_caps_of_the_statistics_are_exact_and_workers_change_nothing(world, streamed, tmp_path):
    capped = {"tuner": {"gradient_samples": 5, "feature_samples": 0.5}}
    run(config(world, streamed, tmp_path / "a", **capped))
    run(config(world, streamed, tmp_path / "b", **capped, training={"workers": 2}))
    run(config(world, streamed, tmp_path / "all"))
    a, b, all_ = (ledger_tensors(tmp_path / name) for name in ("a", "b", "all"))
    assert same_tensors(a, b)
    assert not same_tensors(a, all_)
    assert record_of(tmp_path / "a", 1)["info"]["trained_parameters"] > 0


@pytest.mark.parametrize(
    ("method", "step", "workers"), [("keeplora++", 8 + 3, 0), ("keeplora++-cls", 5, 2), ("joint", 9, 0)]
)
def test_a_killed_run_goes_on_bit_for_bit(world, streamed, tmp_path, method, step, workers):
    changes = {"method": method, "training": {"workers": workers, "batch_size": 8, "epochs": 2}}
    run(config(world, streamed, tmp_path / "straight", **changes))
    path = tmp_path / "killed"
    dies(config(world, streamed, path, **changes), path, step, "kill")
    (kept,) = (path / "checkpoint").glob("*/state.json")
    assert json.loads(kept.read_text())["loop"]["position"] is not None
    Experiment.resume(path, quiet=True)
    one, other = results_of(path), results_of(tmp_path / "straight")
    assert one["accuracy"] == other["accuracy"]
    assert same_tensors(ledger_tensors(path), ledger_tensors(tmp_path / "straight"))


def test_a_stream_that_changed_is_not_gone_on_with(world, streamed, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(streamed, root)
    settings = config(world, root, tmp_path / "run")
    run({**settings, "first_tasks": 1})
    (root / "paint/train-1.parquet").unlink()
    with pytest.raises(KeepLoraError, match=r"of paint have changed since the run began"):
        Experiment.resume(tmp_path / "run", quiet=True)


def test_a_share_for_validation_is_refused_and_a_split_is_taken(world, streamed, tmp_path):
    with pytest.raises(ConfigError, match=r"`validation: 0.2` would cut a stream"):
        run(config(world, streamed, tmp_path / "a", validation=0.2))


def test_a_plan_times_a_stream(world, streamed, tmp_path):
    plan = make_plan(Experiment(config(world, streamed, tmp_path / "a"), quiet=True).setup)
    assert [row["train"] for row in plan.tasks] == [30, 20]
    assert plan.total_seconds > 0


# ---- questions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A tiny generative model, and its first task as JSON lines beside the pictures."""
    root = tmp_path_factory.mktemp("questions")
    settings = make_world(root)
    folder = root / "colours"
    for split in ("train", "test"):
        entries = json.loads((folder / f"{split}.json").read_text())
        lines = [
            json.dumps({"id": e["id"], "image": f"pictures/{e['image']}", "conversations": e["conversations"]})
            for e in entries
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.json").rename(folder / f"was-{split}")
    assert len(COLOURS) == 4
    return {**settings, "probes": []}


def asked(questions: dict[str, Any], path: Path, **streaming: Any) -> dict[str, Any]:
    spec = {"name": "colours", "source": "vqa-datasets", "path": "colours", "scorer": "exact", "max_new_tokens": 4}
    if streaming:
        spec["streaming"] = streaming
    training = {**questions["training"], "checkpoint_steps": 2, "checkpoint_minutes": None, "micro_batch": 2}
    return {**questions, "tasks": [spec], "output": str(path), "training": training}


def test_streamed_questions_give_the_factors_of_those_in_memory(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ShuffledBatches,
        "_draw",
        lambda self: [list(range(self.n))[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)],
    )
    for name, streaming in (("stream", {"samples": 12, "buffer": 0}), ("map", {})):
        settings = asked(questions, tmp_path / name, **streaming)
        settings["training"] |= {"group_by_length": False}
        run(settings)
    one, other = (ledger_tensors(tmp_path / name) for name in ("stream", "map"))
    assert same_tensors(one, other)
    assert results_of(tmp_path / "stream")["accuracy"] == results_of(tmp_path / "map")["accuracy"]
    answers = [
        (tmp_path / name / "predictions/after-1/colours.jsonl").read_text().count("\n") for name in ("stream", "map")
    ]
    assert answers == [6, 6]


def test_a_killed_run_of_streamed_questions_goes_on_bit_for_bit(questions, tmp_path):
    streaming = {"samples": 12, "buffer": 8}
    run(asked(questions, tmp_path / "straight", **streaming))
    path = tmp_path / "killed"
    dies(asked(questions, path, **streaming), path, 5, "kill")
    Experiment.resume(path, quiet=True)
    assert same_tensors(ledger_tensors(path), ledger_tensors(tmp_path / "straight"))
    assert torch.isfinite(next(iter(ledger_tensors(path).values()))).all()
