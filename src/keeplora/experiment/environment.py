"""What a run ran on: versions, machine and git state. Nothing in it names a person or holds a secret."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "keeplora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "datasets",
    "numpy",
    "pillow",
    "pyarrow",
    "av",
    "torchvision",  # its video and picture processors are used where it is installed
)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or None


def _cores() -> int | None:
    with contextlib.suppress(AttributeError, OSError):  # what this process may use, which in a container is less
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def memory_bytes() -> int | None:
    """Memory of this machine; None where the system does not tell."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"available": False}
    gpus = []
    with contextlib.suppress(Exception):  # a broken driver must not stop a run on the CPU
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return {
        "available": True,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
    }


def _git(folder: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        command = ["git", "-C", os.fspath(folder or "."), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
        return result.stdout.strip()

    try:
        commit = ask("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None  # no git, no repository, no commit yet, or one that git does not trust


def code_digest() -> str | None:
    """Hex SHA-256 over the package's own Python files and suites, names and bytes: two runs with one digest ran the same code,
    whatever the working folder's git says. None where they cannot be read, as from an archive.
    """
    root, total = Path(__file__).parents[1], hashlib.sha256()
    files = sorted(path for ending in ("py", "yaml") for path in root.rglob(f"*.{ending}"))
    try:
        for file in files:
            total.update(f"{file.relative_to(root).as_posix()}\0".encode())
            total.update(hashlib.sha256(file.read_bytes()).digest())
    except OSError:  # an editor's own file that has gone since
        return None
    return total.hexdigest() if files else None


def collect_environment(folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Versions, machine and git state as JSON values; a part that cannot be found out is None. Never raises.

    Parameters
    ----------
    folder : where git is asked for commit and state; None: the working folder.

    Returns
    -------
    dict with keys ``versions``, ``code`` (`code_digest`), ``python``, ``platform``, ``cpu`` (model, cores, memory_bytes),
    ``torch`` (cuda, gpus, threads) and ``git`` (commit, dirty; None outside a repository). Host, user and paths are left
    out on purpose.
    """
    return {
        "versions": _versions(),
        "code": code_digest(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}".strip(),
        "cpu": {"model": _cpu_model(), "cores": _cores(), "memory_bytes": memory_bytes()},
        "torch": _torch(),
        "git": _git(folder),
    }
