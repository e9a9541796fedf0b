"""What the documentation says is run, and what it names exists."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.docs.documents import ROOT, Block, blocks, documents, links, run_block, run_keeplora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run_all(found: list[Block], folder: Path, namespace: dict[str, Any], at_least: int) -> None:
    to_run = [block for block in found if block.runs]
    assert len(to_run) >= at_least, f"only {len(to_run)} blocks run, of {len(found)}"
    for block in to_run:
        run_block(block, folder, namespace)


def own_folders(folder: Path) -> None:
    """The two trees of the README: one with train and test, one without."""
    trees = {"fruit/train": 6, "fruit/test": 2, "tools": 10}
    classes = {"fruit": ("apple", "banana"), "tools": ("hammer", "saw")}
    seed = 0
    for tree, count in trees.items():
        for name in classes[tree.split("/")[0]]:
            (folder / tree / name).mkdir(parents=True)
            for i in range(count):
                seed += 1
                noise = torch.randint(
                    0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
                )
                Image.fromarray(noise.numpy()).save(folder / tree / name / f"{i}.png")


@pytest.mark.usefixtures("tiny_models")
def test_getting_started_runs(here):
    namespace: dict[str, Any] = {}
    run_all(blocks(ROOT / "docs/getting-started.md"), here, namespace, at_least=9)

    # What the page says about the results.
    assert sorted(path.name for path in (here / "runs").iterdir()) == [
        "first-keeplora++-seed0", "first-keeplora++-seed1", "first-lora-seed0", "from-python-keeplora++-seed0",
    ]  # fmt: skip
    report = (here / "runs/first-keeplora++-seed0/report.html").read_text(encoding="utf-8")
    assert "Sequential LoRA" in report
    pixels = torch.randn(2, 3, 28, 28)
    adapted, trained = namespace["adapted"], namespace["trained"].family.model
    fresh = importlib.import_module("keeplora.models").load_model("embedded").model
    with torch.no_grad():
        ours = trained.get_image_features(pixels)
        torch.testing.assert_close(adapted.get_image_features(pixels), ours, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(fresh.get_image_features(pixels), ours, atol=1e-5)
    assert (here / "merged/model.safetensors").is_file()
    assert namespace["results"]["audit"]["factor_leak_max"] <= 1e-5


@pytest.mark.usefixtures("tiny_models")
def test_readme_runs(here, tiny_folders):
    own_folders(here)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(3, 50, (3, 6), generator=generator),
    }
    end = json.loads((tiny_folders["clip"] / "config.json").read_text())["text_config"]["eos_token_id"]
    batch["input_ids"][:, -1] = end
    labels = torch.tensor([0, 1, 2, 0])
    namespace: dict[str, Any] = {
        "loader": [(batch, labels)] * 2,
        "loss_fn": lambda model, item: torch.nn.functional.cross_entropy(model(**item[0]).logits_per_image, item[1]),
    }
    run_all(blocks(ROOT / "README.md"), here, namespace, at_least=5)
    names = {path.name for path in (here / "runs").iterdir()}
    assert names == {"my-folders-keeplora++-seed0", "my-folders-lora-seed0"}
    assert len(namespace["learner"].records) == 1
    assert namespace["learner"].audit().passed
    assert [path.name for path in (here / "out/adapters").iterdir()] == ["0001-pets"]
    exports = here / "runs/my-folders-keeplora++-seed0"
    assert (exports / "export-peft/adapter_model.safetensors").is_file()
    assert (exports / "export-merged/model.safetensors").is_file()


@pytest.mark.usefixtures("tiny_models")
def test_the_example_file_runs_on_the_folders_that_its_comments_describe(here, capsys):
    own_folders(here)
    shutil.copy(ROOT / "examples/own_folders.yaml", here)
    run_keeplora(["run", "own_folders.yaml", "-o", "training.epochs=1", "--quiet"], "own_folders.yaml")
    results = json.loads((here / "runs/my-folders-keeplora++-seed0/results.json").read_text())
    assert results["tasks"] == ["fruit", "tools"]
    assert results["test_counts"] == {"fruit": 4, "tools": 4}
    assert "Report:" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_models", "tutorial_data")
def test_adding_a_method_runs(here, monkeypatch, capsys):
    from keeplora.methods import registry
    from keeplora.tuner.persistence import open_ledger

    file, line, *rest = blocks(ROOT / "docs/adding-a-method.md")
    run_block(file, here, {})
    assert file.file == "src/keeplora/methods/lora_fa.py"
    stated: dict[str, Any] = {}
    exec(line.text, stated)
    modules = list(stated["METHOD_MODULES"])
    assert modules.pop(modules.index("lora") + 1) == "lora_fa"
    assert tuple(modules) == registry.METHOD_MODULES, f"{line.where} is out of date"

    monkeypatch.setattr(registry, "_METHODS", dict(registry._load()))
    monkeypatch.setattr(registry, "METHOD_MODULES", stated["METHOD_MODULES"])
    spec = importlib.util.spec_from_file_location("keeplora.methods.lora_fa", here / file.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    run_all(rest, here, {}, at_least=2)
    assert "lora-fa: LoRA-FA" in capsys.readouterr().out
    run_keeplora(["run", "experiment.yaml", "--method", "lora"], "sequential LoRA")
    names = ("lora-fa", "lora", "lora-small")
    frozen, whole, small = (open_ledger(here / f"runs/first-{name}-seed0").records() for name in names)
    assert len(frozen) == len(whole) == len(small) == 2

    # LoRA-FA: A is what the seed gives, B is trained; sequential LoRA starts there and moves A as well.
    from keeplora import TrainedModel
    from keeplora.tuner.adapter import random_factor

    trained = TrainedModel("runs/first-lora-fa-seed0")
    for i, record in enumerate(frozen):
        generator = torch.Generator().manual_seed(i)
        A = {t.name: random_factor(t, generator) for t in trained.learner.targets}
        assert set(record.factors) == set(A)
        assert all(torch.equal(factors.A, A[name]) for name, factors in record.factors.items())
        assert not any(torch.equal(factors.A, A[name]) for name, factors in whole[i].factors.items())
        assert any(factors.B.abs().max() > 1e-4 for factors in record.factors.values())

    # The page's second example: λ Σ ‖B‖² leaves a smaller B.
    def size(records: list[Any]) -> float:
        return sum(float(f.B.square().sum()) for record in records for f in record.factors.values())

    assert 0 < size(small) < 0.5 * size(whole)

    # The rules of the page, on the page's own example.
    for name, W0 in trained.learner.store.W0.items():
        expected = W0 + sum(record.factors[name].delta for record in frozen)
        torch.testing.assert_close(trained.learner.store.module(name).weight.detach(), expected, atol=1e-6, rtol=1e-5)


def test_the_method_page_names_every_hook():
    """What `ContinualLearner` offers to be overridden is in the page's tables, and what they name is there."""
    from keeplora.tuner import ContinualLearner

    text = (ROOT / "docs/adding-a-method.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)(?:\([\w, ]*\))?` \|", text, re.M))
    assert named <= set(dir(ContinualLearner)), f"not there: {sorted(named - set(dir(ContinualLearner)))}"
    files = ("learner", "inspection", "hooks")
    learner, asked, hooks = ((ROOT / f"src/keeplora/tuner/{f}.py").read_text(encoding="utf-8") for f in files)
    offers = [
        hooks,
        asked.partition("# ---- what a method may tell")[2],
        learner.partition("# ---- what a training loop")[2],
    ]
    decided = "".join(offers).partition("# ---- keeping")[0]
    told = {"_told"}  # for the ledger, and no method's to change
    offered = set(re.findall(r"^    def (\w+)\(", decided, re.M)) - told
    offered |= set(re.findall(r"^    (\w+): ClassVar", hooks, re.M))
    assert len(offered) > 12
    assert offered - named == set(), f"adding-a-method.md does not describe {sorted(offered - named)}"


