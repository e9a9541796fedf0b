"""One folder in, one repository out: what the stand-in of the hub holds after every kind of success and failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeplora.errors import HubError
from keeplora.hub import is_repo_id, local_folder, upload
from tests.fake_hub import TOKEN, Fault

COMMIT = r"POST /api/models/me/pets/commit/"


@pytest.fixture
def folder(tmp_path):
    """What `keeplora.experiment.publish` would write, in miniature."""
    texts = {"README.md": "---\nlicense: mit\n---\n# pets\n", "ledger/ledger.json": "{}"}
    return written(
        tmp_path / "folder", {**texts, "ledger/0001-pets/record.json": "{1}", "adapter_model.safetensors": "weights"}
    )


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held(hub, repo_id: str = "me/pets", revision: str = "main") -> dict[str, bytes]:
    """The repository's files without what the hub itself puts there."""
    return {path: content for path, content in hub.files(repo_id, revision).items() if path != ".gitattributes"}


def refused(folder: Path, repo_id: str = "me/pets", **options) -> str:
    with pytest.raises(HubError) as caught:
        upload(folder, repo_id, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert TOKEN not in text
    return text


def test_a_push_is_one_commit_of_the_folder(hub, folder):
    done = upload(folder, "me/pets", message="two tasks")
    assert held(hub) == contents(folder)
    assert (done.url, done.files, done.bytes) == (f"{hub.url}/me/pets", 4, sum(map(len, contents(folder).values())))
    assert hub.repos["me/pets"].branches["main"] == done.commit
    assert hub.repos["me/pets"].messages[done.commit] == "two tasks"
    assert hub.count(COMMIT) == 1
    assert not hub.repos["me/pets"].private


def test_pushing_the_same_again_makes_no_commit(hub, folder):
    assert upload(folder, "me/pets").commit == upload(folder, "me/pets").commit
    assert hub.count(COMMIT) == 1


def test_what_the_new_folder_lacks_is_gone_and_what_others_put_there_stays(hub, folder):
    upload(folder, "me/pets")
    hub.repos["me/pets"].commit("main", {**hub.files("me/pets"), "NOTES.md": b"by hand"})
    (folder / "ledger/0001-pets/record.json").unlink()
    upload(folder, "me/pets")
    assert held(hub) == {**contents(folder), "NOTES.md": b"by hand"}


def test_private_and_a_branch(hub, folder):
    done = upload(folder, "me/pets", private=True, revision="trial")
    assert hub.repos["me/pets"].private
    assert held(hub) == {}
    assert held(hub, revision="trial") == contents(folder)
    assert hub.repos["me/pets"].branches["trial"] == done.commit
    (folder / "README.md").write_text("again")
    upload(folder, "me/pets", revision="trial")
    assert held(hub, revision="trial") == contents(folder)


def test_private_is_never_published_where_all_can_read(hub, folder):
    hub.add("me/pets")
    assert "already and public" in refused(folder, private=True)
    assert held(hub) == {}


def test_another_model_is_not_written_over(hub, folder, tmp_path):
    hub.add(
        "me/pets", written(tmp_path / "other", {"config.json": "{}", "model.safetensors": "theirs", "README.md": "x"})
    )
    text = refused(folder)
    assert "config.json, model.safetensors" in text
    assert "nothing was published" in text
    assert set(held(hub)) == {"config.json", "model.safetensors", "README.md"}


def test_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(folder)
    assert hub.requests == []


def test_a_token_is_passed_on_and_never_told(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    upload(folder, "me/pets", token=TOKEN)
    hub.faults.append(Fault(COMMIT, 400, message=f"the header was Bearer {TOKEN}"))
    (folder / "README.md").write_text("again")
    assert "the header was Bearer …" in refused(folder, token=TOKEN)


@pytest.mark.parametrize("name", ["pets", "me/pe ts", "a/b/c", "/me/pets", "me/../x", "me/" + "x" * 97, "me/pets.git"])
def test_names_that_the_hub_does_not_have(hub, folder, name):
    assert "is not a name on the hub" in refused(folder, name)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "where", "says"),
    [
        (401, r"POST /api/repos/create", "does not know the token"),
        (403, r"POST /api/models/.*/preupload", "take one that may write to 'me'"),
        (404, r"POST /api/repos/create", "check the name"),
        (409, COMMIT, "conflict"),
        (402, COMMIT, "the hub answered 402"),
        (400, COMMIT, "the hub answered 400 (bad thing)"),
        (400, r"POST /api/validate-yaml", "the hub answered 400 (bad thing)"),
    ],
)
def test_each_refusal_is_one_sentence_and_nothing_is_published(hub, folder, status, where, says):
    hub.faults.append(Fault(where, status, times=99, message="bad thing"))
    text = refused(folder)
    assert says in text
    assert "nothing was published" in text
    assert held(hub) == {} if "me/pets" in hub.repos else True
    assert hub.count(where) <= 2  # no use in asking again


def test_somebody_else_s_name(hub, folder):
    text = refused(folder, "you/pets")
    assert "(403)" in text
    assert "You don't have the rights" in text


@pytest.mark.parametrize("status", [500, 503, 429, "drop", "lose"])
@pytest.mark.parametrize(
    "where", [r"POST /api/repos/create", r"GET /api/models/me/pets/tree", r"PUT /lfs/upload", COMMIT]
)
def test_a_passing_fault_is_got_over(hub, folder, status, where):
    hub.faults.append(Fault(where, status, times=2))
    done = upload(folder, "me/pets")
    assert held(hub) == contents(folder)
    assert hub.repos["me/pets"].branches["main"] == done.commit
    assert len(hub.repos["me/pets"].commits) == 2  # the hub's own, and one: an answer that got lost makes no second


