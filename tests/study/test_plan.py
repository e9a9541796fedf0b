"""A study's plan: what people may write, what it turns into, and one sentence for everything that is wrong."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from keeplora.errors import ConfigError, KeepLoraError
from keeplora.experiment.config import parse_overrides
from keeplora.study import plan_values as module
from keeplora.study.plan import CellKey, make_plan, parse_orders, parse_seeds, read_per_method, read_study
from keeplora.study.store import StudyStore


def experiment(folder: Path) -> Path:
    """An experiment whose configuration is whole; its pictures are never opened here."""
    path = folder / "e.yaml"
    path.write_text(
        "model: clip\nmethod: lora\ntasks:\n  - {name: b, source: folder, path: b}\n  - {name: a, source: folder, path: a}\n"
        "training: {epochs: 2}\n"
    )
    return path


def plan(folder: Path, **values):
    return make_plan({"experiment": str(experiment(folder)), "methods": "lora,keeplora++", **values})


def config_by_command(made, cell: CellKey):
    """The configuration that the command line of a cell leads to."""
    words = made.command(cell, 3)
    assert words[0] == "run"
    assert "--quiet" in words
    options = parse_overrides([words[i + 1] for i, word in enumerate(words) if word == "-o"])
    plain = {key: words[words.index(f"--{key}") + 1] for key in ("method", "seed", "output")}
    from keeplora.experiment.config import load_config

    source = words[1] if words[1] != "--suite" else {"suite": words[2], "method": cell.method}
    return load_config(source, {**options, **plain, "seed": int(plain["seed"])})


def test_cells_go_seed_by_seed(tmp_path: Path) -> None:
    made = plan(tmp_path, seeds="0-1", orders="shuffle-1,shuffle-3")
    assert list(made.cells())[:5] == [
        ("lora", "shuffle-1", 0), ("keeplora++", "shuffle-1", 0), ("lora", "shuffle-3", 0), ("keeplora++", "shuffle-3", 0),
        ("lora", "shuffle-1", 1),
    ]  # fmt: skip
    assert len(list(made.cells())) == 8
    assert CellKey("keeplora++", "my order", 3).folder == "cells/keeplora++/order-my-order/seed-3"


def test_command_carries_every_setting(tmp_path: Path) -> None:
    made = plan(
        tmp_path, orders={"mine": ["a", "b"], "listed": None}, output=str(tmp_path / "out"),
        set={"training": {"batch_size": 7}, "tuner.r": 2, "training.epochs": {"default": 4, "a": 1}},
        per_method={"keeplora++": {"training": {"learning_rate": 3e-5, "batch_size": 99}, "tuner": {"gamma": 0.4}}},
    )  # fmt: skip
    config = config_by_command(made, CellKey("keeplora++", "mine", 5))
    assert (config.method, config.seed, config.threads) == ("keeplora++", 5, 3)
    assert config.order == ["a", "b"]
    assert config.output == str(tmp_path / "out" / "cells/keeplora++/order-mine/seed-5")
    # The study's own settings win over the method's.
    assert (config.training.learning_rate, config.training.batch_size, config.tuner.gamma) == (3e-5, 7, 0.4)
    assert (config.training.for_task("a").epochs, config.training.for_task("b").epochs, config.tuner.r) == (1, 4, 2)
    other = config_by_command(made, CellKey("lora", "listed", 0))
    assert other.order is None
    assert other.training.learning_rate != 3e-5
    made.check()


def test_suites_orders_keep_their_names() -> None:
    made = make_plan({"suite": "demo-small", "methods": ["lora"]})
    assert set(made.orders) in ({"1"}, {"listed"})  # named where the suite names its first order
    assert make_plan({"suite": "demo-small", "methods": ["lora"], "orders": [1, "shuffle-7"]}).orders == {
        "1": "1", "shuffle-7": "shuffle-7"
    }  # fmt: skip


def test_all_is_every_method() -> None:
    from keeplora.methods import method_names

    assert list(make_plan({"suite": "demo-small", "methods": "all"}).methods) == method_names()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"methods": "lora,lorra"}, "methods holds 'lorra', which is no method; did you mean 'lora'?"),
        ({"methods": []}, "methods is empty"),
        ({"methods": 3}, "methods is 3, but must be a list of methods"),
        ({"seeds": "0-"}, "seeds holds '0-', but must be a list of whole numbers, or a range such as 0-4"),
        ({"seeds": -1}, "seeds holds -1, but a seed is a whole number of at least 0"),
        ({"seeds": "4-1"}, "from the smaller to the larger"),
        ({"seeds": 1.5}, "seeds is 1.5, but must be"),
        ({"seeds": [True]}, "seeds holds True"),
        (
            {"orders": [["a", "b"]]},
            "orders holds a list of tasks without a label; write orders: {LABEL: [first, second]}",
        ),
        ({"orders": {"x": 1.5}}, "orders.x is 1.5, but must be an order's name or a list of task names"),
        ({"orders": {"a b": "1", "a-b": "2"}}, "orders 'a b' and 'a-b' would share the folder order-a-b; rename one"),
        ({"jobs": 0}, "jobs is 0, but must be a whole number of at least 1"),
        ({"jobs": True}, "jobs is True, but must be a whole number of at least 1"),
        ({"keep_ledgers": "no"}, "keep_ledgers is 'no', but must be true or false"),
        ({"against": "ewc"}, "against: 'ewc' is not among the methods"),
        ({"set": {"seed": 3}}, "set: seed is the study's own; use seeds: in place of it"),
        ({"set": {"threads": 3}}, "set: threads is the study's own; use threads: in place of it"),
        ({"set": 3}, "set is 3, but must be a mapping of experiment keys"),
        ({"sedes": [1]}, "unknown key 'sedes'; did you mean 'seeds'?"),
        ({"suite": "demo-small"}, "give either a suite (suite: demo-small) or an experiment's file"),
        ({"per_method": {"lorra": {}}}, "per_method: unknown method 'lorra'; did you mean 'lora'?"),
        ({"per_method": {"lora": {"trianing": {}}}}, "unknown key 'trianing' in lora; did you mean 'training'?"),
        ({"per_method": {"lora": 3}}, "lora is 3, but must be a mapping with training: or tuner:"),
        ({"variants": 3}, "variants is 3, but must be a mapping from names to method: and the settings"),
        (
            {"variants": {"lora": {"method": "ewc"}}},
            "variants.lora: 'lora' is a method's own name; give the variant another",
        ),
        (
            {"variants": {"a/b": {"method": "ewc"}}},
            "variants holds the name 'a/b'; a name is text without commas and slashes",
        ),
        ({"variants": {"a b": {"method": "ewc"}, "a-b": {"method": "ewc"}}}, "would share the folder a-b; rename one"),
        ({"variants": {"x": {"tuner": {"r": 2}}}}, "variants.x is {'tuner': {'r': 2}}, but must hold method:"),
        ({"variants": {"x": {"method": "lorra"}}}, "variants.x: unknown method 'lorra'; did you mean 'lora'?"),
        ({"variants": {"x": {"method": "lora", "seed": 3}}}, "variants.x: seed is the study's own; use seeds:"),
    ],
)
def test_wrong_values_are_one_sentence_each(tmp_path: Path, values: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tmp_path, **values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan({"methods": "lorra", "seeds": "x", "jobs": 0})
    lines = str(caught.value).splitlines()
    assert (lines[0], len(lines)) == ("4 problems in the study:", 5)  # no suite either


def test_methods_are_named_where_they_are_missing() -> None:
    with pytest.raises(ConfigError, match=r"methods is missing; give some of zero-shot, .*keeplora\+\+.*, or all"):
        make_plan({"suite": "demo-small"})


def test_what_cannot_run_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.epochs is -3"):
        plan(tmp_path, set={"training.epochs": -3}).check()
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        plan(tmp_path, per_method={"lora": {"training": {"epoch": 3}}}).check()
    with pytest.raises(ConfigError, match="9"):
        plan(tmp_path, orders="9").check()


def test_two_labels_for_one_sequence_are_refused(tmp_path: Path) -> None:
    made = plan(tmp_path, orders={"listed": None, "mine": ["b", "a"], "other": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"orders 'listed' and 'mine' are the same sequence \(b, a\); keep one"):
        made.check()
    plan(tmp_path, orders={"listed": None, "other": ["a", "b"]}).check()


def test_study_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment(tmp_path)
    (tmp_path / "tuned.yaml").write_text(
        "search: {trials: 3}\nper_method:\n  lora: {training: {learning_rate: 2e-3}}\n"
    )
    file = tmp_path / "study.yaml"
    file.write_text(
        "experiment: e.yaml\nmethods: [lora, keeplora++]\nseeds: 0-2\norders: [shuffle-1]\nper_method: tuned.yaml\n"
        "set: {training: {epochs: 1}}\noutput: out\nagainst: lora\nkeep_ledgers: false\njobs: 2\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # its paths start at its folder
    values, _ = read_study(file)
    made = make_plan(values)
    assert (made.seeds, made.jobs, made.keep_ledgers, made.against) == ((0, 1, 2), 2, False, "lora")
    assert made.output == tmp_path / "out"
    assert made.config("lora", "shuffle-1").training.learning_rate == 2e-3
    assert made.config("keeplora++", "shuffle-1").training.learning_rate == 1e-3
    made.check()


def test_study_file_with_unknown_keys_names_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("suite: demo-small\nmethds: [lora]\n")
    with pytest.raises(ConfigError) as caught:
        read_study(file)
    assert str(caught.value).startswith(f"{file}, line 2: unknown key 'methds'; did you mean 'methods'?")


def test_an_experiment_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is an experiment, not a study; write a study with `experiment: FILE`"):
        read_study(experiment(tmp_path))


def test_per_method_file_without_the_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("lora: {training: {epochs: 1}}\n")
    with pytest.raises(ConfigError, match="no `per_method:` in it"):
        read_per_method("x.yaml", tmp_path)


def test_a_plan_comes_back_from_its_folder(tmp_path: Path) -> None:
    made = plan(
        tmp_path, seeds="0-1", orders={"mine": ["a", "b"]}, set={"tuner.r": 2}, data=str(tmp_path), output=str(tmp_path / "out"),
        per_method={"lora": {"training": {"learning_rate": 0.5}}}, against="lora", keep_ledgers=False,
    )  # fmt: skip
    store = StudyStore(made.output)
    store.join(made)
    store.save()
    again = make_plan(StudyStore(made.output).load().plan_values())
    assert again == made
    assert make_plan({**StudyStore(made.output).load().plan_values(), "seeds": "0-4"}).seeds == (0, 1, 2, 3, 4)


def test_a_variant_is_its_method_with_settings_of_its_own(tmp_path: Path) -> None:
    """Over the method's own and the study's settings; it stands beside the method, and comes back from the folder."""
    made = plan(
        tmp_path, methods="keeplora++,narrow", output=str(tmp_path / "out"), set={"tuner.r": 8, "training.epochs": 3},
        per_method={"keeplora++": {"training": {"learning_rate": 0.5}, "tuner": {"gamma": 0.4}}},
        variants={"narrow": {"method": "keeplora++", "tuner": {"r": 4, "gamma": 1}}, "unused": {"method": "lora"}},
    )  # fmt: skip
    assert [cell.folder for cell in made.cells()] == [
        "cells/keeplora++/order-listed/seed-0",
        "cells/narrow/order-listed/seed-0",
    ]
    narrow, whole = (config_by_command(made, CellKey(name, "listed", 0)) for name in ("narrow", "keeplora++"))
    assert (narrow.method, narrow.tuner.r, narrow.tuner.gamma) == ("keeplora++", 4, 1)
    assert (whole.method, whole.tuner.r, whole.tuner.gamma) == ("keeplora++", 8, 0.4)
    assert narrow.training.learning_rate == whole.training.learning_rate == 0.5
    assert made.config("narrow", "listed").tuner.r == 4
    store = StudyStore(made.output)
    store.join(made)
    store.save()
    assert make_plan(StudyStore(made.output).load().plan_values()) == made
    other = make_plan({**StudyStore(made.output).load().plan_values(), "variants": {"narrow": {"method": "lora"}}})
    with pytest.raises(KeepLoraError, match=r"variant narrow = .*tuner\.r"):
        StudyStore(made.output).load().join(other)


def test_variants_alone_are_the_methods(tmp_path: Path) -> None:
    values = {
        "experiment": str(experiment(tmp_path)),
        "variants": {"a": {"method": "lora"}, "b": {"method": "ewc"}},
        "orders": "shuffle-1",
    }
    assert make_plan({**values, "against": "a"}).methods == ("a", "b")
    with pytest.raises(ConfigError, match="methods holds 'c', which is no method"):
        make_plan({**values, "methods": "a,c"})
    broken = make_plan({**values, "variants": {"a": {"method": "lora", "tuner": {"gama": 1}}}})
    with pytest.raises(ConfigError, match=r"^variants\.a: unknown key 'gama' in tuner; did you mean 'gamma'"):
        broken.check()


def test_the_studies_of_this_repository_can_be_run() -> None:
    from tests.docs.documents import ROOT

    files = sorted((ROOT / "studies").glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        made = make_plan(read_study(file)[0])
        made.check()
        assert made.against in made.methods
        assert made.keep_ledgers is False


def test_every_variants_targets_are_in_the_model_that_it_adapts(tmp_path: Path) -> None:
    """The suites' model, tiny: its modules have the same names."""
    from keeplora import KeepLoraConfig
    from keeplora.models import load_model
    from keeplora.tuner.targets import resolve_targets
    from tests.docs.documents import ROOT
    from tests.models.tiny import make_tiny

    model, found = load_model(str(make_tiny("embedded", tmp_path / "model"))).model, {}
    for file in sorted((ROOT / "studies").glob("*.yaml")):
        for name, variant in read_study(file)[0].get("variants", {}).items():
            if (modules := variant.get("tuner", {}).get("target_modules")) is not None:
                found[name] = {t.name for t in resolve_targets(model, KeepLoraConfig(target_modules=modules))}
    attention = found["vision tower"] | found["text tower"]
    assert not found["vision tower"] & found["text tower"]
    assert found["q and v"] < attention < found["all linears"]
    assert len(found["all linears"]) * 2 == len(attention) * 3  # and two of each block's MLP


