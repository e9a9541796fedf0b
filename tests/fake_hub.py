"""A stand-in for the Hugging Face hub on the loopback: what `huggingface_hub` asks of it, and faults on demand.

It keeps what the hub keeps: repositories with branches and commits, large files aside by their SHA-256, and nothing visible
before a commit has come in whole. ``.safetensors`` and pictures go the way of large files (the plain one: Xet's own protocol
is not spoken here), all else comes within the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.local_server import LocalServer

TOKEN = "hf_AStandInTokenThatOpensNothing"
LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Fault:
    """What happens at requests that fit ``where`` ("POST /api/…", a regular expression) in place of their answer, ``times``
    times: an answer with ``status``; "drop", the line goes dead with half of the body read; "lose", the request is
    carried out and the line goes dead before the answer."""

    where: str
    status: int | str
    times: int = 1
    message: str = ""
    code: str = ""


@dataclass
class Repo:
    """``commits``: {path: content} by hash; ``branches``: hash by name. ``parents`` tells the order."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        told = json.dumps(
            [branch, len(self.commits), sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items())]
        )
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.branches[branch], self.messages[sha] = files, sha, message
        return sha

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class FakeHub(LocalServer):
    """Attributes:
    repos: by "owner/name". owners: who may be written to with the token.
    requests: "METHOD path" of every request, in order. faults: see `Fault`.
    between: called after each preupload, as somebody else's commit in between would come.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.owners = {"me"}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.between: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                hub._serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = _any

            def log_message(self, format: str, *args: Any) -> None: ...

        super().__init__(Handler)

    def add(self, repo_id: str, folder: Path | None = None, *, private: bool = False) -> Repo:
        """A repository with one commit of a folder's files."""
        repo = self.repos[repo_id] = Repo(private)
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder is not None else []
        repo.commit("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in found})  # type: ignore[arg-type]
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.at(revision) or ""]

    def count(self, where: str) -> int:
        return sum(re.match(where, request) is not None for request in self.requests)

    # ---- one request -----------------------------------------------------------------------------------------------

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        request = f"{handler.command} {unquote(url.path)}"
        with self._lock:
            self.requests.append(request)
            fault = next((f for f in self.faults if f.times > 0 and re.match(f.where, request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == "drop":
            handler.rfile.read(int(handler.headers.get("Content-Length") or 0) // 2)
            handler.close_connection = True
            handler.connection.close()
            return
        body = self._body(handler)
        if fault is not None and isinstance(fault.status, int):
            self._reply(
                handler, fault.status, {"error": fault.message}, {"X-Error-Code": fault.code} if fault.code else {}
            )
            return
        with self._lock:
            status, content, headers = self._answer(handler, url.path, parse_qs(url.query), body)
        if fault is not None:  # "lose"
            handler.close_connection = True
            handler.connection.close()
            return
        self._reply(handler, status, content, headers)

    @staticmethod
    def _body(handler: BaseHTTPRequestHandler) -> bytes:
        if "chunked" not in (handler.headers.get("Transfer-Encoding") or ""):
            return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)

    @staticmethod
    def _reply(handler: BaseHTTPRequestHandler, status: int, content: Any, headers: dict[str, str]) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    def _answer(
        self, handler: BaseHTTPRequestHandler, path: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        known = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        path = unquote(path)
        if path == "/api/repos/create":
            return self._create(json.loads(body), known)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/lfs/(upload|verify)/?([0-9a-f]*)", path):
            return self._large(match[1], match[2], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body)) if known else (401, {"error": "who are you?"}, {})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3], known)
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|branch|preupload|commit)/([^/]+))?/?", path
        ):
            return self._model(match[1], match[2] or "revision", match[3] or "main", query, body, known)
        return 404, {"error": f"no such path: {path}"}, {}

    def _readable(self, repo_id: str, known: bool) -> Repo | None:
        repo = self.repos.get(repo_id)
        return None if repo is None or (repo.private and not known) else repo

    def _create(self, told: dict[str, Any], known: bool) -> tuple[int, Any, dict[str, str]]:
        repo_id = f"{told['organization']}/{told['name']}"
        if not known:
            return 401, {"error": "Invalid username or password."}, {}
        if told["organization"] not in self.owners:
            return 403, {"error": f"You don't have the rights to create a model under {told['organization']}"}, {}
        answer = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return 409, {"error": "You already created this model repo", **answer}, {}
        self.repos[repo_id] = Repo(told.get("visibility") == "private")
        self.repos[repo_id].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, answer, {}

    @staticmethod
    def _validate(content: str) -> tuple[int, Any, dict[str, str]]:
        from keeplora.report.card import LICENCES

        head = content.split("---\n")[1] if content.startswith("---\n") else ""
        values = yaml.safe_load(head) or {}
        errors = []
        if values.get("license") not in (None, *LICENCES):
            errors.append({"message": f'"license" must be one of {sorted(LICENCES)[:2]}…'})
        if values.get("base_model") and not re.fullmatch(r"[\w.-]+/[\w.-]+", values["base_model"]):
            errors.append({"message": '"base_model" must be a model on the hub'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def _large(self, what: str, oid: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if what == "verify":
            found = json.loads(body)
            held = self.large.get(found["oid"])
            return (200 if held is not None and len(held) == found["size"] else 404), {}, {}
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content has another hash"}, {}
        self.large[oid] = body
        return 200, {}, {}

    def _batch(self, told: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for item in told["objects"]:
            up = {
                "upload": {"href": f"{self.url}/lfs/upload/{item['oid']}"},
                "verify": {"href": f"{self.url}/lfs/verify"},
            }
            objects.append({**item, **({} if item["oid"] in self.large else {"actions": up})})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _resolve(self, repo_id: str, revision: str, path: str, known: bool) -> tuple[int, Any, dict[str, str]]:
        repo = self._readable(repo_id, known)
        if repo is None:
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        sha = repo.at(revision)
        if sha is None:
            return 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"}
        content = repo.commits[sha].get(path)
        if content is None:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
        oid = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_oid(content)
        return 200, content, {"ETag": f'"{oid}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}

    def _model(
        self, repo_id: str, what: str, revision: str, query: dict[str, list[str]], body: bytes, known: bool
    ) -> tuple[int, Any, dict[str, str]]:
        repo = self._readable(repo_id, known)
        if repo is None:
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        writes = what in ("branch", "preupload", "commit")
        if writes and (not known or repo_id.split("/")[0] not in self.owners):
            return 403, {"error": "You have read access but not the required permissions"}, {}
        if what == "branch":
            if revision in repo.branches:
                return 409, {"error": "Reference already exists"}, {}
            repo.branches[revision] = repo.branches["main"]
            return 200, {}, {}
        sha = repo.at(revision)
        if sha is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files = repo.commits[sha]
        if what == "revision":
            named = [{"rfilename": path} for path in sorted(files)]
            return 200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": named, "tags": []}, {}
        if what == "tree":
            return 200, [self._entry(path, content) for path, content in sorted(files.items())], {}
        if what == "preupload":
            answer = (
                200,
                {"files": [self._mode(f["path"], files.get(f["path"])) for f in json.loads(body)["files"]]},
                {},
            )
            self.between()
            return answer
        return self._commit(repo, repo_id, revision, body)

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, Any]:
        large = {}
        if path.endswith(LARGE):
            large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}}
        return {"type": "file", "path": path, "size": len(content), "oid": git_oid(content), **large}

    @staticmethod
    def _mode(path: str, there: bytes | None) -> dict[str, Any]:
        large = path.endswith(LARGE)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_oid(there)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _commit(self, repo: Repo, repo_id: str, branch: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in body.splitlines()]
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit") not in (None, repo.branches[branch]):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return 400, {"error": f"{value['path']} was not uploaded"}, {}
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return 404, {"error": "A file with this name doesn't exist"}, {"X-Error-Code": "EntryNotFound"}
        sha = repo.commit(branch, files, head["summary"])
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}, {}


@contextmanager
def a_hub(monkeypatch: Any, root: Path) -> Iterator[FakeHub]:
    """A running stand-in, and everything that reads the hub's address turned to it: caches below ``root``, a token set."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api, utils

    fake = FakeHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("KEEPLORA_CACHE", str(root / "keeplora-cache"))
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": fake.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(root / "hub-cache"),
        "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(root / "token"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", fake.url)  # `huggingface_hub.file_exists` and its like are bound to it
    monkeypatch.setattr("keeplora.hub.WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    utils.close_session()
    del huggingface_hub
    with fake.running():
        yield fake
    utils.close_session()
