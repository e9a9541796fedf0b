"""The headline numbers of docs/claims/claims.yaml: are they what the pages print, and do they still hold?

    python scripts/claims.py                   # the list, and what does not fit the pages
    python scripts/claims.py check --sample 2  # two short forms that run code, others each day, and all that read kept numbers
    python scripts/claims.py check --all
    python scripts/claims.py check demo-small.untouched sketch.memory

A short form is the same code on less work, and its outcome must lie within the claim's bounds; a drift beyond them exits
with 1. Those that read docs/evidence/ work out again what was said of runs whose numbers are kept there: they see a table
that was changed, and not a method that broke. They take seconds, so each check takes all of them, and the sample is of
those that run the code.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "claims" / "claims.yaml"
KEYS = {"id", "says", "value", "page", "command", "commit", "date", "machine"}
OPTIONAL = {"check", "gone", "row", "also"}
CHECK = {"steps", "json", "find", "within", "needs"}
MINUTES = 10


def read(path: Path = FILE) -> list[dict[str, Any]]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def problems(claims: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the file, one sentence each: keys, values that their page does not print, scripts that are gone."""
    found = []
    seen: set[str] = set()
    for claim in claims:
        name = str(claim.get("id"))
        if name in seen:
            found.append(f"{name}: two claims have this id")
        seen.add(name)
        found += [f"{name}: {key} is missing" for key in sorted(KEYS - claim.keys())]
        found += [f"{name}: unknown key {key!r}" for key in sorted(claim.keys() - KEYS - OPTIONAL)]
        found += unprinted(claim)
        check = claim.get("check", {})
        found += [f"{name}: unknown key check.{key}" for key in sorted(check.keys() - CHECK)]
        if check and (("json" in check) == ("find" in check) or len(check.get("within", ())) != 2):
            found.append(f"{name}: a check has steps, within: [low, high], and either json or find")
        steps = [*check.get("steps", ()), *([] if "gone" in claim else [str(claim.get("command"))])]
        for word in (w for step in steps for w in shlex.split(step) if w.endswith(".py") or w.startswith("docs/")):
            if not (ROOT / word).is_file():
                found.append(f"{name}: {word} does not exist")
    return found


def unprinted(claim: dict[str, Any]) -> list[str]:
    """Pages that do not print the claim's value: on its page in a line that holds ``row`` as well, on ``also`` anywhere."""
    found = []
    value, row = str(claim.get("value")), str(claim.get("row", ""))
    for file, word in [(str(claim.get("page")), row), *((str(other), "") for other in claim.get("also", ()))]:
        page = ROOT / file
        if not page.is_file():
            found.append(f"{claim['id']}: {file} is no page")
        elif not any(value in line and word in line for line in page.read_text(encoding="utf-8").splitlines()):
            found.append(f"{claim['id']}: {file} does not print {value!r}{f' in a line with {word!r}' if word else ''}")
    return found


def reads_kept(claim: dict[str, Any]) -> bool:
    """Whether a short form works on the kept numbers of former runs, and runs nothing."""
    return any(word.startswith("docs/evidence/") for step in claim["check"]["steps"] for word in shlex.split(step))


def chosen(able: Sequence[dict[str, Any]], sample: int, day: int) -> list[dict[str, Any]]:
    """All that read kept numbers, and ``sample`` of those that run the code, drawn by the day."""
    running = [claim for claim in able if not reads_kept(claim)]
    kept = [claim for claim in able if reads_kept(claim)]
    return kept + random.Random(day).sample(running, min(len(running), sample))


def run(claim: dict[str, Any]) -> float:
    """The number that the short form comes to now."""
    check = claim["check"]
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="keeplora-claim-") as folder:
        told = ""
        for step in check["steps"]:
            first, *rest = shlex.split(step)
            rest = [str(ROOT / word) if word.startswith("docs/") else word for word in rest]
            words = ["-m", "keeplora", *rest] if first == "keeplora" else [str(ROOT / first), *rest]
            done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True,
                                  timeout=60 * MINUTES)  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"`{step}` ended with {done.returncode}: {done.stderr.strip()[-500:]}")
            told = done.stdout
        if "find" in check:
            match = re.search(check["find"], told, re.M)
            if match is None:
                raise RuntimeError(f"`{check['steps'][-1]}` printed nothing like {check['find']!r}")
            return float(match[1])
        file, *way = check["json"]
        value: Any = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
        for key in way:
            value = value[key]
        return float(value)


def towers() -> bool:
    """Whether the embedded model's files are there."""
    from keeplora.errors import KeepLoraError
    from keeplora.models.assets import embedded_path

    try:
        return embedded_path().is_dir()
    except KeepLoraError:
        return False


def check(claims: Sequence[dict[str, Any]]) -> int:
    """Run short forms and tell each; 1 where one has drifted or cannot be run."""
    wrong = 0
    for claim in claims:
        name, bounds = claim["id"], claim["check"]["within"]
        if claim["check"].get("needs") == "towers" and not towers():
            print(f"{name}: left out, the towers are not there (keeplora assets fetch)", flush=True)
            continue
        began = time.monotonic()
        try:
            value = run(claim)
        except (RuntimeError, OSError, ValueError, KeyError, IndexError, subprocess.TimeoutExpired) as error:
            print(f"{name}: FAILED: {error}", flush=True)
            wrong += 1
            continue
        holds = bounds[0] <= value <= bounds[1]
        wrong += not holds
        word = "holds" if holds else "DRIFTED"
        told = f"{value:.4g}, wanted {bounds[0]:g} to {bounds[1]:g}, claimed {claim['value']}"
        print(f"{name}: {word}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["list", "check"], default="list")
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--all", action="store_true", help="every short form")
    parser.add_argument("--sample", type=int, help="so many of those that run code, others each day")
    args = parser.parse_args()
    claims = read()
    if args.what == "list":
        for claim in claims:
            print(f"{claim['id']}: {claim['says']}: {claim['value']} ({claim['command']}; {claim['commit']}, {claim['date']}, "
                  f"{claim['machine']}){'' if 'check' in claim else '; no short form'}")  # fmt: skip
        wrong = problems(claims)
        print("\n".join(wrong), file=sys.stderr)
        return int(bool(wrong))
    able = [claim for claim in claims if "check" in claim]
    if args.ids:
        unknown = [name for name in args.ids if name not in {claim["id"] for claim in able}]
        if unknown:
            parser.error(f"no claim with a short form is called {unknown[0]!r}")
        able = [claim for claim in able if claim["id"] in args.ids]
    elif not args.all:
        able = chosen(able, 2 if args.sample is None else args.sample, date.today().toordinal())
    return check(able)


if __name__ == "__main__":
    sys.exit(main())