def test_parsing_of_what_yaml_gives() -> None:
    assert parse_seeds([0, "2-3", 2]) == [0, 2, 3]
    assert parse_orders(2) == {"2": "2"}
    assert parse_orders([1, "shuffle-3,2"]) == {"1": "1", "shuffle-3": "shuffle-3", "2": "2"}


def test_docstring_examples() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_documented_study_is_one(tmp_path: Path) -> None:
    """docs/comparing.md: its STUDY.yaml runs as it stands, and its tables name every key and option."""
    import inspect

    from keeplora.cli.compare import compare
    from tests.docs.documents import ROOT, blocks

    page = ROOT / "docs" / "comparing.md"
    (block,) = [b for b in blocks(page) if b.file == "study.yaml"]
    (tmp_path / "study.yaml").write_text(block.text, encoding="utf-8")
    made = make_plan(read_study(tmp_path / "study.yaml")[0])
    assert list(made.orders) == ["1", "2", "shuffle-7"]
    assert len(list(made.cells())) == 36
    made.check()
    text = page.read_text(encoding="utf-8")
    assert all(f"`{key}`" in text for key in module.KEYS)
    flags = {name.strip("_").replace("_", "-") for name in inspect.signature(compare).parameters} - {
        "paths",
        "set",
        "quiet",
    }
    assert [flag for flag in flags - {"keep-ledgers"} if f"--{flag}" not in text] == []
