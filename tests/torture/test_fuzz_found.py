"""What fuzzing found, one test each, by the sentence that it gets now."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from keeplora.data import load_task
from keeplora.data.pack import check_columns
from keeplora.errors import ConfigError, DataError, KeepLoraError, LedgerError, did_you_mean
from keeplora.evaluation.judges.cache import JudgementCache
from keeplora.experiment.config import load_config, parse_overrides
from keeplora.files import expand, read_regular, sha256_file
from keeplora.json_text import parse_json
from keeplora.models import load_model
from keeplora.study.store import StudyStore
from keeplora.tuner.persistence import open_ledger
from keeplora.yaml_text import parse_yaml, read_yaml
from tests.cli.tiny_world import World, the_world
from tests.torture.fuzz_all import make_study
from tests.torture.fuzz_damage import SCRIPT, Sealed, change_tensors, pickle_canary
from tests.torture.fuzz_folders import scripted
from tests.torture.fuzz_harness import Answer, memory_limit, run_here, time_limit
from tests.torture.fuzz_models import code_canary, plant_code


@pytest.fixture(scope="module")
def fuzz_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return the_world(tmp_path_factory)


def refused(answer: Answer, words: str) -> None:
    assert answer.fault is None, answer
    assert answer.code == 1, answer
    assert words in answer.err.splitlines()[-1], answer.err


# --- YAML ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: " + "9" * 5000, "a number of 5,000 digits"),
        ("seed: !!int x", "line 1, column 7: 'x' cannot be read as !!int"),
        ("seed: !!float x", "cannot be read as !!float"),
        ("seed: !!bool x", "cannot be read as !!bool"),
        ("seed: !!timestamp x", "the tag !!timestamp is not for configurations"),
        ("seed: !!set {a}", "the tag !!set is not for configurations"),
        ("seed: !!python/object/apply:os.system ['true']", "the tag !!python/object/apply:os.system is not"),
        ('name: "\\ud83d"', "half of a character"),
        ('"\\ud83d": 1', "half of a character"),
        ("? [a, b]\n: 1", "a list or mapping as a key"),
        ("a: " + "[" * 200 + "]" * 200, "nested more than 60 deep"),
        ("a: &a [*a]", "an anchor that contains itself"),
    ],
)
def test_yaml_that_no_configuration_needs(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^e.yaml, line 1, column ") as caught:
        parse_yaml(text, "e.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("last", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_of_aliases_do_not_grow_without_end(last: str) -> None:
    first = "[x, x]" if last.startswith("[") else "{x: 1}"
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {last.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 12)]
    with time_limit(30), pytest.raises(ConfigError, match="more than 100,000 values"):
        parse_yaml("\n".join(lines), "e.yaml")


def test_a_pipe_a_device_and_a_huge_file_are_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with open(tmp_path / "huge.yaml", "wb") as handle:
        handle.truncate(1 << 40)
    with time_limit(10):
        for file, words in (
            (tmp_path / "pipe.yaml", "not an ordinary file"), ("/dev/zero", "not an ordinary file"),
            (tmp_path / "huge.yaml", "more than 4,194,304 bytes"), ("a\0b.yaml", "not a file's name"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=words):
                read_yaml(file)


def test_the_home_of_nobody() -> None:
    with pytest.raises(KeepLoraError, match=r"~nobody-there/e.yaml: there is no such user's home"):
        load_config("~nobody-there/e.yaml")
    assert expand("~") == Path.home()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": "shuffle-" + "9" * 5000}, "unknown order"),
        ({"order": "shuffle-²"}, "unknown order"),
        ({"tasks": [{"name": "a", "source": "folder", "split_classes": {"tasks": 10**12}}]}, "must be at most 10,000"),
    ],
)
def test_numbers_that_would_fill_the_memory(fuzz_world: World, changes: dict, words: str) -> None:
    with time_limit(10), pytest.raises(ConfigError, match=words):
        load_config(fuzz_world.config(**changes))


def test_a_number_as_a_name_has_neighbours() -> None:
    assert did_you_mean("5", [4, "x"]) == " (one of: 4, x)"  # type: ignore[list-item]


def test_line_breaks_and_terminal_codes_in_names_are_shown_not_sent(tmp_path: Path) -> None:
    refused(run_here(["run", str(tmp_path / "a\nb\x1b[2J.yaml")]), r"a\nb\x1b[2J.yaml")


def test_a_link_that_leads_back_to_itself(fuzz_world: World, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    assert run_here(["report", str(run)]).code == 0  # it looks at everything beside the run
    for changes in ({"base_dir": str(tmp_path / "loop")}, {"data_dir": str(tmp_path / "loop" / "x")}):
        load_config(fuzz_world.config(**changes))
    refused(run_here(["run", str(tmp_path / "loop")]), "loop cannot be read: Too many levels of symbolic links")


def test_overrides_are_read_like_files() -> None:
    with pytest.raises(ConfigError, match="a number of 5,000 digits"):
        parse_overrides(["seed=" + "9" * 5000])


# --- JSON and files ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": NaN}', "holds NaN"), ('{"a": -Infinity}', "holds -Infinity"), ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("[" * 100_000, "nested too deeply"), ('"\\ud83d"', "half of a character"), ("9" * 5000, "too many digits"),
    ],
)  # fmt: skip
def test_json_that_python_reads_and_nobody_means(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_of_whole_characters_is_read() -> None:
    assert parse_json('"\\ud83d\\ude00 \\u00e4"') == "😀 ä"


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with time_limit(10):
        for path in (tmp_path / "pipe", Path("/dev/zero")):
            for read in (sha256_file, lambda p: read_regular(p, 10)):
                with pytest.raises(OSError, match="not an ordinary file"):
                    read(path)
        with pytest.raises(IsADirectoryError):
            read_regular(tmp_path, 10)


# --- run directories ---


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("results.json", {"seed": "x"}, "seed is 'x'"),
        ("results.json", {"accuracy": [["x", 1, 2]]}, "accuracy.0.0 is 'x'"),
        ("results.json", {"cost": {"seconds": "long"}}, "cost.seconds is 'long'"),
        ("results.json", {"layers": [{"in": 4, "used": ["x"]}]}, "layers.0.used.0 is 'x'"),
        ("results.json", {"audit": {"rows": [{"factor_leak": "small"}]}}, "audit.rows.0.factor_leak is 'small'"),
        ("data.json", {"tasks": [{"warnings": 3}]}, "tasks.0.warnings is 3"),
    ],
)
def test_a_report_of_numbers_that_are_none(
    fuzz_world: World, tmp_path: Path, file: str, change: dict, words: str
) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    path = run / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(run_here(["report", str(run)]), words)


def test_an_event_of_another_shape_is_named_by_its_line(fuzz_world: World, tmp_path: Path) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"epoch"' in line)
    lines[at] = json.dumps({**json.loads(lines[at]), "loss": "small"})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    refused(run_here(["report", str(run)]), f"metrics.jsonl, line {at + 1}: loss is 'small'")


@pytest.mark.parametrize("file", ["results.json", "status.json", "data.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize("command", ["report", "resume"])
def test_a_run_with_a_pipe_for_a_file(fuzz_world: World, tmp_path: Path, file: str, command: str) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    (run / file).unlink()
    os.mkfifo(run / file)
    answer = run_here([command, str(run)], seconds=60)
    assert answer.fault is None, answer
    if answer.code:
        refused(answer, file)


def test_a_resume_without_data_json_is_refused(fuzz_world: World, tmp_path: Path) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    (run / "data.json").unlink()
    refused(run_here(["resume", str(run), "--quiet"]), "data.json is missing or empty")
    data = json.loads((fuzz_world.run(method="lora")[0] / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({"tasks": data["tasks"][:1]}))
    refused(run_here(["resume", str(run), "--quiet"]), "have changed since the run began")


def test_a_run_cannot_put_its_script_into_the_report(fuzz_world: World, tmp_path: Path) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results |= {"name": SCRIPT, "method_title": SCRIPT, "model": SCRIPT, "warnings": [SCRIPT], "suite": SCRIPT}
    (run / "results.json").write_text(json.dumps(results))
    assert run_here(["report", str(run)]).code == 0
    assert scripted(run) == ""
    assert "&lt;script&gt;" in (run / "report.html").read_text()


def test_a_table_of_a_run_in_a_state_that_nobody_knows(fuzz_world: World, tmp_path: Path) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="lora")[0], tmp_path / "run")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "fin\u0269shed"}))
    answer = run_here(["compare", str(run), "--output", str(tmp_path / "study")])
    assert answer.fault is None, answer
    assert answer.code in (0, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cells": [{"method": "../../x", "order": "listed", "seed": 0}]}, "cells.0.method cannot be used"),
        ({"cells": [{"method": "lora"}]}, "cells.0.order cannot be used"),
        ({"plan": {}}, "plan.name cannot be used"),
        ({"cells": 3}, "cells cannot be used"),
    ],
)
def test_a_study_that_leads_out_of_its_folder(fuzz_world: World, tmp_path: Path, change: dict, words: str) -> None:
    study = make_study(fuzz_world, tmp_path)
    assert len(StudyStore(study).load().cells) == 2
    value = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(KeepLoraError, match=words):
        StudyStore(study).load()


# --- ledgers of which every hash fits ---


def _forged(world: World, to: Path, what: str) -> Path:
    run = world.copied(world.run(method="keeplora++")[0], to / "run")
    sealed = Sealed(run / "ledger")
    record = sorted(p for p in sealed.documents() if p.name == "record.json")[0]
    tensors = record.with_name("tensors.safetensors")

    def edit(change) -> None:
        value = json.loads(record.read_text())
        change(value)
        record.write_text(json.dumps(value))

    def key(kind: str, found: dict[str, torch.Tensor]) -> str:
        return next(k for k in sorted(found) if k.startswith(f"{kind}/"))

    {
        "NaN": lambda: change_tensors(tensors, lambda t: t[key("B", t)].fill_(float("nan"))),
        "dtype": lambda: change_tensors(tensors, lambda t: t.update({key("A", t): t[key("A", t)].half()})),
        "shape": lambda: change_tensors(tensors, lambda t: t.update({key("A", t): t[key("A", t)][:, :-1]})),
        "unknown": lambda: change_tensors(tensors, lambda t: t.update({"other/x": torch.zeros(2)})),
        "directions": lambda: change_tensors(tensors, lambda t: t.__delitem__(key("basis", t))),
        "directions and worth": lambda: change_tensors(tensors, lambda t: [t.pop(key(k, t)) for k in ("basis", "values")]),
        "scale": lambda: edit(lambda v: next(iter(v["layers"].values())).update(s=10**400)),
        "seconds": lambda: edit(lambda v: v["info"].update(seconds="long")),
        "classes": lambda: edit(lambda v: v["info"].pop("classes")),
        "base": lambda: change_tensors(run / "ledger" / "base.safetensors", lambda t: t.update({"x": torch.zeros(2)})),
    }[what]()  # fmt: skip
    sealed.reseal()
    return run


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("NaN", "holds NaN, infinity"), ("dtype", "other numbers than float32"), ("shape", "but the layer asks for"),
        ("unknown", "its tensors hold 'other/x'"), ("directions", "but no basis/"),
        ("directions and worth", "protected directions by its record"),
        ("scale", "cannot be used"), ("seconds", "seconds is 'long'"), ("classes", "has no 'classes'"),
        ("base", "holds 'x', which is no basis"),
    ],
)  # fmt: skip
def test_a_forged_ledger_must_still_make_sense(fuzz_world: World, tmp_path: Path, what: str, words: str) -> None:
    run = _forged(fuzz_world, tmp_path, what)
    refused(run_here(["export", str(run), "--format", "peft", "--output", str(tmp_path / "new")]), words)
    assert not (tmp_path / "new").exists()


def test_a_forged_head_must_be_finite(fuzz_world: World, tmp_path: Path) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="keeplora++-cls")[0], tmp_path / "run")
    sealed = Sealed(run / "ledger")
    tensors = next(p for p in sealed.tensors() if p.parent != sealed.folder)
    change_tensors(tensors, lambda t: t["extra/head"].view(-1)[0].fill_(float("inf")))
    sealed.reseal()
    with pytest.raises(LedgerError, match="extra/head holds NaN or infinity"):
        open_ledger(run).records()


def test_a_forged_number_is_accepted_and_changes_the_head_hash(fuzz_world: World, tmp_path: Path) -> None:
    """Who can write the folder can write a chain that fits: only a hash kept elsewhere tells. docs/security.md says so."""
    run = fuzz_world.copied(fuzz_world.run(method="keeplora++")[0], tmp_path / "run")
    before = open_ledger(run).entries()[-1].hash
    sealed = Sealed(run / "ledger")
    change_tensors(sealed.tensors()[0], lambda t: t[next(k for k in sorted(t) if k.startswith("B/"))].mul_(1.001))
    with pytest.raises(LedgerError, match="SHA-256"):
        open_ledger(run).records()
    sealed.reseal()
    assert len(open_ledger(run).records()) == 3
    assert open_ledger(run).entries()[-1].hash != before


def test_a_file_of_another_size_than_its_header_says_is_not_read_through(fuzz_world: World, tmp_path: Path) -> None:
    run = fuzz_world.copied(fuzz_world.run(method="keeplora++")[0], tmp_path / "run")
    with open(Sealed(run / "ledger").tensors()[0], "r+b") as handle:
        handle.truncate(1 << 42)
    with time_limit(20), pytest.raises(LedgerError, match="is not a whole safetensors file"):
        open_ledger(run).records()


# --- data ---


def test_a_number_in_a_pack_is_not_taken_for_so_many_zero_bytes(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"image": [10**12], "label": [0]})
    with pytest.raises(DataError, match="the column 'image' holds int64, not bytes"):
        check_columns(table.schema, tmp_path, {"image": "bytes"})
    check_columns(pa.table({"image": [b"x"], "label": [None]}).schema, tmp_path, {"image": "bytes", "label": "number"})


def test_reading_takes_the_memory_of_the_file_not_of_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with memory_limit(1 << 30):
        assert read_regular(tmp_path / "a", 1 << 40) == b"abc"


def test_a_class_folder_whose_name_is_no_text(fuzz_world: World, tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(DataError, match="the folder's name is not UTF-8"):
        load_task({"name": "a", "source": "folder", "path": "."}, tmp_path)


def test_a_judges_cache_of_other_things_is_asked_again(tmp_path: Path) -> None:
    good = json.dumps({"key": "k", "score": 3, "text": "fine"})
    lines = ["[" * 100_000, '{"key": "k", "score": NaN, "text": "x"}', '{"key": 1}', "9" * 5000, good]
    (tmp_path / "cache.jsonl").write_text("\n".join(lines) + "\n")
    cache = JudgementCache(tmp_path / "cache.jsonl")
    assert cache.damaged == 4
    os.mkfifo(tmp_path / "pipe.jsonl")
    with time_limit(10), pytest.raises(KeepLoraError, match="not an ordinary file"):
        JudgementCache(tmp_path / "pipe.jsonl")


# --- model folders ---


def _model(world: World, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(world.model, to / "model"))


def test_pickled_weights_are_never_read(fuzz_world: World, tmp_path: Path) -> None:
    folder, canary = _model(fuzz_world, tmp_path), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle_canary(canary))
    with pytest.raises(KeepLoraError, match=r"its weights are pickled \(pytorch_model.bin\)"):
        load_model(folder)
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes()).close()
    assert canary.exists()  # the pickle is one that runs


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../x.safetensors", "/x.safetensors", 3])
def test_an_index_names_files_of_its_folder_alone(fuzz_world: World, tmp_path: Path, shard: object) -> None:
    folder = _model(fuzz_world, tmp_path)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(KeepLoraError, match=r"which is no \.safetensors file in the folder"):
        load_model(folder)


def test_an_adapter_is_no_model(fuzz_world: World, tmp_path: Path) -> None:
    folder = _model(fuzz_world, tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(KeepLoraError, match="is an adapter, or has one in it"):
        load_model(folder)


def test_code_of_a_model_folder_runs_only_when_it_is_trusted(
    fuzz_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, canary = _model(fuzz_world, tmp_path), tmp_path / "canary"
    plant_code(folder, canary, model_type="new-model")
    with pytest.raises(KeepLoraError, match="needs Python code that comes with it"):
        load_model(folder)
    assert not canary.exists()
    assert "open(" in code_canary(canary)
    with pytest.raises(KeepLoraError):  # the planted module is no whole model, but it is run now
        load_model(folder, trust_remote_code=True)
    assert canary.exists()


def test_damaged_settings_of_a_processor_are_told_when_the_model_is_opened(fuzz_world: World, tmp_path: Path) -> None:
    folder = _model(fuzz_world, tmp_path)
    file = next(p for p in (folder / "processor_config.json", folder / "preprocessor_config.json") if p.is_file())
    value = json.loads(file.read_text())
    inner = value.get("image_processor", value)
    inner["image_std"] = [0.5, 0.5]
    file.write_text(json.dumps(value))
    with pytest.raises(KeepLoraError, match="its processors cannot be used with its weights"):
        load_model(folder)
