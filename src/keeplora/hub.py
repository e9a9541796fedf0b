"""The Hugging Face hub: one folder in as one commit, one repository's files out; every fault told in one sentence.

Nothing here knows what the folder holds: `keeplora.experiment.publish` fills it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keeplora.errors import HubError
from keeplora.files import atomic_dir, cache_dir

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

MARK = "ledger/ledger.json"
"""What a repository that keeplora wrote holds."""
OURS = ("ledger/", "adapters/", "merged/", "figures/", "adapter_config.json", "adapter_model.safetensors")
"""What a push may delete where the new folder lacks it: a record that was taken back must not stay behind."""
NEUTRAL = ("README.md", ".gitattributes", "LICENSE", ".gitignore")
"""Files of a repository that may be there before the first push."""
WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt."""
PASSING = (408, 412, 429, 500, 502, 503, 504)
"""Answers that may differ the next time; 412: the branch moved since it was looked at."""
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Upload:
    """What a push left on the hub: the repository's address, the commit, and how many files of how many bytes it holds."""

    url: str
    commit: str
    files: int
    bytes: int


def is_repo_id(name: object) -> bool:
    """Whether a name has the hub's form, "owner/name"; a `pathlib.Path` never has.

    >>> is_repo_id("openai/clip-vit-base-patch16"), is_repo_id("/models/clip"), is_repo_id("./runs/pets")
    (True, False, False)
    """
    return isinstance(name, str) and _REPO_ID.fullmatch(name) is not None and ".." not in name


