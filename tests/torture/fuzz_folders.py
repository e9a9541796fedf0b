"""Ledgers and run directories that were damaged, or made by someone else."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.cli.tiny_world import World
from tests.torture.fuzz_damage import (
    BYTES,
    JSON_HOSTILE,
    SCRIPT,
    Sealed,
    change_tensors,
    cut,
    flip,
    instead,
    json_mutation,
    junk,
    raw_header,
    swap_two,
)
from tests.torture.fuzz_harness import Arena, Expect, Input, Maker
from tests.torture.fuzz_yaml import get, paths, put


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
        return self._input(
            run, rng, "bytes of JSON", "either" if same or path.name == "metrics.json" else "refused", plain=True
        )

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
        return self._input(
            run, rng, "value of JSON", "either" if same or path.name == "metrics.json" else "refused", plain=True
        )

    def make_tensors_swapped_between_layers(self, arena: Arena, rng: random.Random) -> Input:
        run, sealed = self._copy(arena)
        change_tensors(
            rng.choice([p for p in sealed.tensors() if p.parent != sealed.folder]), lambda t: swap_two(t, rng)
        )
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
            others = [
                old[:-1],
                old.reshape(-1),
                old.unsqueeze(0),
                old[..., :-1],
                torch.cat([old, old]),
                old[:0],
                torch.zeros(()),
            ]
            tensors[key] = rng.choice(
                [other for other in others if other.shape != old.shape]
            )  # a vector is flat already

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
        change_tensors(
            rng.choice([p for p in sealed.tensors() if p.parent != sealed.folder]), lambda t: swap_two(t, rng)
        )
        sealed.reseal()
        return self._input(run, rng, "tensors swapped between layers, hashes fit", "either")


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
