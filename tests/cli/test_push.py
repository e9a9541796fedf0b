"""`keeplora push` and `keeplora card` as a person calls them."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from tests.fake_hub import Fault

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_push(hub, world, cli):
    path, _ = world.run()
    answer = cli("push", path, "me/three", "--private", "--license", "mit", "--language", "en", "--message", "hello")
    assert (answer.code, answer.err) == (0, "")
    url, told = answer.out.splitlines()
    assert url == f"{hub.url}/me/three"
    repo = hub.repos["me/three"]
    assert repo.private
    assert repo.messages[repo.branches["main"]] == "hello"
    files = hub.files("me/three")
    assert told.startswith(f"{len(files) - 1} files, ")
    assert told.endswith(f"commit {repo.branches['main']}")
    assert "license: mit" in files["README.md"].decode()


def test_a_dry_run_lists_everything_and_sends_nothing(hub, world, cli, tmp_path):
    path, _ = world.run(method="replay")
    answer = cli("push", path, "me/three", "--dry-run", "--output", tmp_path / "out")
    assert answer.code == 0
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    listed = {
        line.split("  ")[-1]
        for line in answer.out.splitlines()
        if line.endswith((".json", ".md", ".png", "safetensors"))
    }
    assert listed == written
    assert {"README.md", "ledger/ledger.json", "adapter_model.safetensors"} < written
    assert f"in {len(written)} files; nothing was uploaded" in answer.out
    assert "Left out: what the method keeps of its training data (replay)" in answer.out
    assert hub.requests == []
    cli("push", path, "me/three")
    assert {k for k in hub.files("me/three") if k != ".gitattributes"} == written


def test_a_branch_and_everything_beside(hub, world, cli):
    path, _ = world.run()
    assert cli("push", path, "me/three", "--revision", "trial", "--merged", "--adapters").code == 0
    names = set(hub.files("me/three", "trial"))
    assert {"merged/model.safetensors", "adapters/0001-paint/adapter_config.json"} < names
    assert set(hub.files("me/three")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["me"], "'me' is not a name on the hub"),
        (["you/three"], "take one that may write to 'you'"),
        (["me/three", "--output", "x"], "--output goes with --dry-run"),
        (["me/three", "--base-model", "./clip"], "is not a name on the hub"),
    ],
)
def test_what_is_refused_is_one_sentence(hub, world, cli, words, says):
    answer = cli("push", world.run()[0], *words)
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("Error: ")
    assert says in answer.err
    assert len(answer.err.splitlines()) == 1
    assert hub.repos == {}


def test_no_run(hub, cli, tmp_path):
    answer = cli("push", tmp_path, "me/three")
    assert (answer.code, answer.out) == (1, "")
    assert "holds no run and no ledger; give the folder that a run or save_pretrained wrote" in answer.err


def test_offline(hub, world, cli, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()
    answer = cli("push", world.run()[0], "me/three")
    assert answer.code == 1
    assert "switched off by HF_HUB_OFFLINE: unset it; nothing was published" in answer.err


def test_interrupted(hub, world, cli, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", stop)
    answer = cli("push", world.run()[0], "me/three")
    assert answer.code == 130
    assert "what it showed before or the whole" in answer.err
    assert "keeplora resume" not in answer.err


def test_a_hub_that_fails_for_long(hub, world, cli):
    hub.faults.append(Fault(r"POST /api/models/me/three/commit", 500, times=99, message="sorry"))
    answer = cli("push", world.run()[0], "me/three")
    assert answer.code == 1
    assert answer.err == "Error: the hub answered 500 (sorry); nothing was published\n"


def test_card_needs_no_hub(world, cli, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    path, results = world.run()
    answer = cli("card", path, "--title", "Three tasks", "--repo-id", "me/three", "--base-model", "tiny/clip")
    assert answer.code == 0
    card = ModelCard(answer.out)
    assert "# Three tasks\n" in card.text
    assert card.data.base_model == "tiny/clip"
    assert f"| Last | {results['metrics']['last']:.1f} |" in card.text
    assert cli("card", path, "--output", tmp_path / "README.md").out.strip() == str(tmp_path / "README.md")
    assert json.dumps(str(world.root))[1:-1] not in (tmp_path / "README.md").read_text()


def test_a_repository_is_no_run_directory(hub, world, cli):
    answer = cli("audit", "me/three")
    assert answer.code == 1
    assert "a repository on the hub is opened in Python, by the lines on its card" in answer.err
