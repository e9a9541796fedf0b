"""Damage to files of any kind: bytes, links and pipes in their place, JSON, and sealed JSON with safetensors."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.torture.fuzz_harness import Arena
from tests.torture.fuzz_yaml import HOSTILE, get, paths, put

SCRIPT = "<script>alert('x')</script>"
JSON_HOSTILE: tuple[Any, ...] = (
    *HOSTILE, SCRIPT, f'"{SCRIPT}', "javascript:alert(1)", "</style><script>alert('x')</script>", "\ud800", "\0", -1.5, 10**400,
    [[1, 2], [3]], [None, None], [float("nan")], {"a": [1]}, ["x"] * 50, [0.5] * 50, {"x" * 300: 1}, "../../../outside/x",
    "\x1b[2J",
)  # fmt: skip


# --- bytes ---


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit changed."""
    at, changed = rng.randrange(len(data)), bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def junk(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 8, 200])) + data[at + rng.choice([0, 8]) :]


def zeros(data: bytes, rng: random.Random) -> bytes:
    """The tail as zeros, as a file system leaves it after a power cut."""
    at = rng.randrange(len(data))
    return data[:at] + b"\0" * (len(data) - at)


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, cut, junk, zeros)


def instead(path: Path, arena: Arena, rng: random.Random) -> str:
    """Something else in a file's place; returns what. A link to a copy of itself is the only one that may be read."""
    data = path.read_bytes()
    path.unlink()
    kind = rng.choice(["nothing", "empty", "folder", "pipe", "device", "endless link", "broken link", "sparse", "link"])
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/proc/self/mem"]))
    elif kind == "endless link":
        path.symlink_to(path)
    elif kind == "broken link":
        path.symlink_to(path.with_name("not-there"))
    elif kind == "sparse":
        with open(path, "wb") as handle:
            handle.truncate(40 << 30)
    elif kind == "link":
        other = path.with_name(f".elsewhere-{path.name}")
        other.write_bytes(data)
        path.symlink_to(other)
    return kind


# --- JSON ---


def json_mutation(value: Any, rng: random.Random) -> tuple[str, str]:
    """(what was done, text) of a JSON value with one thing changed."""
    value = copy.deepcopy(value)
    every = list(paths(value))
    if not every:
        return "nothing", json.dumps(value)
    path = rng.choice(every)
    parent, kind = get(value, path[:-1]), rng.randrange(9)
    if kind <= 3:
        put(value, path, rng.choice(JSON_HOSTILE))
        what = "hostile value"
    elif kind == 4:
        del parent[path[-1]]
        what = "entry left out"
    elif kind == 5:
        lists = [p for p in every if isinstance(get(value, p), list) and get(value, p)]
        if lists:
            found = get(value, rng.choice(lists))
            rng.choice([found.pop, lambda: found.append(found[0]), found.reverse, lambda: found.extend(found * 3)])()
        what = "list changed"
    elif kind == 6:
        one, two = rng.choice(every), rng.choice(every)
        if one[: len(two)] != two and two[: len(one)] != one:
            a, b = get(value, one), get(value, two)
            put(value, one, b)
            put(value, two, a)
        what = "entries swapped"
    elif kind == 7:
        text = json.dumps(value)
        raw = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000, '"\\ud800"',
            "1.5e300",
                          '{"a":' * 5000 + "1" + "}" * 5000])  # fmt: skip
        put(value, path, "MARK")
        return "odd JSON", json.dumps(value).replace('"MARK"', raw, 1) if text else text
    else:
        whole = rng.choice(["null", "[]", "{}", "1", '"x"', "[{}]", "", "{", '{"a": 1, "a": 2}', "\ufeff{}", "true"])
        return "another value", whole
    return what, json.dumps(value)


# --- pictures and pickles ---


