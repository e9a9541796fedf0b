"""Data as it comes: tables, JSON of conversations, parquet, class folders and the pictures in them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from keeplora.yaml_text import dump_yaml
from tests.cli.tiny_world import World
from tests.torture.fuzz_damage import BYTES, bad_picture, instead, json_mutation, pickle_canary, png
from tests.torture.fuzz_harness import Arena, Expect, Input, Maker


class TableInputs:
    """Mutators of small data sets of every kind; read by the doctor, or by the plan of a run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.good = png()

    def makers(self) -> dict[str, Maker]:
        found: dict[str, Maker] = {}
        for name in dir(self):
            if name.startswith("make_"):
                found[name.removeprefix("make_").replace("_", " ")] = getattr(self, name)
        return found

    # --- small data sets ---

    def _pictures(self, folder: Path, count: int = 4) -> list[str]:
        (folder / "pictures").mkdir()
        for i in range(count):
            (folder / "pictures" / f"{i}.png").write_bytes(png(8 + i, (10 * i, 40, 90)))
        return [f"pictures/{i}.png" for i in range(count)]

    def _rows(self, folder: Path, split: str = "") -> list[dict[str, Any]]:
        names = (
            self._pictures(folder, 8) if not (folder / "pictures").exists() else [f"pictures/{i}.png" for i in range(8)]
        )
        half = names[:4] if split != "test" else names[4:]
        return [{"image": name, "label": ("cat", "dog")[i % 2]} for i, name in enumerate(half)]

    def _csv(self, folder: Path, delimiter: str = ",") -> dict[str, Path]:
        files = {}
        for split in ("train", "test"):
            lines = [delimiter.join(("image", "label"))]
            lines += [delimiter.join((row["image"], row["label"])) for row in self._rows(folder, split)]
            files[split] = folder / f"{split}.{'tsv' if delimiter == chr(9) else 'csv'}"
            files[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
        return files

    def _jsonl(self, folder: Path) -> dict[str, Path]:
        files = {}
        for split in ("train", "test"):
            files[split] = folder / f"{split}.jsonl"
            text = "".join(json.dumps(row) + "\n" for row in self._rows(folder, split))
            files[split].write_text(text, encoding="utf-8")
        return files

    def _llava(self, folder: Path) -> dict[str, Path]:
        files = {}
        for split in ("train", "test"):
            entries = [
                {"id": f"{split}{i}", "image": row["image"], "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": row["label"]}]}
                for i, row in enumerate(self._rows(folder, split))
            ]  # fmt: skip
            files[split] = folder / f"{split}.json"
            files[split].write_text(json.dumps(entries), encoding="utf-8")
        return files

    def _parquet(self, folder: Path, conversations: bool = False) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = []
        for i in range(8):
            row: dict[str, Any] = {
                "split": "train" if i < 4 else "test", "origin": "made", "licence": "CC0-1.0", "image": png(8 + i, (9 * i, 90,
                30)),
            }  # fmt: skip
            if conversations:
                talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": ("cat", "dog")[i % 2]}]
                row |= {"id": f"q{i}", "conversations": json.dumps(talk), "kind": "what"}
            else:
                row |= {"task": "animals", "label": i % 2, "class_name": ("cat", "dog")[i % 2], "item": f"i{i}"}
            rows.append(row)
        file = folder / "data.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file

    # --- commands ---

    def _doctor(
        self, folder: Path, mutator: str, spec: dict[str, Any], expect: Expect = "either", **more: Any
    ) -> Input:
        rest = {"licence": "CC0-1.0"} | more
        suite = {
            "name": "own",
            "description": "made up",
            "data": "external",
            "tasks": [{"name": "animals", **spec, **rest}],
        }
        file = folder / "own.yaml"
        file.write_text(dump_yaml(suite), encoding="utf-8", errors="surrogatepass")
        words = ("suites", "doctor", str(file), "--data", str(folder), "--full")
        return Input(mutator, words, expect, (folder / "nothing",))

    def _plan(self, folder: Path, mutator: str, spec: dict[str, Any], expect: Expect = "either") -> Input:
        values = self.world.config(tasks=[{"name": "animals", **spec}], base_dir=str(folder))
        values.pop("probes")
        file = folder / "e.yaml"
        file.write_text(dump_yaml(values), encoding="utf-8", errors="surrogatepass")
        cache = Path(os.environ.get("KEEPLORA_CANARY", folder / "x")).parents[1] / "home" / "hf"
        return Input(mutator, ("run", str(file), "--dry-run"), expect, (cache,))

    def _read(
        self, rng: random.Random, folder: Path, mutator: str, spec: dict[str, Any], expect: Expect = "either"
    ) -> Input:
        return rng.choice((self._doctor, self._plan))(folder, mutator, spec, expect)

    def _table(self, rng: random.Random, folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        files = rng.choice((self._csv, self._jsonl, lambda f: self._csv(f, "\t")))(folder)
        return files, {"source": "table", **{split: path.name for split, path in files.items()}}

    # --- what must be read ---

    def make_sound(self, arena: Arena, rng: random.Random) -> Input:
        """Nothing is wrong: tables with spreadsheets' marks and line ends, absolute paths, quoted names."""
        folder = arena.fresh()
        files, spec = self._table(rng, folder)
        text = files["train"].read_text(encoding="utf-8")
        kind = rng.randrange(4)
        if kind == 0:
            text = "\ufeff" + text
        elif kind == 1:
            text = text.replace("\n", "\r\n")
        elif kind == 2:
            text = text.replace("pictures/", f"{folder}/pictures/")
        else:
            text = text.replace("\n", "\n\n").rstrip("\n")
        files["train"].write_text(text, encoding="utf-8", newline="")
        return self._plan(folder, "sound table", spec, "accepted")

    # --- bytes and structure ---

    def make_bytes_of_a_table(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files, spec = self._table(rng, folder)
        path = rng.choice(list(files.values()))
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        return self._read(rng, folder, "bytes of a table", spec)

    def make_ragged_table(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files = self._csv(folder)
        path = rng.choice(list(files.values()))
        lines = path.read_text(encoding="utf-8").splitlines()
        at = rng.randrange(1, len(lines))
        image, label = lines[at].split(",")
        lines[at] = rng.choice([f"{image}", f"{image},{label},x", f'"{image},{label}', f'{image},"{label}', f'{image},"a"b"',
            ",", f"{image},",
                                f",{label}", "x" * 200_000 + ",cat", f'"{"," * 200_000}",cat', f"{image}\0,{label}",
                                f"{image},\x1b[2J"])  # fmt: skip
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self._read(rng, folder, "ragged table", {"source": "table", "train": "train.csv", "test": "test.csv"})

    def make_header_of_a_table(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files = self._csv(folder)
        text = files["train"].read_text(encoding="utf-8")
        head = rng.choice(["", "image,image", "a,b", ",", "image;label", "image", '"image,label', "label,image", "\0,\0",
            "image,label,",
                           "i" * 50_000 + ",label", "IMAGE,LABEL"])  # fmt: skip
        files["train"].write_text(text.replace("image,label", head, 1), encoding="utf-8")
        return self._read(
            rng, folder, "header of a table", {"source": "table", "train": "train.csv", "test": "test.csv"}
        )

    def make_encoding_of_a_table(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files = self._csv(folder)
        data = files["train"].read_text(encoding="utf-8").replace("cat", "Käthe").encode(rng.choice(["latin-1", "utf-16",
            "utf-32"]))  # fmt: skip
        files["train"].write_bytes(data)
        return self._read(rng, folder, "encoding of a table", {"source": "table", "train": "train.csv", "test": "test.csv"},
            "refused")  # fmt: skip

    def make_rows_of_json(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files = self._jsonl(folder)
        path = rng.choice(list(files.values()))
        lines = path.read_text(encoding="utf-8").splitlines()
        at = rng.randrange(len(lines))
        _, lines[at] = json_mutation(json.loads(lines[at]), rng)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
        return self._read(
            rng, folder, "rows of JSON", {"source": "table", "train": "train.jsonl", "test": "test.jsonl"}
        )

    def make_conversations(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files = self._llava(folder)
        path = rng.choice(list(files.values()))
        if rng.random() < 0.8:
            _, text = json_mutation(json.loads(path.read_text(encoding="utf-8")), rng)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
        else:
            path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        spec = {"source": "llava", "train": "train.json", "test": "test.json", "images": ".", "scorer": "exact"}
        return self._doctor(folder, "conversations", spec)

    def make_questions_table(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        rows = self._rows(folder)
        lines = ["image,question,answer", *(f"{r['image']},What is it?,{r['label']}" for r in rows)]
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(["", ",,", "x", lines[at] + ",x", lines[at].replace("What", "<image><image><video>"),
            lines[at].upper(),
                                lines[at].replace(",", ";"), '"' + lines[at]])  # fmt: skip
        for split in ("train", "test"):
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        spec = {"source": "vqa-table", "train": "train.csv", "test": "test.csv", "images": ".", "scorer": "exact"}
        return self._doctor(folder, "table of questions", spec)

    def make_parquet(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        file = self._parquet(folder, conversations := rng.random() < 0.5)
        file.write_bytes(rng.choice(BYTES)(file.read_bytes(), rng))
        if conversations:
            return self._doctor(
                folder, "bytes of parquet", {"source": "llava-pack", "path": "data.parquet", "scorer": "exact"}
            )
        spec = {"source": "pack", "path": "data.parquet"}
        return self._read(rng, folder, "bytes of parquet", spec)

    def make_columns_of_parquet(self, arena: Arena, rng: random.Random) -> Input:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = arena.fresh()
        conversations = rng.random() < 0.5
        file = self._parquet(folder, conversations)
        rows = pq.read_table(file).to_pylist()
        key = rng.choice(list(rows[0]))
        values = rng.choice([[None] * 8, list(range(8)), [float("nan")] * 8, [b"\xff"] * 8, [""] * 8, ["../../outside/x"] * 8,
            [[1]] * 8,
                             [{"a": 1}] * 8, [True] * 8, ["x" * 100_000] * 8, [-(2**62)] * 8, ['{"a": NaN}'] * 8,
                             ["[" * 50_000] * 8])  # fmt: skip
        if rng.random() < 0.2:
            for row in rows:
                del row[key]
        else:
            rows = [{**row, key: value} for row, value in zip(rows, values)]
        pq.write_table(pa.Table.from_pylist(rows), file)
        if conversations:
            return self._doctor(
                folder, "columns of parquet", {"source": "llava-pack", "path": "data.parquet", "scorer": "exact"}
            )
        return self._read(rng, folder, "columns of parquet", {"source": "pack", "path": "data.parquet"})

    def make_datasets_folder(self, arena: Arena, rng: random.Random) -> Input:
        """A folder for `datasets` with a loading script and a pickle in it: neither is run."""
        folder = arena.fresh()
        inner = folder / "set"
        inner.mkdir()
        for name in ("set.py", "dataset.py", "__init__.py"):
            (inner / name).write_text(f"open({str(arena.canary)!r}, 'w').write('x')\n", encoding="utf-8")
        (inner / "data.pkl").write_bytes(pickle_canary(arena.canary))
        kind = rng.randrange(4)
        if kind == 0:
            (inner / "state.json").write_text(rng.choice(["{}", "x",
                '{"_data_files": [{"filename": "../../outside/victim.txt"}]}']))  # fmt: skip
            (inner / "dataset_info.json").write_text("{}")
        elif kind == 1:
            (inner / "metadata.jsonl").write_text('{"file_name": "../../../outside/victim.txt"}\n')
        elif kind == 2:
            (inner / "dataset_dict.json").write_text('{"splits": ["../../x", "train"]}')
        spec = {"source": "datasets", "path": rng.choice(["set", "set/set.py", "set/data.pkl"])}
        return self._plan(folder, "folder with code for datasets", spec, "refused")

    # --- files ---

    def make_something_else_for_a_table(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        files, spec = self._table(rng, folder)
        kind = instead(rng.choice(list(files.values())), arena, rng)
        return self._read(rng, folder, "something else for a table", spec, "either" if kind == "link" else "refused")

    def make_something_else_for_a_picture(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        _, spec = self._table(rng, folder)
        kind = instead(folder / "pictures" / f"{rng.randrange(8)}.png", arena, rng)
        return self._read(rng, folder, "something else for a picture", spec, "either" if kind == "link" else "refused")

    def make_bad_picture(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        _, spec = self._table(rng, folder)
        _, data = bad_picture(rng, self.good)
        (folder / "pictures" / f"{rng.randrange(8)}.png").write_bytes(data)
        return self._read(rng, folder, "bad picture", spec, "refused")

    def make_bytes_of_a_picture(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        _, spec = self._table(rng, folder)
        path = folder / "pictures" / f"{rng.randrange(8)}.png"
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        return self._read(rng, folder, "bytes of a picture", spec)

    def make_paths_in_a_table(self, arena: Arena, rng: random.Random) -> Input:
        """Reading what a table names is all that happens: nothing else than a picture is ever taken for one."""
        folder = arena.fresh()
        self._rows(folder)
        (folder / "loop.png").symlink_to(folder / "loop.png")
        name = rng.choice(["../../outside/victim.txt", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "~/x.png",
            "~nobody/x.png",
                           "a\0b.png", "x" * 5000 + ".png", "loop.png", ".", "..", "/", "pictures", "http://x/y.png",
                           "file:///etc/passwd",
                           "pictures/0.png\n", "\udc80.png", "con", "pictures/../pictures/../../x.png", "", " "])  # fmt: skip
        rows = [{"image": name, "label": "cat"}, *self._rows(folder)[1:]]
        for split in ("train", "test"):
            text = "".join(json.dumps(row) + "\n" for row in (rows if split == "train" else self._rows(folder, "test")))
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        spec = {"source": "table", "train": "train.jsonl", "test": "test.jsonl"}
        return self._read(rng, folder, "paths in a table", spec, "refused" if name != "pictures/0.png\n" else "either")

    def make_class_folders(self, arena: Arena, rng: random.Random) -> Input:
        folder = arena.fresh()
        for split in ("train", "test"):
            for i, label in enumerate(("cat", "dog")):
                for j in range(3):
                    path = folder / "set" / split / label / f"{j}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(png(8 + j, (90 * i, 60 if split == "test" else 20, 9 * j)))
        place = folder / "set" / "train" / "cat"
        kind = rng.randrange(8)
        if kind == 0:
            (place / "up").symlink_to("..")
        elif kind == 1:
            os.mkfifo(place / "pipe.png")
        elif kind == 2:
            (place / "zero.png").symlink_to("/dev/zero")
        elif kind == 3:
            (place / "gone.png").symlink_to("nowhere.png")
        elif kind == 4:
            (place.parent / "a\nb").mkdir()
            (place.parent / "a\nb" / "0.png").write_bytes(self.good)
        elif kind == 5:
            (place / "3.png").write_bytes(bad_picture(rng, self.good)[1])
        elif kind == 6:
            os.mkdir(os.fsencode(place.parent) + b"/\xff\xfe")
            (Path(os.fsdecode(os.fsencode(place.parent) + b"/\xff\xfe")) / "0.png").write_bytes(self.good)
        else:
            (place / "dir.png").mkdir()
        expect: Expect = "refused" if kind in (0, 1, 2, 3, 5) else "either"
        return self._read(rng, folder, "class folders", {"source": "folder", "path": "set"}, expect)