OPEN_MAPS = {"layers", "versions", "test_counts", "chance", "energy_weights", "gamma"}  # their keys are names


def keys_of(value: Any, inside: str = "") -> set[str]:
    if isinstance(value, dict):
        own = set() if inside in OPEN_MAPS else set(value)
        return own.union(*(keys_of(entry, "" if inside in OPEN_MAPS else key) for key, entry in value.items()), set())
    if isinstance(value, list):
        return set().union(*(keys_of(entry) for entry in value), set())
    return set()


def section(text: str, heading: str) -> set[str]:
    """Names in backticks between a heading and the next one of the same depth or above."""
    depth = heading.split(" ")[0]
    match = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{2,{len(depth)}}} |\Z)", text, re.M | re.S)
    assert match, f"formats.md has no section {heading!r}"
    return set(re.findall(r"`([a-z_0-9]+)`", match[1]))


@pytest.mark.usefixtures("tiny_models", "tutorial_data")
def test_formats_match_a_run(here):
    settings = "validation=0.2", "best_epoch=true", "early_stopping={patience: 5}", "accept={max_drop: 100.0}"
    words = [word for setting in settings for word in ("-o", setting)]
    run_keeplora(["run", "experiment.yaml", "--method", "keeplora++-cls", "--output", "run", *words], "formats.md")
    import yaml
    from safetensors.torch import load_file

    run = here / "run"
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tasks"] = []  # data.md describes them
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = run / "ledger/0001-colours"
    held = {
        "## config.yaml": config,
        "## environment.json": json.loads((run / "environment.json").read_text()),
        "## data.json": json.loads((run / "data.json").read_text()),
        "## status.json": json.loads((run / "status.json").read_text()),
        "## metrics.jsonl": [*events, {event["event"]: None for event in events}],
        "## results.json": json.loads((run / "results.json").read_text()),
        "### ledger.json": json.loads((run / "ledger/ledger.json").read_text()),
        "### record.json": json.loads((record / "record.json").read_text()),
        "### HEAD.json": json.loads((run / "ledger/HEAD.json").read_text()),
        "### metrics.json": {
            **(sidecar := json.loads((record / "metrics.json").read_text())),
            "metrics": dict.fromkeys(sidecar["metrics"]),
        },
    }
    for heading, value in held.items():
        documented, found = section(text, heading), keys_of(value)
        if heading == "### record.json":  # the training settings are config.yaml's
            found -= set(value["info"]["training"]) | {"event", "task"} | keys_of(value["info"]["epochs"])
            found |= {"explained", "trace", "used", "rank", "s"}
            found -= keys_of(value["config"])  # ledger.json's
        if heading == "## results.json":
            found -= {"epoch", "loss", "train_accuracy", "validation_accuracy", "lr"}
            found -= {"statistics", "training", "evaluation"}  # "seconds (as above)"
        assert found <= documented, f"{heading}: not documented: {sorted(found - documented)}"
        if heading in ("## data.json", "## status.json", "### ledger.json"):  # and nothing that is not there
            extra = documented - found - set(value.get("versions", {})) - {"tensors_sha256"}
            assert not extra, f"{heading}: documented but not written: {sorted(extra)}"
    layer = next(iter(held["### record.json"]["layers"].values()))
    assert set(layer) == {"explained", "trace", "used", "rank", "s"}
    kinds = {key.split("/")[0] for key in load_file(record / "tensors.safetensors")}
    assert kinds == {"A", "B", "basis", "extra", "values"}
    assert all(f"`{kind}/" in text for kind in (*kinds, "delta", "covariance", "kept", "complement"))
    names = {path.name for path in run.iterdir()} - {"ledger"}
    tree = text.split("```")[1]
    assert all(name in tree for name in names), f"the tree in formats.md lacks one of {names}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in links(path):
        file = (path.parent / target.partition("#")[0]).resolve()
        assert file.exists(), f"{path.name} links to {target}, which is not there"
        assert file.is_relative_to(ROOT)