def png(side: int = 8, colour: tuple[int, int, int] = (200, 40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A few bytes that say they are a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * min(1 + 3 * width, 1 << 22))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bad_picture(rng: random.Random, good: bytes) -> tuple[str, bytes]:
    """(what, bytes) of a picture that must not be taken for a good one."""
    text_bomb = io.BytesIO()
    Image.new("RGB", (4, 4)).save(text_bomb, "PNG")
    kinds: list[tuple[str, bytes]] = [
        ("empty", b""), ("text", b"not a picture"), ("cut short", good[: len(good) // 2]), ("a page", b"<svg onload=alert(1)>"),
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n"), ("a bomb", png_bomb(60_000, 60_000)),
        ("a wide bomb", png_bomb(2_000_000, 1)), ("no size", png_bomb(0, 0)), ("GIF header", b"GIF89a\xff\xff\xff\xff"),
        ("TIFF header", b"II*\0" + b"\xff" * 64), ("zip", b"PK\x03\x04" + b"\0" * 64), ("zeros", b"\0" * 300),
        ("negative size", good[:16] + b"\xff\xff\xff\xff" * 2 + good[24:]),
    ]  # fmt: skip
    return rng.choice(kinds)


def pickle_canary(canary: Path) -> bytes:
    """A pickle that makes the canary when it is loaded."""
    import pickle

    class Run:
        def __reduce__(self) -> tuple[Any, tuple[str, str]]:
            return open, (str(canary), "w")

    return pickle.dumps(Run())


# --- sealed JSON and safetensors, whatever the format's fields are called ---


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Sealed:
    """A folder of sealed JSON files and safetensors, whose hashes can all be made to fit again after a change.

    The files need not be known: a string that is the SHA-256 of another file (or of a file's tensors) before the change is
    that file's new one after it, and a ``seal`` is the SHA-256 of the other keys.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = {digest(p): p for p in self.files()}

    def files(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file())

    def tensors(self) -> list[Path]:
        return [p for p in self.files() if p.suffix == ".safetensors"]

    def documents(self) -> list[Path]:
        return [p for p in self.files() if p.suffix == ".json"]

    def reseal(self) -> None:
        for _ in range(3 + len(self.documents())):  # each pass carries a changed hash at least one file further
            for path in self.documents():
                self.before |= {digest(file): file for file in self.files()}  # what is replaced once is replaced again
                value = self._renewed(json.loads(path.read_text(encoding="utf-8")))
                if isinstance(value, dict) and "seal" in value:
                    rest = {k: v for k, v in value.items() if k != "seal"}
                    value["seal"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode("utf-8")).hexdigest()
                path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _renewed(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._renewed(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._renewed(entry) for entry in value]
        path = self.before.get(value) if isinstance(value, str) else None
        return digest(path) if path is not None and path.is_file() else value


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)


def raw_header(path: Path, rng: random.Random) -> None:
    """A safetensors header that lies."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    kind = rng.randrange(8)
    if kind == 0:
        path.write_bytes(struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 10**12, 0, 1, size + 1])) + data[8:])
        return
    if kind == 1:
        header[name]["data_offsets"] = rng.choice([[0, 2**62], [-1, 5], [5, 1], [2**64, 2**64 + 4], [0, 0]])
    elif kind == 2:
        header[name]["shape"] = rng.choice([[2**40, 2**40], [-1, 4], [], [0], [1] * 100, ["x"]])
    elif kind == 3:
        header[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "X", "F8_E4M3", 1])
    elif kind == 4:
        header[rng.choice(["", "\0", "../../x", "A/" + "x" * 5000])] = header.pop(name)
    elif kind == 5:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 6:
        header["__metadata__"] = rng.choice([{"x": 1}, [], {"x": "y" * 10_000}])
    else:
        header[name] = rng.choice([None, {}, [], "x"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def swap_two(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Two different tensors of one kind and shape change places."""
    keys = sorted(tensors)
    rng.shuffle(keys)
    for one in keys:
        for two in keys:
            same = one.split("/")[0] == two.split("/")[0] and tensors[one].shape == tensors[two].shape
            if same and not torch.equal(tensors[one], tensors[two]):
                tensors[one], tensors[two] = tensors[two], tensors[one]
                return
    raise AssertionError("no two tensors to swap")
