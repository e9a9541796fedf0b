"""The environment record: complete where it can be, silent where it cannot, and without names or secrets."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import subprocess

import pytest

from keeplora.experiment import environment
from keeplora.experiment.environment import collect_environment


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_versions_and_machine(tmp_path):
    import torch

    found = collect_environment(tmp_path)
    assert found["versions"]["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["cpu"]["cores"] >= 1
    assert found["git"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_commit_and_state(tmp_path):
    git(tmp_path, "init", "-q")
    assert collect_environment(tmp_path)["git"] is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    state = collect_environment(tmp_path)["git"]
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "b").write_text("1")
    assert collect_environment(tmp_path)["git"] == {"commit": state["commit"], "dirty": True}


def test_it_never_fails(tmp_path, monkeypatch):
    def broken(*args, **keywords):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", broken)
    monkeypatch.setattr(environment.os, "sysconf", broken, raising=False)
    monkeypatch.setattr(environment.os, "sched_getaffinity", broken, raising=False)
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    found = collect_environment(tmp_path / "none")
    assert found["git"] is None
    assert found["versions"] == {"no-such-package": None}
    assert found["cpu"]["memory_bytes"] is None


def test_no_host_user_path_or_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "s3cr3t-token")
    text = json.dumps(collect_environment(tmp_path))
    for private in ("s3cr3t-token", str(tmp_path), f"/{getpass.getuser()}/"):
        assert private not in text
    assert platform.node() not in text or platform.node() in platform.platform()
