"""Folders that were damaged, or made by someone else: JSON files, sealed JSON with safetensors, and what links and pipes do."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.cli.tiny_world import World
from tests.torture.fuzz_harness import Answer, Arena, Expect, Input, Maker
from tests.torture.fuzz_yaml import HOSTILE, get, paths, put

SCRIPT = "<script>alert('x')</script>"
JSON_HOSTILE: tuple[Any, ...] = (
    *HOSTILE, SCRIPT, f'"{SCRIPT}', "javascript:alert(1)", "</style><script>alert('x')</script>", "\ud800", "\0", -1.5, 10**400,
    [[1, 2], [3]], [None, None], [float("nan")], {"a": [1]}, ["x"] * 50, [0.5] * 50, {"x" * 300: 1}, "../../../outside/x", "\x1b[2J",
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
        raw = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000, '"\\ud800"', "1.5e300",
                          '{"a":' * 5000 + "1" + "}" * 5000])  # fmt: skip
        put(value, path, "MARK")
        return "odd JSON", json.dumps(value).replace('"MARK"', raw, 1) if text else text
    else:
        whole = rng.choice(["null", "[]", "{}", "1", '"x"', "[{}]", "", "{", '{"a": 1, "a": 2}', "\ufeff{}", "true"])
        return "another value", whole
    return what, json.dumps(value)


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


class LedgerInputs:
    """Mutators of a finished run's ledger; each makes a copy and a command that reads it."""

    def __init__(self, world: World, method: str = "keeplora++", **changes: Any) -> None:
        self.world = world
        self.run, _ = world.run(method=method, **changes)
        self.picture = world.root / "paint" / "test" / "red" / "0.png"

    def makers(self) -> dict[str, Maker]:
        found: dict[str, Maker] = {}
        for name in dir(self):
            if name.startswith("make_"):
                found[name.removeprefix("make_").replace("_", " ")] = getattr(self, name)
        return found

    def _copy(self, arena: Arena) -> tuple[Path, Sealed]:
        run = self.world.copied(self.run, arena.fresh() / "run")
        return run, Sealed(run / "ledger")

    def _input(
        self, run: Path, rng: random.Random, mutator: str, expect: Expect = "refused", *, plain: bool = False
    ) -> Input:
        """A command that reads every tensor in force; with ``plain`` one that may read the JSON files alone."""
        new = run.parent / "exported"
        more = [
            ("ledger", "log", str(run)), ("ledger", "log", str(run), "--json"), ("ledger", "show", str(run), "stripes"),
            ("ledger", "rollback", str(run), "paint"), ("ledger", "remove", str(run), "stripes"),
        ]  # fmt: skip
        words = rng.choice([
            *(more if plain else ()), ("ledger", "verify", str(run)),
            ("audit", str(run)), ("export", str(run), "--format", "peft", "--output", str(new)),
            ("export", str(run), "--format", "merged", "--output", str(new)), ("predict", str(run), "--image", str(self.picture)),
            ("resume", str(run), "--quiet"),
        ])  # fmt: skip
        # a refused resume may note its failure in the run directory, and nothing else may be written
        writes = words[0] == "resume" or words[1] in ("rollback", "remove")
        may_write = (new, run) if writes else (new,) if words[0] == "export" else ()
        part = tuple(run.parent.glob(".exported*")) if words[0] == "export" else ()
        return Input(mutator, words, expect, (*may_write, *part, *((run.parent,) if words[0] == "export" else ())))

    # --- damage: every one is refused ---

    def make_bytes_of_tensors(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        path = rng.choice(sealed.tensors())
        data = path.read_bytes()
        new = rng.choice((flip, flip, flip, cut, junk))(data, rng)
        path.write_bytes(new + b"x" if new == data else new)
        return self._input(run, rng, "bytes of tensors")

    def make_bytes_of_json(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        path = rng.choice(sealed.documents())
        old = json.loads(path.read_text(encoding="utf-8"))
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == old
        except (ValueError, RecursionError):
            same = False
        return self._input(run, rng, "bytes of JSON", "either" if same or path.name == "metrics.json" else "refused", plain=True)

    def make_value_of_json(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        path = rng.choice(sealed.documents())
        old = json.loads(path.read_text(encoding="utf-8"))
        _, text = json_mutation(old, rng)
        path.write_text(text, encoding="utf-8")
        try:
            same = json.loads(text) == old
        except (ValueError, RecursionError):
            same = False
        return self._input(run, rng, "value of JSON", "either" if same or path.name == "metrics.json" else "refused", plain=True)

    def make_tensors_swapped_between_layers(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        change_tensors(rng.choice([p for p in sealed.tensors() if p.parent != sealed.folder]), lambda t: _swap(t, rng))
        return self._input(run, rng, "tensors swapped between layers")

    def make_files_swapped(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        records = [p for p in sealed.documents() if p.name == "record.json"]
        one, two = rng.sample(rng.choice([sealed.tensors(), records]), 2)
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b)
        two.write_bytes(a)
        return self._input(run, rng, "files swapped")

    def make_records_moved(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        folders = sorted({p.parent for p in sealed.files() if p.parent != sealed.folder})
        kind = rng.randrange(4)
        if kind == 0:  # two change places
            one, two = rng.sample(folders, 2)
            names = one.name[:5] + two.name[5:], two.name[:5] + one.name[5:]
            two.rename(sealed.folder / "aside")
            one.rename(sealed.folder / names[1])
            (sealed.folder / "aside").rename(sealed.folder / names[0])
        elif kind == 1:  # one that is not the last is gone
            one = rng.choice(folders[:-1])
            one.rename(run / "gone")
        elif kind == 2:  # the first is gone and the others close up
            folders[0].rename(run / "gone")
            for i, folder in enumerate(folders[1:], 1):
                folder.rename(sealed.folder / f"{i:04d}{folder.name[4:]}")
        else:  # one is there twice
            import shutil

            shutil.copytree(rng.choice(folders), sealed.folder / f"{rng.randrange(1, 6):04d}-zzz")
        return self._input(run, rng, "records moved")

    def make_something_else_in_a_files_place(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        kind = instead(rng.choice([p for p in sealed.files() if p.name != "metrics.json"]), arena, rng)
        return self._input(run, rng, "something else in a file's place", "either" if kind == "link" else "refused")

    def make_header(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        raw_header(rng.choice(sealed.tensors()), rng)
        sealed.reseal()
        return self._input(run, rng, "lying header, hashes fit", "either")

    # --- forgery: all hashes fit, so only nonsense can be refused ---

    def make_not_finite(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            key = rng.choice(sorted(k for k, v in tensors.items() if v.is_floating_point() and v.numel()))
            tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice(
                [float("nan"), float("inf"), -float("inf")]
            )

        change_tensors(rng.choice(sealed.tensors()), change)
        sealed.reseal()
        return self._input(run, rng, "NaN or infinity, hashes fit")

    def make_shape(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            key = rng.choice(sorted(k for k, v in tensors.items() if v.numel() > 1))
            old = tensors[key]
            tensors[key] = rng.choice([lambda: old[:-1], lambda: old.reshape(-1), lambda: old.unsqueeze(0), lambda: old[..., :-1],
                                       lambda: torch.cat([old, old]), lambda: old[:0], lambda: torch.zeros(())])()  # fmt: skip

        change_tensors(rng.choice(sealed.tensors()), change)
        sealed.reseal()
        return self._input(run, rng, "wrong shape, hashes fit")

    def make_dtype(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            key = rng.choice(sorted(tensors))
            tensors[key] = tensors[key].to(
                rng.choice([torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64])
            )

        change_tensors(rng.choice(sealed.tensors()), change)
        sealed.reseal()
        return self._input(run, rng, "wrong dtype, hashes fit")

    def make_tensor_missing(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        change_tensors(rng.choice(sealed.tensors()), lambda tensors: tensors.__delitem__(rng.choice(sorted(tensors))))
        sealed.reseal()
        return self._input(run, rng, "tensor missing, hashes fit")

    def make_tensor_extra(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)

        def change(tensors: dict[str, torch.Tensor]) -> None:
            key = rng.choice(sorted(tensors))
            kind, _, layer = key.partition("/")
            name = rng.choice(
                [
                    f"{kind}/../../{layer}",
                    f"{kind}/{layer}.x",
                    layer,
                    "",
                    f"delta/{layer}",
                    f"unknown/{layer}",
                    f"A/{layer}x",
                ]
            )
            tensors[name] = tensors[key].clone()

        change_tensors(rng.choice(sealed.tensors()), change)
        sealed.reseal()
        return self._input(run, rng, "tensor too many, hashes fit")

    def make_values(self, arena: Arena, rng: random.Random) -> Input:
        """Any JSON value replaced and sealed again: what it means cannot be checked, that it can be used is."""
        run, sealed = self._copy(arena)
        path = rng.choice(sealed.documents())
        value = json.loads(path.read_text(encoding="utf-8"))
        every = [p for p in paths(value) if p != ("seal",)]
        where = rng.choice(every)
        if rng.random() < 0.25:
            del get(value, where[:-1])[where[-1]]
        else:
            put(value, where, rng.choice(JSON_HOSTILE))
        path.write_text(json.dumps(value), encoding="utf-8")
        sealed.reseal()
        return self._input(run, rng, "value of JSON, hashes fit", "either", plain=True)

    def make_scale(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        path = rng.choice([p for p in sealed.documents() if p.name == "record.json"])
        value = json.loads(path.read_text(encoding="utf-8"))
        layers = value.get("layers") or {}
        layer = layers[rng.choice(sorted(layers))]
        layer["s"] = rng.choice([None, "x", float("nan"), float("inf"), 10**400, [], True, {}])
        path.write_text(json.dumps(value), encoding="utf-8")
        sealed.reseal()
        return self._input(run, rng, "scale that is no number, hashes fit")

    def make_names(self, arena: Arena, rng: random.Random) -> Input:
        """Names that lead out of the folder, in the record and in its folder's name."""
        run, sealed = self._copy(arena)
        path = rng.choice([p for p in sealed.documents() if p.name == "record.json"])
        value = json.loads(path.read_text(encoding="utf-8"))
        value["name"] = rng.choice(
            ["../../outside/x", "/etc/x", "..", "a/../../x", "\0", "a\nb", "x" * 5000, "\\..\\x", SCRIPT, ""]
        )
        path.write_text(json.dumps(value), encoding="utf-8")
        sealed.reseal()
        if rng.random() < 0.3:
            path.parent.rename(
                path.parent.with_name(path.parent.name[:5] + rng.choice(["..", "a b", "\n", "-", "x" * 200]))
            )
        return self._input(run, rng, "names that lead out, hashes fit", "either", plain=True)

    def make_layers_swapped(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        change_tensors(rng.choice([p for p in sealed.tensors() if p.parent != sealed.folder]), lambda t: _swap(t, rng))
        sealed.reseal()
        return self._input(run, rng, "tensors swapped between layers, hashes fit", "either")


def _swap(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
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


class RunFileInputs:
    """Mutators of the other files of a run directory and of a study, and the commands that read them."""

    def __init__(self, world: World, run: Path, files: tuple[str, ...] = (), study: Path | None = None) -> None:
        self.world, self.run, self.study = world, run, study
        self.files = files or (
            "results.json",
            "data.json",
            "status.json",
            "environment.json",
            "metrics.jsonl",
            "config.yaml",
        )

    def makers(self) -> dict[str, Maker]:
        found: dict[str, Maker] = {
            "JSON changed": self.make_json, "bytes changed": self.make_bytes, "something else": self.make_instead,
            "events changed": self.make_events,
        }  # fmt: skip
        return found | ({"study changed": self.make_study} if self.study else {})

    def _input(self, arena: Arena, run: Path, rng: random.Random, mutator: str, expect: Expect = "either") -> Input:
        folder = run.parent
        study = folder / "compared"
        words = rng.choice([
            ("report", str(run)), ("report", str(run)), ("resume", str(run), "--quiet"), ("audit", str(run)),
            ("compare", str(run), "--output", str(study)), ("report", str(run), "--against", str(self.run)),
            ("predict", str(run), "--image", str(self.world.root / "paint" / "test" / "red" / "0.png")),
        ])  # fmt: skip
        may_write = (folder,) if words[0] in ("report", "resume", "compare") else ()
        return Input(mutator, words, expect, may_write, lambda _: scripted(folder))

    def make_json(self, arena: Arena, rng: random.Random) -> Input:
        run = self.world.copied(self.run, arena.fresh() / "run")
        path = run / rng.choice([name for name in self.files if name.endswith(".json")] + ["results.json", "data.json"])
        _, text = json_mutation(json.loads(path.read_text(encoding="utf-8")), rng)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return self._input(arena, run, rng, f"{path.name} changed")

    def make_events(self, arena: Arena, rng: random.Random) -> Input:
        run = self.world.copied(self.run, arena.fresh() / "run")
        path = run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        i = rng.randrange(len(lines))
        _, lines[i] = json_mutation(json.loads(lines[i]), rng)
        if rng.random() < 0.2:
            del lines[rng.randrange(len(lines))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
        return self._input(arena, run, rng, "metrics.jsonl changed")

    def make_bytes(self, arena: Arena, rng: random.Random) -> Input:
        run = self.world.copied(self.run, arena.fresh() / "run")
        path = run / rng.choice(self.files)
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        return self._input(arena, run, rng, f"bytes of {path.name} changed")

    def make_instead(self, arena: Arena, rng: random.Random) -> Input:
        run = self.world.copied(self.run, arena.fresh() / "run")
        path = run / rng.choice(self.files)
        instead(path, arena, rng)
        return self._input(arena, run, rng, f"something else for {path.name}")

    def make_study(self, arena: Arena, rng: random.Random) -> Input:
        import shutil

        assert self.study is not None
        study = arena.fresh() / "study"
        shutil.copytree(self.study, study, ignore=shutil.ignore_patterns(".lock", "ledger"))
        path = study / "study.json"
        kind = rng.randrange(4)
        if kind <= 1:
            _, text = json_mutation(json.loads(path.read_text(encoding="utf-8")), rng)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        elif kind == 2:
            path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        else:
            instead(path, arena, rng)
        words = rng.choice([("compare", str(study)), ("compare", "--output", str(study), "--only-tables")])
        return Input("study.json changed", words, "either", (study.parent,), lambda _: scripted(study.parent))


def scripted(folder: Path) -> str:
    """Whether a page holds what a run's files told it to run."""
    for page in folder.rglob("*.html"):
        if SCRIPT in page.read_text(encoding="utf-8"):
            return f"{page.name} holds the input's script"
    return ""


Check = Callable[[Answer], str]