@pytest.mark.parametrize("where", [r"POST /api/repos/create", r"POST /api/models/.*/preupload", r"PUT /lfs/upload"])
@pytest.mark.parametrize("status", [500, "drop"])
def test_a_lasting_fault_leaves_nothing_and_is_no_success(hub, folder, where, status):
    hub.faults.append(Fault(where, status, times=999))
    text = refused(folder)
    assert "nothing was published" in text
    assert "me/pets" not in hub.repos or held(hub) == {}


def test_a_connection_that_dies_within_the_commit(hub, folder):
    hub.faults.append(Fault(COMMIT, "drop", times=999))
    text = refused(folder)
    assert f"not known whether the commit arrived: look at {hub.url}/me/pets" in text
    assert held(hub) == {}
    hub.faults.clear()
    upload(folder, "me/pets")  # what was uploaded is there already; the second call is the rest
    assert held(hub) == contents(folder)


def test_a_commit_that_the_hub_took_by_half_is_no_success(hub, folder):
    def lose_one() -> None:
        repo = hub.repos["me/pets"]
        commit = repo.commit

        def without(branch, files, message=""):
            return commit(branch, {k: v for k, v in files.items() if k != "adapter_model.safetensors"}, message)

        repo.commit = without

    hub.between = lose_one
    assert "does not hold adapter_model.safetensors whole: push again" in refused(folder)


def test_a_commit_of_somebody_else_in_between_is_kept(hub, folder):
    upload(folder, "me/pets")
    (folder / "README.md").write_text("again")

    def once() -> None:
        hub.between = lambda: None
        hub.repos["me/pets"].commit("main", {**hub.files("me/pets"), "NOTES.md": b"by hand"})

    hub.between = once
    upload(folder, "me/pets")
    assert held(hub) == {**contents(folder), "NOTES.md": b"by hand"}
    assert hub.count(COMMIT) == 3  # the second was refused, for it did not know of the other


def test_no_network(hub, folder, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    text = refused(folder)
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert "nothing was published" in text


# ---- reading -------------------------------------------------------------------------------------------------------


def test_names():
    assert is_repo_id("me/pets-2.0_x")
    assert not any(map(is_repo_id, ("pets", "a/b/c", "./pets", "~/pets", "me/", Path("me/pets"), None, "me/..")))


def test_a_folder_wins_over_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/pets").mkdir(parents=True)
    assert local_folder("me/pets", ["ledger/*"]) == Path("me/pets")
    assert local_folder(Path("you/pets"), ["ledger/*"]) == Path("you/pets")
    assert hub.requests == []


def test_only_what_is_asked_for_is_fetched_as_plain_files(hub, folder):
    done = upload(folder, "me/pets")
    found = local_folder("me/pets", ["ledger/*"])
    assert contents(found) == {k: v for k, v in contents(folder).items() if k.startswith("ledger/")}
    assert not any(path.is_symlink() for path in found.rglob("*"))
    assert found.name == done.commit
    assert not any("resolve" in request and "safetensors" in request for request in hub.requests)
    (found / "ledger/ledger.json").unlink()  # a copy that lost a file is made anew
    assert contents(local_folder("me/pets", ["ledger/*"])) == contents(found)


def test_a_revision_is_its_own_copy(hub, folder):
    first = upload(folder, "me/pets").commit
    (folder / "ledger/ledger.json").write_text('{"more": 1}')
    upload(folder, "me/pets", revision="trial")
    texts = [
        (local_folder("me/pets", ["ledger/*"], r) / "ledger/ledger.json").read_text() for r in (None, "trial", first)
    ]
    assert texts == ["{}", '{"more": 1}', "{}"]


def test_without_a_network_the_last_copy_serves(hub, folder, monkeypatch):
    import huggingface_hub.constants

    upload(folder, "me/pets")
    there = local_folder("me/pets", ["ledger/*"])
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local_folder("me/pets", ["ledger/*"]) == there
    with pytest.raises(HubError, match=r"no folder is called 'me/cats', and the hub at .* cannot be reached"):
        local_folder("me/cats", ["ledger/*"])


@pytest.mark.parametrize("fault", ["drop", 500])
def test_a_fetch_that_fails_leaves_no_copy(hub, folder, fault):
    from keeplora.files import cache_dir

    upload(folder, "me/pets")
    hub.faults.append(Fault(r"(GET|HEAD) /me/pets/resolve/.*/ledger/0001", fault, times=999))
    with pytest.raises(HubError, match="no folder is called 'me/pets', and the hub") as caught:
        local_folder("me/pets", ["ledger/*"])
    assert "\n" not in str(caught.value)
    assert not list(cache_dir().rglob("ledger.json"))
    hub.faults.clear()
    assert (local_folder("me/pets", ["ledger/*"]) / "ledger/0001-pets/record.json").is_file()


def test_what_cannot_be_fetched(hub, folder, tmp_path):
    upload(folder, "me/pets", private=True)
    hub.add("you/plain", written(tmp_path / "plain", {"config.json": "{}"}))
    for name, revision, says in (
        ("me/cats", None, r"or has no me/cats that it may see \(401\)"),
        ("me/pets", "nowhere", r"the hub has me/pets, but no revision 'nowhere' of it"),
        ("you/plain", None, r"holds no ledger/\*: it was not pushed by keeplora"),
    ):
        with pytest.raises(HubError, match=says) as caught:
            local_folder(name, ["ledger/*"], revision)
        assert "\n" not in str(caught.value)
