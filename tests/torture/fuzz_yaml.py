"""Configurations as an accident or an attacker would write them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keeplora.experiment.config import load_config
from keeplora.yaml_text import dump_yaml, parse_yaml
from tests.cli.tiny_world import World
from tests.torture.fuzz_harness import Answer, Arena, Expect, Input, Maker

KeyPath = tuple[str | int, ...]

PLAUSIBLE: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 7, 16, 100, 1000, 10_000, 0.1, 0.25, 0.5, 0.9, 1.0, 1e-6, "cpu", "cuda", "bf16", "fp32",
    "4bit",
    "8bit", "onecycle", "cosine", "constant", "gradients", "features", "validation", "test", "own", "seen", "all", "warn", "undo",
    "lora", "keeplora", "keeplora++", "keeplora-cls", "full-ft", "zero-shot", "joint", "replay", "ewc", "o-lora", "gpm",
    "inflora",
    "default", "mtil", "ucit", "shuffle-3", "paint", "paint/test", "q_proj", ["q_proj"], ["q_proj", "v_proj"], ".*q_proj",
    "*", "(",
    {"vision": 0.5, "text": 1}, {"default": 2}, {"paint": 3, "default": 1}, {"vision": 2, "default": 4}, [0.1, 1.0], [1.0, 1.0],
    ["dots", "paint", "stripes"], ["tensorboard"], ["wandb"], "clip", "mean", "uniform", "frozen", "protected", "free", "full",
)  # fmt: skip

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e-320, 1e308, float("inf"), float("-inf"),
    float("nan"), "", " ", "x", "x" * 20_000, "no", "1e400", "default", "all", "auto", "embedded ", "äöü\u202e\u200b", "a\nb",
    "a\x85b", "\u2028", "../../etc/passwd", "/etc/passwd", "~", "~root/x", "~nobody-there/x", "/dev/zero", "/dev/stdin",
    "/proc/self/mem", ".", "..", "C:\\x", "file:///etc/passwd", "https://example.org/x", "con", "{}", "{0.__class__}", "%s%n",
    "[bold]x[/bold]", "[/]", "<script>alert(1)</script>", "!!python/object:os.system", [], [[]], [None], ["x"], ["x", "x"],
    [1, "x", None], {}, {"": 1}, {"x": 1}, {"default": None}, {"default": float("nan")}, {"default": "x"}, {"default": [1]},
    {1: 2}, {None: None}, [{}], [{"name": "x"}], {"x": {"x": {"x": {}}}},
)  # fmt: skip


def paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key path of a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def get(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value[part]
    return value


def put(value: Any, path: KeyPath, new: Any) -> None:
    get(value, path[:-1])[path[-1]] = new


def typo(word: str, rng: random.Random) -> str:
    """A slip of one finger that is not the same word."""
    at = rng.randrange(len(word))
    kind = rng.randrange(4)
    other = word[:at] + rng.choice("abcdefgxyz_") * (kind != 0) + word[at + (kind < 2) :] if kind < 3 else word.upper()
    return other if other != word and other else word + "x"


class YamlInputs:
    """Mutators of one whole and valid configuration; each makes a file and the command that reads it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.base: dict[str, Any] = world.config()
        whole = load_config(self.base).resolved()
        whole |= {"early_stopping": {"patience": 2}, "accept": {"max_drop": 5.0, "action": "warn"}, "validation": 0.2}
        self.whole = json.loads(json.dumps(whole))
        self.schema = [path for path in paths(self.whole) if path[:1] not in (("tasks",), ("probes",))]

    def makers(self) -> dict[str, Maker]:
        found: dict[str, Maker] = {}
        for name in dir(self):
            if name.startswith("make_"):
                found[name.removeprefix("make_").replace("_", " ")] = getattr(self, name)
        return found

    def _input(self, arena: Arena, mutator: str, text: str | bytes, expect: Expect = "either") -> Input:
        file = arena.fresh() / "e.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
        return Input(mutator, ("run", str(file), "--dry-run"), expect, accepted=lambda _: reads_back(file))

    def _copy(self, rng: random.Random) -> dict[str, Any]:
        return copy.deepcopy(rng.choice((self.base, self.whole)))

    # --- values ---

    def make_value_replaced(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        path = rng.choice(self.schema)
        put(values, path, rng.choice(HOSTILE))
        return self._input(arena, "hostile value", dump_yaml(values))

    def make_value_plausible(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        for path in rng.sample(self.schema, rng.choice([1, 1, 2])):
            if len(path) == 1 or isinstance(get(values, path[:-1]), dict):
                put(values, path, rng.choice(PLAUSIBLE))
        return self._input(arena, "plausible value", dump_yaml(values))

    def make_value_of_a_task_replaced(self, arena: Arena, rng: random.Random) -> Input:
        values = self._copy(rng)
        spec = rng.choice(values["tasks"] + values["probes"])
        key = rng.choice([*spec, "classes", "templates", "train", "test", "validation", "max_pixels", "on_error", "check",
                          "duplicates", "split_seed", "licence", "expect", "max_skipped", "part", "split_classes",
                          "max_train_per_class"])  # fmt: skip
        spec[key] = rng.choice(HOSTILE)
        return self._input(arena, "hostile value in a task", dump_yaml(values))

    def make_two_values_swapped(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        one, two = rng.sample(self.schema, 2)
        if one[: len(two)] != two and two[: len(one)] != one:
            a, b = get(values, one), get(values, two)
            put(values, one, b)
            put(values, two, a)
        return self._input(arena, "two values swapped", dump_yaml(values))

    def make_number_not_finite(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        numbers = [
            p for p in self.schema if isinstance(get(values, p), int | float) and not isinstance(get(values, p), bool)
        ]
        put(values, rng.choice(numbers), rng.choice([float("nan"), float("inf"), float("-inf")]))
        return self._input(arena, "NaN or infinity", dump_yaml(values), "refused")

    def make_number_negative_or_huge(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        numbers = [
            p for p in self.schema if isinstance(get(values, p), int | float) and not isinstance(get(values, p), bool)
        ]
        put(values, rng.choice(numbers), rng.choice([-1, -0.001, -(10**18), 10**18, 10**400, 1e300]))
        return self._input(arena, "negative or huge number", dump_yaml(values))

    def make_wrong_type(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        scalars = [p for p in self.schema if isinstance(get(values, p), int | float) and p[0] != "model"]
        put(values, rng.choice(scalars), rng.choice([["x"], {"x": {}}, "many", "", [1, 2, 3]]))
        return self._input(arena, "wrong type", dump_yaml(values), "refused")

    def make_paths(self, arena: Arena, rng: random.Random) -> Input:
        """Paths that lead out, nowhere, into devices and through links: reading them is harmless, hanging is not."""
        values, folder = self._copy(rng), arena.fresh()
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "out").symlink_to(arena.outside)
        hostile = [
            "../../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/mem", "~/.ssh/id_rsa", "~",
            "a\nb", "a\tb", "x" * 5000, "a/" * 3000, str(folder / "loop"), str(folder / "out"), "\\\\server\\share", "nul",
            str(folder / "loop" / "x"), "/", "/proc", "", "\u202egnp.x", "~nobody-there/x", "$HOME", "`id`", "-rf",
        ]  # fmt: skip
        places: list[KeyPath] = [
            ("model",), ("base_dir",), ("output",), ("data_dir",), ("validation",), ("suite",), ("tasks", 0, "path"),
            ("tasks", 1, "train"), ("tasks", 0, "test"), ("probes", 0, "path"), ("tasks", 0, "name"), ("name",),
        ]  # fmt: skip
        path = rng.choice(places)
        if path == ("suite",):
            values.pop("tasks")
        put(values, path, rng.choice(hostile))
        return self._input(arena, "hostile path", dump_yaml(values))

    # --- keys ---

    def make_typing_error_in_a_key(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        # what a mapping over tasks, towers or method options may hold is the mapping's own affair
        keys = [p for p in paths(values) if isinstance(p[-1], str) and p[:2] != ("tuner", "options")]
        path = rng.choice(keys)
        parent = get(values, path[:-1])
        value = parent.pop(path[-1])
        parent[typo(str(path[-1]), rng)] = value
        return self._input(arena, "typing error in a key", dump_yaml(values), "refused")

    def make_key_moved(self, arena: Arena, rng: random.Random) -> Input:
        values = copy.deepcopy(self.whole)
        path = rng.choice(self.schema)
        value = get(values, path)
        sections = [p for p in ((), *self.schema) if isinstance(get(values, p), dict) and p[: len(path)] != path]
        get(values, path[:-1]).pop(path[-1])
        target = get(values, rng.choice(sections))
        target[path[-1]] = value
        return self._input(arena, "key moved", dump_yaml(values))

    def make_key_left_out(self, arena: Arena, rng: random.Random) -> Input:
        values = self._copy(rng)
        path = rng.choice(list(paths(values)))
        parent = get(values, path[:-1])
        del parent[path[-1]]
        return self._input(arena, "key left out", dump_yaml(values))

    def make_key_given_twice(self, arena: Arena, rng: random.Random) -> Input:
        key, values = rng.choice(["method", "model", "tasks", "tuner", "seed"]), self._copy(rng)
        twice = f"{key}: {json.dumps(values.get(key, 1))}\n"
        rest = {k: v for k, v in values.items() if k != key}
        text = twice + dump_yaml(rest) + (twice if rng.random() < 0.5 else f'"{key}": x\n')
        return self._input(arena, "key given twice", text, "refused")

    def make_odd_keys(self, arena: Arena, rng: random.Random) -> Input:
        keys = ("1", "null", "true", "[a]", "{a: b}", "? [a, b]", ".nan", "1.5", "''", "'a.b'", '"a\\nb"', '"\\ud800"', "💥",
                '"\\0"', "-", "0o17", "2001-01-01")  # fmt: skip
        line = f"{rng.choice(keys)}: 1\n"
        if rng.random() < 0.5:
            return self._input(arena, "odd key", dump_yaml(self._copy(rng)) + line, "refused")
        section = rng.choice(("tuner", "training", "model", "video", "judge", "generation"))
        values = copy.deepcopy(self.whole)
        rest = {k: v for k, v in values.items() if k != section}
        return self._input(arena, "odd key", f"{dump_yaml(rest)}{section}:\n  {line}", "refused")

    # --- YAML itself ---

    def make_tag(self, arena: Arena, rng: random.Random) -> Input:
        canary = str(arena.canary)
        tags = (
            f"!!python/object/apply:os.system ['touch {canary}']", f"!!python/object/apply:pathlib.Path.touch ['{canary}']",
            "!!python/name:os.system", "!!python/module:os", "!!python/object:os.system {}",
            f"!!python/object/new:os.system ['touch {canary}']", "!!python/tuple [1]", "!!binary '?'", "!!binary aGVsbG8=",
            "!!timestamp 'x'", "!!timestamp 2001-01-01", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!int x", "!!int ''",
            "!!float x", "!!bool x", "!!null x", "!!map [a]", "!!seq {a: b}", "!!str [a]", "!x y", "!<tag:yaml.org,2002:x> y",
            "!!merge x", "!!value x", "!!int 0x", "!!int 1:x", "!!float 1:x", "!!timestamp 9999-99-99", "!!int " + "9" * 5000,
        )  # fmt: skip
        values = self._copy(rng)
        key = rng.choice(["method", "seed", "name", "tasks", "model", "tuner", "preset"])
        values.pop(key, None)
        return self._input(arena, "tag", f"{dump_yaml(values)}{key}: {rng.choice(tags)}\n", "refused")

    def make_bomb(self, arena: Arena, rng: random.Random) -> Input:
        kind = rng.randrange(6)
        width, depth = rng.choice([(9, 9), (2, 40), (10, 12)])
        if kind == 0:
            lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth))]
            text = "\n".join([*lines, f"name: *a{depth - 1}"])
        elif kind == 1:
            lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(width))}}}"
                                         for i in range(1, depth))]  # fmt: skip
            text = "\n".join([*lines, f"tuner: *a{depth - 1}"])
        elif kind == 2:
            lines = [
                "a0: &a0 {x: 1}",
                *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, depth)),
            ]
            text = "\n".join([*lines, f"tuner: *a{depth - 1}"])
        elif kind == 3:
            text = "tuner: " + rng.choice("[{") * rng.choice([200, 2000, 100_000])
        elif kind == 4:
            text = "\n".join(" " * i + f"k{i}:" for i in range(rng.choice([300, 3000])))
        else:
            text = rng.choice(["a: &a [*a]\n", "a: &a {b: *a}\n", "tuner: &t\n  <<: *t\n", "a: *nothing\n"])
        return self._input(arena, "bomb", f"{dump_yaml(self.base)}{text}\n", "refused")

    def make_large(self, arena: Arena, rng: random.Random) -> Input:
        size = 10 << 20
        text = rng.choice(("name: " + "x" * size, 'name: "' + "\\x41" * (size // 4) + '"', "seed: " + "9" * size,
            "#" + "x" * size,
                           "name: |\n" + "  line\n" * (size // 7), "x" * size, "[" * size))  # fmt: skip
        return self._input(arena, "large file", f"{text}\n{dump_yaml(self.base)}", "refused")

    def make_digits(self, arena: Arena, rng: random.Random) -> Input:
        value = rng.choice(["9" * 5000, "-" + "9" * 5000, "1e" + "9" * 300, "0." + "0" * 5000 + "1", "9" * 400 + ".5", "1e400",
                            "-1e999", "9" * 4301])  # fmt: skip
        values = copy.deepcopy(self.whole)
        numbers = [
            p for p in self.schema if isinstance(get(values, p), int | float) and not isinstance(get(values, p), bool)
        ]
        put(values, rng.choice(numbers), "MARK")
        return self._input(arena, "too many digits", dump_yaml(values).replace("MARK", value))

    def make_characters(self, arena: Arena, rng: random.Random) -> Input:
        text = dump_yaml(self._copy(rng)).encode()
        at = rng.randrange(len(text))
        junk = rng.choice([b"\0", b"\x07", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1b[2J", b"\t", b"\r", b"\x7f", b"\xc2\x85",
                           b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"%", b"@", b"`", b"!", b"&", b"*",
                           b"\xf4\x90\x80\x80"])  # fmt: skip
        return self._input(arena, "odd characters", text[:at] + junk + text[at:])

    def make_surrogates(self, arena: Arena, rng: random.Random) -> Input:
        values = self._copy(rng)
        path = rng.choice([p for p in paths(values) if isinstance(get(values, p), str)])
        put(values, path, "MARK")
        return self._input(arena, "half of a character", dump_yaml(values).replace("MARK", '"\\ud83d"'), "refused")

    def make_encoding(self, arena: Arena, rng: random.Random) -> Input:
        text = dump_yaml(self.base)
        encoding = rng.choice(["utf-16", "utf-16-le", "utf-32", "cp500"])
        return self._input(arena, "other encoding", text.encode(encoding), "refused")

    def make_bytes(self, arena: Arena, rng: random.Random) -> Input:
        data = bytearray(dump_yaml(self._copy(rng)).encode())
        for _ in range(rng.choice([1, 2, 8, 64])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return self._input(arena, "bytes changed", bytes(data))

    def make_lines(self, arena: Arena, rng: random.Random) -> Input:
        lines = dump_yaml(self._copy(rng)).splitlines()
        kind, i, j = rng.randrange(5), rng.randrange(len(lines)), rng.randrange(len(lines))
        if kind == 0:
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == 1:
            lines.insert(i, lines[j])
        elif kind == 2:
            lines[i] = rng.choice(["  ", "\t", "- ", "? ", ": ", "# ", "--- ", "... ", "| ", "> "]) + lines[i]
        elif kind == 3:
            del lines[i : i + rng.randrange(1, 5)]
        else:
            lines = lines[:i]
        return self._input(arena, "lines changed", "\n".join(lines) + "\n")

    def make_binary(self, arena: Arena, rng: random.Random) -> Input:
        return self._input(arena, "binary", rng.randbytes(rng.choice([1, 16, 4096])), "refused")

    def make_other_documents(self, arena: Arena, rng: random.Random) -> Input:
        text = dump_yaml(self.base)
        other = rng.choice(["", "null\n", "[]\n", "42\n", "x\n", "---\n---\n", f"{text}---\n{text}", "%YAML 9.9\n---\n{}\n",
            "{}\n",
                            "!!set {}\n", "- - - -\n", "? ?\n", "&a\n", "*a\n", ": :\n", "|\n", "%TAG ! x\n"])  # fmt: skip
        return self._input(arena, "another document", other, "refused")

    def make_not_a_file(self, arena: Arena, rng: random.Random) -> Input:
        import os

        folder = arena.fresh()
        kind = rng.randrange(5)
        file = folder / "e.yaml"
        if kind == 0:
            os.mkfifo(file)
        elif kind == 1:
            file = Path(rng.choice(["/dev/zero", "/dev/null", "/dev/urandom", "/proc/self/mem", "/proc/self/environ"]))
        elif kind == 2:
            file.symlink_to(file)
        elif kind == 3:
            file = Path(rng.choice(["x" * 300, "a\nb.yaml", "~nobody-there/e.yaml", "a\udcff.yaml"]))
        else:
            file.symlink_to("/dev/zero")
        return Input("not a file", ("run", str(file), "--dry-run"), "refused")

    # --- what must go on working ---

    def make_other_spelling(self, arena: Arena, rng: random.Random) -> Input:
        """The same configuration written otherwise means the same."""
        text = dump_yaml(self.base)
        spellings = (
            json.dumps(self.base, indent=1), "\ufeff" + text, text.replace("\n", "\r\n"), f"# note\n---\n{text}...\n",
            "".join(dump_yaml({key: self.base[key]}) for key in rng.sample(list(self.base), len(self.base))),
            f"x-{rng.randrange(9)}: 1\n"[:0] + text + "\n\n# end", text.replace("device: cpu", "device: 'cpu'"),
        )  # fmt: skip
        file = arena.fresh() / "e.yaml"
        file.write_text(rng.choice(spellings), encoding="utf-8", newline="")
        want = load_config(self.base).resolved()
        return Input("other spelling", ("run", str(file), "--dry-run"), "accepted",
                     accepted=lambda _: "" if load_config(file).resolved() == want else "read otherwise")  # fmt: skip

    def make_anchors(self, arena: Arena, rng: random.Random) -> Input:
        """Anchors, aliases and merge keys as people use them."""
        values = copy.deepcopy(self.base)
        training = values.pop("training")
        text = (
            f"{dump_yaml(values)}training: &t {json.dumps(training)}\n"
            f"per_method:\n  lora: {{training: {{<<: *t, epochs: {rng.randrange(1, 5)}}}}}\n"
        )
        return self._input(arena, "anchors", text, "accepted")

    def make_override(self, arena: Arena, rng: random.Random) -> Input:
        """Hostile values by -o."""
        file = arena.fresh() / "e.yaml"
        file.write_text(dump_yaml(self.base), encoding="utf-8")
        key = ".".join(map(str, rng.choice(self.schema)))
        value = rng.choice(["", "[", "{", "&a [*a]", "!!python/name:os.system", "9" * 5000, ".nan", "\0", "a: b: c", "*x",
            "\ud800",
                            "[" * 5000, "null", "x", "-1", "{x: 1}", "[1, [2]]"])  # fmt: skip
        option = rng.choice(
            [f"{key}={value}", key, f"={value}", f"{key}.{key}={value}", f".{key}=1", f"{key}.x=1", f"{key}.0.x=1"]
        )
        return Input("override", ("run", str(file), "--dry-run", "-o", option))


def reads_back(file: Path) -> str:
    """A configuration that was accepted is written as config.yaml and must mean the same when a run is resumed."""
    resolved = load_config(file).resolved()
    text = dump_yaml(resolved)
    text.encode("utf-8")
    again = load_config(parse_yaml(text, "again")[0]).resolved()
    return "" if again == resolved else "does not read back as it was written"


Check = Callable[[Answer], str]
