"""Files that are no YAML: one sentence with the place, what is wrong, and how to mend it."""

from __future__ import annotations

import random
import re

import pytest

from keeplora.errors import ConfigError
from keeplora.yaml_text import parse_yaml

INDENTED = "the line's indentation is that of no line above"
GOOD = """\
model: embedded
method: keeplora++   # or lora
tuner: {r: 8, gamma: 0.2, target_modules: [q_proj, "k_proj"]}
tasks:
  - name: fruit
    path: 'fruit: all'
  - {name: shells, source: folder}
"""
JARGON = re.compile(r"scalar|token|\bblock\b|stream|flow |<block|while (scanning|parsing)")


def told(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "e.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "sentence"),
    [
        ("a:\n\tb: 1\n", (2, 1), "the line is indented with a tab, which YAML does not allow; indent with spaces"),
        ("a:\n  b: 1\n  \tc: 1\n", (3, 3), "the line is indented with a tab"),
        ("a:\tb\n", (1, 3), "a tab where YAML wants a space"),
        ("name: a: b\n", (1, 8), "a second colon in the value of 'name'; put the value in quotes: name: \"a: b\""),
        ('t:\n  - name: say "a": b # x\n', (2, 18), 'a second colon in the value of \'name\'; put the value in quotes: '
         'name: "say \\"a\\": b"'),
        ("model embedded\nmethod: lora\n", (1, 1), "the line lacks a colon and a space after its key"),
        ("# x\nmodel:embedded\n\nmethod: lora\n", (2, 1), "the line lacks a space after its colon"),
        ("model: a\n  method: lora\n", (2, 3), "the line is indented further than line 1, which has a value already"),
        ("tuner:\n    r: 8\n  gamma: 1\n", (3, 3), INDENTED),
        ("tasks:\n  - name: a\n  name: b\n", (3, 3), INDENTED),
        ("  model: a\nmethod: lora\n", (2, 1), INDENTED),
        ("a: - b\n", (1, 4), "a dash here"),
        ("tuner: {r: 8\nmodel: a\n", (1, 8), "this '{' is not closed before line 2, column 6; add '}', or the comma"),
        ("tuner: [q, k\nmodel: a\n", (1, 8), "this '[' is not closed before line 2, column 6; add ']', or the comma"),
        ('a: "b\nc: d\n', (1, 4), 'the quote that opens here is never closed; add the closing "'),
        ("a: 'it's'\n", (1, 8), 'text after the closing quote; put " around the whole value'),
        ("prompt: {c}. A photo\n", (1, 12), 'text after the closing bracket; put the value in quotes: prompt: "{c}. A photo"'),
        ("a: @x\n", (1, 4), "no value can begin with '@'; put the value in quotes: a: \"@x\""),
        ("a: *.jpg\n", (1, 4), "no value can begin with '*'; put the value in quotes: a: \"*.jpg\""),
        ("a: *x\n", (1, 4), "no value can begin with '*'"),
        ('a: "C:\\Users"\n', (1, 7), "in double quotes a backslash begins a special sign; put single quotes"),
        ("a: 1\n---\nb: 2\n", (2, 1), "a second document begins here ('---'); keep one in a file"),
        ("a: |x\n  b\n", (1, 4), "after '|' nothing may stand in the same line"),
        ("a: 1\nb\nc: 2\n", (2, 1), "a line that is no `key: value`; add the colon and a space"),
        ("a: [1,, 2]\n", (1, 7), "a value is missing before ','"),
        ("<<: 3\n", (1, 5), "'<<' takes in a mapping"),
        ("%YAML 3.0\n---\na: 1\n", (1, 1), "a line that begins with '%' is an instruction to the parser"),
        ("a: 1\na: 2\n", (2, 1), "key 'a' is given twice (first in line 1); keep one"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_how_to_mend_it(text, place, sentence):
    answer = told(text)
    assert answer.startswith(f"e.yaml, line {place[0]}, column {place[1]}: {sentence}")
    assert not JARGON.search(answer)
    assert "\n" not in answer


def test_the_advice_mends_the_line():
    for line in ("name: a: b", "prompt: {c} on a table", "path: *.jpg", "name: @home", 'say: "x" and: "y"'):
        advice = told(line).partition("in quotes: ")[2]
        if advice:
            key, value = line.split(": ", 1)
            assert parse_yaml(advice, "x")[0] == {key: value}


def test_any_slip_of_the_hand_is_placed_within_the_file():
    rng = random.Random(0)
    for _ in range(400):
        at = rng.randrange(len(GOOD) + 1)
        text = GOOD[:at] + rng.choice([*":{}[]\"'#-|>&*!%@`,?\n\t ", ": ", "- ", "  "]) + GOOD[at + rng.randrange(2) :]
        answer = ""
        try:
            parse_yaml(text, "e.yaml")
        except ConfigError as error:
            answer = str(error)
        if answer:
            found = re.match(r"e\.yaml, line (\d+), column (\d+): .", answer)
            assert found, answer
            assert int(found[2]) <= len(text.split("\n")[int(found[1]) - 1]) + 1


def test_a_long_line_takes_no_time():
    assert "line 1" in told("a: b" + " " * 200_000 + ": c")
