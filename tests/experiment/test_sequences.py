"""Which tasks come in which order, among which classes pictures are named, and on what the rows are measured."""

from __future__ import annotations

import itertools

import pytest

from keeplora.errors import ConfigError
from keeplora.experiment import Experiment
from keeplora.experiment.config import load_config
from tests.cli.tiny_world import TASKS, events_of, record_of

# ---- order -----------------------------------------------------------------------------------------------------------


def test_an_order_of_the_suite_by_name_brings_its_preset():
    first = load_config({"suite": "mtil", "method": "keeplora++"})
    second = load_config({"suite": "mtil", "method": "keeplora++", "order": 2})
    assert (first.order_name, first.preset, first.order[0]) == ("1", "mtil", "Aircraft")
    assert (second.order_name, second.preset, second.order[0]) == ("2", "mtil-order-ii", "StanfordCars")
    assert sorted(first.order) == sorted(second.order)
    assert second.training.for_task("Food").epochs == 2
    assert first.training.for_task("Food").epochs == 10
    assert str(second.output_path) == "runs/mtil-keeplora++-order2-seed42"
    # What is written down opens as the same thing.
    again = load_config(second.resolved())
    assert (again.order, again.order_name, again.training) == (second.order, "2", second.training)


def test_a_shuffled_order_is_the_seed_s(world):
    orders = {s: load_config(world.config(order=s)).order for s in (f"shuffle-{n}" for n in range(8))}
    assert orders["shuffle-1"] == load_config(world.config(order="shuffle-1")).order
    assert all(sorted(order) == sorted(TASKS) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 2


def test_unknown_orders_are_refused(world):
    with pytest.raises(ConfigError, match=r"unknown order '3'.*shuffle-SEED"):
        load_config({"suite": "mtil", "method": "lora", "order": 3})
    with pytest.raises(ConfigError, match="unknown order 'shufle-1'; did you mean 'shuffle-SEED'"):
        load_config(world.config(order="shufle-1"))


def test_the_first_tasks_alone(world):
    _, results = world.run(method="lora", order="shuffle-2", first_tasks=2)
    assert results["tasks"] == load_config(world.config(order="shuffle-2")).order[:2]
    assert len(results["accuracy"]) == 3
    assert results["order"] == "shuffle-2"
    with pytest.raises(ConfigError, match="first_tasks is 4, but there are 3 tasks"):
        load_config(world.config(first_tasks=4))


# ---- classes into tasks -----------------------------------------------------------------------------------------------


def test_one_source_becomes_a_sequence_of_its_classes(world, tmp_path):
    for kind in ("train", "test"):
        for task in ("paint", "stripes"):
            for folder in (world.root / task / kind).iterdir():
                (tmp_path / "all" / kind).mkdir(parents=True, exist_ok=True)
                (tmp_path / "all" / kind / folder.name).symlink_to(folder)
    spec = {
        "name": "all",
        "source": "folder",
        "path": str(tmp_path / "all"),
        "split_classes": {"tasks": 2, "seed": 1993},
    }
    config = load_config(world.config(tasks=[spec], probes=[]))
    assert [t["name"] for t in config.tasks] == ["all-1", "all-2"]
    assert load_config(config.resolved()).tasks == config.tasks
    values = world.config(tasks=[spec], probes=[], candidates="seen", method="lora", output=str(tmp_path / "run"))
    results = Experiment(values, quiet=True).run()
    classes = [record_of(tmp_path / "run", i)["info"]["classes"] for i in (1, 2)]
    assert [len(c) for c in classes] == [3, 2]
    assert sorted(classes[0] + classes[1]) == ["blue", "flat", "green", "red", "tall"]
    assert results["candidates"] == "seen"


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({"tasks": 1}, "split_classes.tasks is 1"),
        ({"parts": 2}, "must be {tasks: T}"),
        ({"tasks": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_a_split_that_is_none_is_refused(world, split, told):
    with pytest.raises(ConfigError, match=f"task 'paint'.*{told}"):
        load_config(
            world.config(tasks=[{"name": "paint", "source": "folder", "path": "paint", "split_classes": split}])
        )


def test_a_method_that_needs_a_reference_set_says_so_before_it_starts(world):
    with pytest.raises(ConfigError, match=r"'zscl' needs a reference set.*reference:"):
        Experiment(world.config(method="zscl")).setup  # noqa: B018
    _, results = world.run(method="zscl", reference={"name": "other", "source": "folder", "path": "grey"})
    assert len(results["accuracy"]) == 4


# ---- candidates -------------------------------------------------------------------------------------------------------


def test_more_candidates_never_help(world):
    """The same frozen model: a picture that is named right among more candidates is right among fewer."""
    rows = {c: world.run(method="zero-shot", candidates=c)[1] for c in ("own", "seen", "all")}
    own, seen, every = (rows[c]["accuracy"] for c in ("own", "seen", "all"))
    assert all(a >= b for x, y in zip(own, every) for a, b in zip(x, y))
    assert own != every
    assert len({tuple(row) for row in every}) == 1  # who competes does not change with time
    assert seen[-1] == every[-1]  # in the end all are seen
    assert seen[0] == own[0]  # in the beginning none is
    assert all(a >= b for later, earlier in itertools.pairwise(seen) for a, b in zip(later, earlier))
    assert len({rows[c]["comparison_key"] for c in rows}) == 3
    assert rows["own"]["chance"]["paint"] == pytest.approx(100 / 3)
    assert rows["all"]["chance"]["paint"] == pytest.approx(100 / 7)


def test_heads_need_to_know_the_task(world):
    with pytest.raises(ConfigError, match="'keeplora-cls' needs `candidates: own`"):
        load_config(world.config(method="keeplora-cls", candidates="all"))
    with pytest.raises(ConfigError, match="'oracle' must be told the task of a picture"):
        Experiment(world.config(method="oracle", candidates="all")).setup  # noqa: B018


# ---- validation in place of test ----------------------------------------------------------------------------------------


def test_rows_on_validation_pictures_open_no_test_picture(world, tmp_path, monkeypatch):
    from keeplora.data.sets import PictureSet

    opened: list[str] = []
    picture = PictureSet.picture

    def noting(self, index):
        opened.append(self.keys[index])
        return picture(self, index)

    monkeypatch.setattr(PictureSet, "picture", noting)
    values = world.config(
        method="lora", evaluate_on="validation", validation=0.3, first_tasks=2, output=str(tmp_path / "run")
    )
    results = Experiment(values, quiet=True).run()
    assert results["test_counts"] == {"paint": 9, "stripes": 6}  # three tenths of ten per class
    assert results["probes"] == []
    assert results["evaluate_on"] == "validation"
    assert opened
    assert all(key.startswith("train/") for key in opened)


def test_validation_rows_need_validation_data(world):
    with pytest.raises(ConfigError, match="evaluate_on needs validation data"):
        load_config(world.config(evaluate_on="validation"))


# ---- joint training, oracle ----------------------------------------------------------------------------------------------


def test_joint_training_has_one_moment(world):
    path, results = world.run(method="joint")
    assert results["accuracy"][1] == results["accuracy"][2] == [None] * 3
    assert results["probe_accuracy"][1] == [None]
    assert all(value is not None for value in results["accuracy"][3])
    assert results["metrics"]["transfer"] is results["metrics"]["average"] is results["metrics"]["forgetting"] is None
    assert [record_of(path, i)["info"].get("deferred") for i in (1, 2, 3)] == [True, True, None]
    epochs = events_of(path, "epoch")
    assert {e["task"] for e in epochs} == {TASKS[-1]}
    assert results["metrics"]["last"] > sum(results["accuracy"][0]) / 3 + 10
    assert (path / "report.html").is_file()


def test_the_oracle_keeps_every_task_at_its_own_best(world):
    _, results = world.run(method="oracle")
    rows = results["accuracy"]
    for j in range(3):
        assert len({rows[i][j] for i in range(j + 1, 4)}) == 1  # from when it is learned on
        assert len({rows[i][j] for i in range(j + 1)}) == 1  # before: the untouched model
    assert results["metrics"]["forgetting"] == 0
    assert len({tuple(row) for row in results["probe_accuracy"]}) == 1
    assert results["metrics"]["last"] > sum(rows[0]) / 3 + 10
