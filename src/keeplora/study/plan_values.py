"""What a STUDY.yaml and the options of `keeplora compare` may hold: each key's value, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keeplora.errors import ConfigError, did_you_mean
from keeplora.files import expand
from keeplora.methods import method_names
from keeplora.yaml_text import read_yaml

KEYS = {
    "name": "text", "suite": "text", "experiment": "text", "data": "text", "methods": "a list of methods",
    "seeds": "a list of whole numbers, or a range such as 0-4", "orders": "a list of orders, or a mapping from labels",
    "set": "a mapping of experiment keys", "per_method": "a mapping from methods, or a YAML file that holds one",
    "variants": "a mapping from names to method: and the settings in which each differs",
    "against": "a method", "jobs": "a whole number of at least 1", "threads": "a whole number of at least 1",
    "output": "text", "keep_ledgers": "true or false",
}  # fmt: skip
OWN = {
    "method": "methods",
    "seed": "seeds",
    "order": "orders",
    "output": "output",
    "threads": "threads",
    "data_dir": "data",
}


def safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", name)


def together(problems: Sequence[str]) -> str:
    """One sentence, or a list of them."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the study:\n" + "\n".join(f"  - {problem}" for problem in problems)


def parse_seeds(text: Any) -> list[int]:
    """Seeds as people write them.

    >>> parse_seeds("0-2,7"), parse_seeds(3), parse_seeds([1, "4-5"])
    ([0, 1, 2, 7], [3], [1, 4, 5])
    """
    if isinstance(text, bool) or not isinstance(text, int | str | list):
        raise ConfigError(f"seeds is {text!r}, but must be {KEYS['seeds']}")
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"seeds holds {text}, but a seed is a whole number of at least 0")
        return [text]
    parts = text if isinstance(text, list) else [part for part in text.split(",") if part.strip()]
    found: list[int] = []
    for part in parts:
        if isinstance(part, int) and not isinstance(part, bool):
            found += parse_seeds(part)
            continue
        match = re.fullmatch(r"\s*(\d+)\s*(?:(?:-|\.\.)\s*(\d+)\s*)?", str(part))
        if match is None or isinstance(part, bool):
            raise ConfigError(f"seeds holds {part!r}, but must be {KEYS['seeds']}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 10_000:
            raise ConfigError(
                f"seeds holds the range {part!r}; write it from the smaller to the larger, at most 10000 long"
            )
        found += range(first, last + 1)
    if not found:
        raise ConfigError("seeds is empty; give at least one, for example 0-2")
    return list(dict.fromkeys(found))


def parse_words(value: Any, key: str) -> list[str]:
    """A list, or words with commas between them; `ConfigError` where it is neither or empty.

    >>> parse_words("lora, keeplora++", "methods")
    ['lora', 'keeplora++']
    """
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{key} is {value!r}, but must be {KEYS[key]}")
    found = [part.strip() for word in words for part in word.split(",") if part.strip()]
    if not found:
        raise ConfigError(f"{key} is empty; give at least one")
    return list(dict.fromkeys(found))


def parse_orders(value: Any) -> dict[str, Any]:
    """Labels and what ``order`` is set to, from ``1,2``, ``[1, "shuffle-7"]`` or ``{mine: [b, a]}``.

    >>> parse_orders("1,shuffle-7"), parse_orders({"back": ["b", "a"]})
    ({'1': '1', 'shuffle-7': 'shuffle-7'}, {'back': ['b', 'a']})
    """
    if isinstance(value, Mapping):
        found = {str(label): entry for label, entry in value.items()}
    else:
        words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        flat = [part for word in words for part in (word.split(",") if isinstance(word, str) else [word])]
        if any(isinstance(word, list | Mapping) for word in flat):
            raise ConfigError("orders holds a list of tasks without a label; write orders: {LABEL: [first, second]}")
        found = {str(word).strip(): word.strip() if isinstance(word, str) else word for word in flat if word != ""}
    for label, entry in found.items():
        names = isinstance(entry, list) and entry and all(isinstance(name, str) for name in entry)
        if isinstance(entry, bool) or not (entry is None or isinstance(entry, int | str) or names):
            raise ConfigError(f"orders.{label} is {entry!r}, but must be an order's name or a list of task names")
    if not found or "" in found:
        raise ConfigError(f"orders is {value!r}, but must be {KEYS['orders']}")
    # An order by its number or its word is the same order.
    found = {label: str(entry) if isinstance(entry, int) else entry for label, entry in found.items()}
    folders: dict[str, str] = {}
    for label in found:
        if (other := folders.setdefault(safe(label), label)) != label:
            raise ConfigError(f"orders {other!r} and {label!r} would share the folder order-{safe(label)}; rename one")
    return found


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """``set:`` as written: dotted keys, or sections as mappings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("training", "tuner") and isinstance(value, Mapping):
            found |= {f"{key}.{inner}": entry for inner, entry in value.items()}
        else:
            found[str(key)] = value
    return found


def read_per_method(value: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """``per_method`` itself, or that of a YAML file such as `keeplora tune` writes."""
    source = "per_method"
    if isinstance(value, str | os.PathLike):
        path = folder / expand(value)
        source = str(path)
        content, _ = read_yaml(path)
        if not isinstance(content, dict) or "per_method" not in content:
            raise ConfigError(f"{path}: no `per_method:` in it; it is a mapping from methods to training: and tuner:")
        value = content["per_method"]
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{source}: per_method is {value!r}, but must be a mapping from methods to training: and tuner:"
        )
    known = method_names()
    for method, sections in value.items():
        if method not in known:
            raise ConfigError(f"{source}: unknown method {method!r}{did_you_mean(str(method), known)}")
        if not isinstance(sections, Mapping):
            raise ConfigError(f"{source}: {method} is {sections!r}, but must be a mapping with training: or tuner:")
        for section in sections:
            if section not in ("training", "tuner"):
                hint = did_you_mean(str(section), ["training", "tuner"])
                raise ConfigError(f"{source}: unknown key {section!r} in {method}{hint}")
    return {str(method): dict(sections) for method, sections in value.items()}


def read_variants(value: Any) -> dict[str, dict[str, Any]]:
    """``variants`` as checked: a name for each, the method it is one of, and the experiment keys in which it differs.

    >>> read_variants({"narrow": {"method": "keeplora++", "tuner": {"rank": 4}}})
    {'narrow': {'method': 'keeplora++', 'tuner.rank': 4}}
    """
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"variants is {value!r}, but must be {KEYS['variants']}")
    known = method_names()
    found: dict[str, dict[str, Any]] = {}
    folders: dict[str, str] = {}
    for name, settings in value.items():
        where = f"variants.{name}"
        if not isinstance(name, str) or name in ("", ".", "..") or name != name.strip() or set(name) & set("/\\\0,"):
            raise ConfigError(f"variants holds the name {name!r}; a name is text without commas and slashes")
        if name in known:
            raise ConfigError(f"{where}: {name!r} is a method's own name; give the variant another")
        if (other := folders.setdefault(safe(name), name)) != name:
            raise ConfigError(f"variants {other!r} and {name!r} would share the folder {safe(name)}; rename one")
        if not isinstance(settings, Mapping) or "method" not in settings:
            raise ConfigError(f"{where} is {settings!r}, but must hold method: and the settings in which it differs")
        if settings["method"] not in known:
            raise ConfigError(
                f"{where}: unknown method {settings['method']!r}{did_you_mean(str(settings['method']), known)}"
            )
        found[name] = dotted(settings)
        for key in found[name]:
            if key != "method" and (key in OWN or key.split(".")[0] == "order"):
                raise ConfigError(f"{where}: {key} is the study's own; use {OWN.get(key, 'orders')}: in place of it")
    return found


def parse_methods(words: Sequence[str], variants: Mapping[str, Any]) -> list[str]:
    known = [*method_names(), *variants]
    if list(words) == ["all"]:
        return known
    for word in words:
        if word not in known:
            raise ConfigError(f"methods holds {word!r}, which is no method{did_you_mean(word, known)}, or all")
    return list(words)