def folder_files(folder: Path) -> dict[str, int]:
    """Every file below ``folder``, by its path with forward slashes, and its bytes."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def upload(
    folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, revision: str | None = None,
    token: str | None = None, message: str = "Upload with keeplora",
) -> Upload:  # fmt: skip
    """Make the repository's branch hold what ``folder`` holds, by one commit: readers see the old state or the new one.

    What an earlier push wrote and the folder lacks is deleted in the same commit. Answers that may differ the next time
    (an overloaded server, a dropped connection, somebody else's commit in between) are tried again. What counts as done is
    what the hub lists afterwards, not what it answered.

    Args:
        repo_id: "owner/name"; made if it is not there.
        private: True: only where nobody else can read. None: as the hub makes new repositories.
        revision: a branch, made from ``main`` if it is not there.
        token: None: the one that ``hf auth login`` or HF_TOKEN left.

    Raises:
        HubError: no token, no right, no such owner, no network, a repository that holds something else. It says whether
            anything was published.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo_id)
    held = token or get_token()
    if not held:
        raise HubError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(token=held, library_name="keeplora")
    push = _Push(api, Path(folder), repo_id, private, revision or "main", message)
    for wait in (*WAITS, None):
        try:
            return push.attempt()
        except Exception as error:
            if isinstance(error, HubError):
                raise
            if wait is None or not _passing(error):
                text = _told(error, repo_id, revision).replace(held, "…")
                raise HubError(f"{text}; {push.state}") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` unless the name has the hub's form and its lengths."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        pass
    else:
        if is_repo_id(repo_id):
            return
    raise HubError(
        f"{repo_id!r} is not a name on the hub: give owner/name, of letters, digits, '-', '_' and '.', at most 96 characters"
    )


@dataclass
class _Push:
    """One push over all its attempts; ``state`` ends the sentence of an error."""

    api: HfApi
    folder: Path
    repo_id: str
    private: bool | None
    branch: str
    message: str
    state: str = "nothing was published"

    def attempt(self) -> Upload:
        from huggingface_hub import CommitOperationAdd

        api, repo_id, branch = self.api, self.repo_id, self.branch
        api.create_repo(repo_id, private=self.private, exist_ok=True)
        info = api.repo_info(repo_id)
        if self.private and not info.private:
            raise HubError(
                f"{repo_id} is there already and public: make it private on the hub first, or push without --private; "
                f"{self.state}"
            )
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        head = api.repo_info(repo_id, revision=branch).sha
        there = self._listed(branch)
        self._refuse_foreign(there)
        files = folder_files(self.folder)
        # Not `upload_folder`: with hf_xet it may spread a folder over several commits, and a reader of one in between
        # would find an adapter beside the ledger of another.
        additions = [CommitOperationAdd(path, str(self.folder / path)) for path in files]
        api.preupload_lfs_files(repo_id, additions, revision=branch)  # contents alone: no file is to be seen yet
        operations: list[Any] = [*additions, *self._stale(set(there) - set(files))]
        self.state = f"it is not known whether the commit arrived: look at {api.endpoint}/{repo_id}, or push again"
        try:
            commit = api.create_commit(
                repo_id, operations, commit_message=self.message, revision=branch, parent_commit=head
            )
        except Exception as error:
            if _status(error) is not None:  # the hub answered, and did not take it
                self.state = "nothing was published"
            raise
        self._verify(files, commit.oid)
        return Upload(f"{api.endpoint}/{repo_id}", commit.oid, len(files), sum(files.values()))

    def _listed(self, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        found = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        return {file.path: file for file in found if isinstance(file, RepoFile)}

    def _refuse_foreign(self, there: dict[str, RepoFile]) -> None:
        foreign = sorted(path for path in there if path not in NEUTRAL)
        if foreign and MARK not in there:
            raise HubError(
                f"{self.repo_id} holds something that keeplora did not write ({', '.join(foreign[:3])}): choose another name; "
                f"{self.state}"
            )

    @staticmethod
    def _stale(paths: set[str]) -> list[Any]:
        from huggingface_hub import CommitOperationDelete

        return [CommitOperationDelete(path) for path in sorted(paths) if path.startswith(OURS)]

    def _verify(self, files: dict[str, int], commit: str) -> None:
        there = self._listed(commit)
        missing = [path for path, size in files.items() if path not in there or there[path].size != size]
        if missing:
            raise HubError(
                f"{self.repo_id} took the commit but does not hold {missing[0]} whole"
                f"{f' and {len(missing) - 1} more files' if missing[1:] else ''}: push again"
            )


def local_folder(name: str | os.PathLike[str], files: Sequence[str], revision: str | None = None) -> Path:
    """The folder ``name``, or a copy of what a repository on the hub holds of ``files``.

    The copy lies in keeplora's own cache, one folder per commit, as plain files: the hub's cache has links, which a
    ledger refuses. Without a network the last copy serves.

    Args:
        name: a folder; or, as a `str`, "owner/name" where no such folder exists.
        files: patterns such as "ledger/*", where ``*`` goes through folders.
        revision: branch, tag or commit on the hub.

    Raises:
        HubError: no such repository, branch or file, no right to read it, no network and no copy.
    """
    path = Path(name).expanduser()
    if path.exists() or not is_repo_id(name):
        return path
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(str(name), revision=revision, allow_patterns=list(files), library_name="keeplora")
        )
    except Exception as error:
        raise HubError(f"no folder is called {str(name)!r}, and {_told(error, str(name), revision)}") from error
    found = [file for file in folder_files(snapshot) if any(_matches(file, pattern) for pattern in files)]
    if not found:
        raise HubError(
            f"{name} on the hub holds no {' or '.join(files)}: it was not pushed by keeplora, or with another --revision"
        )
    target = cache_dir() / "hub" / str(name).replace("/", "--") / snapshot.name
    if target.is_dir() and all((target / file).is_file() for file in found):
        return target
    shutil.rmtree(target, ignore_errors=True)
    with atomic_dir(target) as part:
        for file in found:
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / file, part / file)
    return target


def _matches(file: str, pattern: str) -> bool:
    from fnmatch import fnmatch

    return fnmatch(file, pattern)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first(error: BaseException, kind: Any) -> Any:
    return next((cause for cause in _causes(error) if isinstance(cause, kind)), None)


def _status(error: BaseException) -> int | None:
    """The status that the hub answered with, if it answered."""
    from huggingface_hub.errors import HfHubHTTPError

    answered = _first(error, HfHubHTTPError)
    return answered.response.status_code if answered is not None else None


def _unreachable(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport = HfHubHTTPError.__mro__[1]  # the HTTP library's own base class, whichever library it is
    return _first(error, (transport, OfflineModeIsEnabled, ConnectionError, TimeoutError)) is not None


def _passing(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status in PASSING
    return _unreachable(error) and _first(error, OfflineModeIsEnabled) is None


def _line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return " ".join(lines)[:200].rstrip(".")


def _told(error: BaseException, repo_id: str, revision: str | None) -> str:
    """What went wrong and how to mend it, without a full stop."""
    from huggingface_hub import constants, errors

    owner, what = repo_id.split("/")[0], f"{repo_id} at revision {revision!r}" if revision else repo_id
    kinds: list[tuple[Any, Callable[[], str]]] = [
        (errors.OfflineModeIsEnabled, lambda: "the hub is switched off by HF_HUB_OFFLINE: unset it"),
        (errors.GatedRepoError, lambda: f"{repo_id} wants its terms accepted on the hub first"),
        (errors.RevisionNotFoundError, lambda: f"the hub has {repo_id}, but no revision {revision!r} of it"),
        (
            errors.IncompleteSnapshotError,
            lambda: f"the copy of {what} here is not whole, and the hub cannot be reached",
        ),
    ]
    for kind, tell in kinds:
        if _first(error, kind) is not None:
            return tell()
    status = _status(error)
    if status is not None:
        answer = _first(error, errors.HfHubHTTPError)
        said = _line(getattr(answer, "server_message", None) or "")
        told = {
            401: f"the hub does not know the token, or has no {repo_id} that it may see (401): log in with `hf auth login`, or "
                 "set HF_TOKEN",
            403: f"the token may not do this to {repo_id} (403): take one that may write to {owner!r}",
            404: f"the hub has no {what}, or the token may not see it (404): check the name, and that {owner!r} exists",
            409: f"the hub reports a conflict about {repo_id} (409): try again in a minute",
            412: f"{repo_id} was changed by somebody else meanwhile (412): push again",
        }.get(status, f"the hub answered {status}")  # fmt: skip
        return told + (f" ({said})" if said and status not in (401, 404) else "")
    if _unreachable(error):
        return f"the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}): check the network"
    return f"the hub's library failed ({type(error).__name__}: {_line(error)})"