def test_functions_that_the_method_page_names_are_where_it_says():
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    named = re.findall(r"\[`(\w+)`\]\(\.\./([\w/]+\.py)\)", text)
    assert len(named) >= 15
    for name, file in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.M), f"method.md: {file} has no {name}"
    headings = re.findall(r"^## (M\d)", text, re.M)
    assert headings == [f"M{i}" for i in range(1, 10)]


def commands() -> list[tuple[str, list[str]]]:
    """Every `keeplora ...` in the documents, run or not: shell blocks and inline code."""
    found = []
    for path in documents():
        for block in blocks(path):
            if block.language == "bash":
                found += [(block.where, words[1:]) for words in block.commands() if words[0] == "keeplora"]
        for text in re.findall(r"`keeplora ([^`]+)`", path.read_text(encoding="utf-8")):
            found.append((path.name, text.split()))
    return found


def test_every_command_that_is_named_exists():
    import typer

    from keeplora.cli import app

    root: Any = typer.main.get_command(app)
    seen = set()
    for where, words in commands():
        command, rest = root, list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            name = rest.pop(0)
            assert name in command.commands, f"{where}: there is no `keeplora {name}`"
            command = command.commands[name]
            seen.add(name)
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("-") and command is not root:
                assert word in options | {"--help"}, f"{where}: `keeplora {' '.join(words)}` has no {word}"
    assert {"run", "resume", "predict", "export", "audit", "report", "fetch", "compare", "tune", "doctor"} <= seen


def test_methods_and_suites_that_are_stated_are_those_there_are():
    from keeplora import __version__
    from keeplora.methods import method_names

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {__version__}" in changelog
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("docs/methods.md", "CHANGELOG.md", "README.md")]
    titles = {"full-ft-all": "full fine-tuning", "rail-primal": "RAIL", "rail-dual": "RAIL", "joint": "joint training",
              "oracle": "per-task oracle", "full-ft": "full fine-tuning", "lora": "sequential LoRA"}  # fmt: skip
    for name in method_names():
        assert f"| `{name}` |" in pages[0]
        for page in pages[1:]:
            assert titles.get(name, name.removesuffix("-cls")).lower() in " ".join(page.lower().split()), name
