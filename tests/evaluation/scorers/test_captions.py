"""Captions: by hand, against published examples, and against the COCO evaluation's own numbers and code."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from keeplora.evaluation.scorers import captions, coco_java, score
from keeplora.evaluation.scorers.ngrams import bleu, cider, longest_common, ngrams, rouge_l

# The example that aac-metrics publishes in its README (0.6.0), with the numbers it prints there.
PUBLISHED = ["a man is speaking", "rain falls"]
PUBLISHED_REFERENCES = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]

CAPTIONS = [
    "A brown dog runs across the grass.", "Two children don't look at the camera", "a red two-tone van",
    "the the the the", "A man rides a wave on top of a surfboard.", "",
]  # fmt: skip
REFERENCES = [
    ["A dog is running on the grass.", "The brown dog runs through a field.", "dog running fast"],
    ["Two kids are looking away from the camera.", "Children who do not look at the camera, outside."],
    ["A red and white van (parked) in a lot.", "an old two-tone van", "A van."],
    ["a cat sits on the mat", "The cat is on the mat"],
    [
        "A man riding a wave on a surfboard in the ocean.", "A surfer rides a big wave.",
        "man on a surfboard riding a wave",
    ],
    ["An empty street at night."],
]  # fmt: skip
# What pycocoevalcap 1.2 makes of them: its Penn Treebank tokens, then its scores (Java 17).
TREEBANK = [
    "a brown dog runs across the grass", "two children do n't look at the camera", "a red two-tone van",
    "the the the the", "a man rides a wave on top of a surfboard", "",
]  # fmt: skip
TREEBANK_REFERENCES = [
    ["a dog is running on the grass", "the brown dog runs through a field", "dog running fast"],
    ["two kids are looking away from the camera", "children who do not look at the camera outside"],
    ["a red and white van -lrb- parked -rrb- in a lot", "an old two-tone van", "a van"],
    ["a cat sits on the mat", "the cat is on the mat"],
    [
        "a man riding a wave on a surfboard in the ocean", "a surfer rides a big wave",
        "man on a surfboard riding a wave",
    ],
    ["an empty street at night"],
]  # fmt: skip
COCO = {
    "bleu-1": 0.642046249641434, "bleu-2": 0.48365319586244554, "bleu-3": 0.3172285426446952,
    "bleu-4": 0.19314798780347406, "rouge-l": 0.5359536335464307, "cider": 1.2975748935526952,
    "meteor": 0.28662974250494866,
}  # fmt: skip
COCO_ROUGE = [0.5714285714285714, 0.6984732824427481, 0.8798076923076923, 0.3860759493670886, 0.679936305732484, 0.0]
COCO_CIDER = [1.6756241034561703, 2.4490723507738443, 1.5101816009798665, 0.19902976255446095, 1.951541543551829, 0.0]
COCO_METEOR = [
    0.35965715728739805, 0.3519671193848714, 0.32986231278245737, 0.08791208791208792, 0.40614251973028037, 0.0,
]  # fmt: skip

WORDS = [line.split() for line in TREEBANK]
WORD_REFERENCES = [[line.split() for line in accepted] for accepted in TREEBANK_REFERENCES]

needs_java = pytest.mark.skipif(
    coco_java.find_java() is None or find_spec("pycocoevalcap") is None,
    reason="METEOR and the Penn Treebank tokeniser need Java and keeplora[captions]",
)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_bleu_by_hand() -> None:
    # 1-grams: "the" counts twice, the most in one reference (clipped from 3), "cat" once: 3 of 4. 2-grams: "the cat", 1 of 3.
    # Lengths 2 and 6 lie equally near to 4: the shorter counts, so there is no penalty.
    candidate = ["the", "the", "the", "cat"]
    accepted = [["the", "cat"], ["the", "dog", "saw", "the", "red", "fox"]]
    scores, items = bleu([candidate], [accepted], most=2)
    assert scores == pytest.approx([3 / 4, math.sqrt(3 / 4 * 1 / 3)], rel=1e-6)
    assert items == [pytest.approx(scores)]


def test_bleu_is_of_the_corpus_and_short_answers_are_penalised() -> None:
    # 2 + 1 hits of 2 + 2 guesses; together 4 words against 4 + 4: exp(1 - 2).
    scores, items = bleu([["a", "b"], ["c", "x"]], [[["a", "b", "q", "q"]], [["c", "d", "e", "f"]]], most=1)
    assert scores == pytest.approx([3 / 4 * math.exp(-1)], rel=1e-6)
    assert [item[0] for item in items] == pytest.approx([math.exp(-1), 0.5 * math.exp(-1)], rel=1e-6)


def test_rouge_by_hand() -> None:
    assert longest_common("abcde", "bxdae") == 3
    assert longest_common([], ["a"]) == 0
    # Best precision 3/4 (first reference), best recall 1 (second): they may come from different references.
    score, items = rouge_l(["abcd"], [["abcxyz", "bd"]])
    assert score == pytest.approx(2.44 * 0.75 * 1 / (1 + 1.44 * 0.75))
    assert items == [score]
    assert rouge_l([[]], [[["a"]]]) == (0.0, [0.0])


def test_cider_by_hand() -> None:
    # Two items. "a" is in the references of both: log 2 - log 2 = 0. "b" and "c" in one: log 2. Only 1-grams are there.
    # Item 1: (b) against (b): cosine 1 for n = 1, 0 for n = 2, 3, 4: mean 1/4, times 10.
    # Item 2: candidate "a" weighs nothing: 0.
    _, items = cider([["b"], ["a"]], [[["b"], ["a"]], [["a", "c"]]])
    assert items == pytest.approx([2.5 / 2, 0.0])  # the mean over the two references of item 1


def test_cider_depends_on_the_set_and_on_length() -> None:
    assert cider([["a", "b"]], [[["a", "b"]]]) == (0.0, [0.0])  # one document: every idf is log 1
    # "b b" against "b": 1-grams clipped to the reference's weight: (1·1)/(2·1); one 2-gram more: exp(-1/72).
    _, items = cider([["b", "b"], ["x"]], [[["b"]], [["y"]]])
    assert items == pytest.approx([10 / 4 * 0.5 * math.exp(-1 / 72), 0.0])


def test_ngrams() -> None:
    assert ngrams(["a", "b"], 3) == {}
    assert ngrams(["a", "b", "a"], 1) == {("a",): 2, ("b",): 1}


def test_plain_tokens() -> None:
    assert captions.plain_tokens("Don't! 1,000.5 km; “Straße” half-done-- _ (x)") == [
        "don't", "1,000.5", "km", "straße", "half-done", "_", "x",
    ]  # fmt: skip


# -- published numbers ---------------------------------------------------------------------------------------------------


def test_published_example() -> None:
    found = score("cider", PUBLISHED, PUBLISHED_REFERENCES, ["", ""])
    assert found.value == pytest.approx(96.14, abs=0.005)
    assert found.components == {"cider-plain": found.value}
    _, items = cider(*captions._plain(PUBLISHED, PUBLISHED_REFERENCES))
    assert items == pytest.approx([1.3641, 0.5587], abs=5e-5)
    assert found.per_sample == [1.0, pytest.approx(0.5587, abs=5e-5)]  # more than 1 is all right
    scores, _ = bleu(*captions._plain(PUBLISHED, PUBLISHED_REFERENCES))
    assert scores[0] == pytest.approx(0.4278, abs=5e-5)


def test_numbers_of_the_coco_evaluation() -> None:
    scores, _ = bleu(WORDS, WORD_REFERENCES)
    assert scores == pytest.approx([COCO[f"bleu-{n}"] for n in range(1, 5)], rel=1e-12)
    mean, items = rouge_l(WORDS, WORD_REFERENCES)
    assert mean == pytest.approx(COCO["rouge-l"], rel=1e-12)
    assert items == pytest.approx(COCO_ROUGE, rel=1e-12)
    mean, items = cider(WORDS, WORD_REFERENCES)
    assert mean == pytest.approx(COCO["cider"], rel=1e-12)
    assert items == pytest.approx(COCO_CIDER, rel=1e-12)


def test_the_package_itself_gives_the_same() -> None:
    pytest.importorskip("pycocoevalcap", reason="keeplora[captions] is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    lines = {i: [line] for i, line in enumerate(TREEBANK)}
    accepted = dict(enumerate(TREEBANK_REFERENCES))
    theirs, their_items = Bleu(4).compute_score(accepted, lines, verbose=0)
    scores, items = bleu(WORDS, WORD_REFERENCES)
    assert scores == pytest.approx(theirs, rel=1e-12)
    assert list(map(list, zip(*items, strict=True))) == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in their_items]
    for scorer, ours in ((Rouge(), rouge_l), (Cider(), cider)):
        value, per_item = scorer.compute_score(accepted, lines)
        mean, items = ours(WORDS, WORD_REFERENCES)
        assert mean == pytest.approx(float(value), rel=1e-12)
        assert items == pytest.approx([float(v) for v in per_item], rel=1e-12, abs=1e-12)


# -- the caption score ---------------------------------------------------------------------------------------------------


@needs_java
@pytest.mark.slow
def test_caption_is_the_mean_of_seven(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[float, list[float]]] = []
    monkeypatch.setattr(captions, "meteor", lambda *sentences: kept.append(coco_java.meteor(*sentences)) or kept[-1])
    scored = score("caption", CAPTIONS, REFERENCES, [""] * 6)
    assert scored.components == {name: pytest.approx(100 * value, rel=1e-9) for name, value in COCO.items()}
    assert scored.value == pytest.approx(100 * sum(COCO.values()) / 7)
    assert scored.per_sample == pytest.approx(COCO_ROUGE)
    assert scored.missing is None
    [(mean, items)] = kept
    assert mean == pytest.approx(COCO["meteor"], rel=1e-12)
    assert items == pytest.approx(COCO_METEOR, rel=1e-12)


@needs_java
def test_treebank_tokens_keep_their_lines() -> None:
    texts = [*CAPTIONS, "", "Café\u2028two\r\nlines", ""]
    assert coco_java.treebank_tokens(texts) == [*WORDS, [], ["café", "two", "lines"], []]


def without_java(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A machine with the jars and no Java."""
    (folder / "meteor").mkdir()
    (folder / coco_java.METEOR_JAR).touch()
    monkeypatch.setattr(coco_java, "_folder", lambda: folder)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)


def plain_only(said: str) -> None:
    """The caption score is absent and says so; what stands in for its parts has other names."""
    scored = score("caption", PUBLISHED, PUBLISHED_REFERENCES, ["", ""])
    assert scored.value is None
    assert scored.missing is not None
    assert said in scored.missing
    assert set(scored.components) == {
        "bleu-1-plain", "bleu-2-plain", "bleu-3-plain", "bleu-4-plain", "rouge-l-plain", "cider-plain",
    }  # fmt: skip
    assert scored.components["bleu-1-plain"] == pytest.approx(42.78, abs=0.005)
    assert scored.components["cider-plain"] == pytest.approx(96.14, abs=0.005)
    assert scored.per_sample == pytest.approx([0.7721519, 0.20198675])


def test_without_java_there_is_no_caption_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_java(monkeypatch, tmp_path)
    plain_only("there is no `java` on the PATH")


def test_without_the_jars_there_is_no_caption_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_java, "_folder", lambda: None)
    plain_only("pip install 'keeplora[captions]'")


@pytest.mark.parametrize(
    ("tokeniser", "said"),
    [
        ("echo 'no runtime present' >&2; exit 1", "tokeniser failed (exit status 1: no runtime present)"),
        ("cat > /dev/null", "tokeniser failed (exit status 0)"),  # answers nothing
        ("cat", "METEOR failed: out of memory"),
    ],
)
def test_a_java_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokeniser: str, said: str) -> None:
    without_java(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    java = tmp_path / "java"
    java.write_text(f'#!/bin/sh\nif [ "$1" = -cp ]; then {tokeniser}\nelse echo out of memory >&2; exit 1\nfi\n')
    java.chmod(0o755)
    plain_only(said)


@pytest.mark.parametrize("name", ["rouge-l", "cider"])
def test_scores_of_their_own_need_no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    before = score(name, PUBLISHED, PUBLISHED_REFERENCES, ["", ""])
    without_java(monkeypatch, tmp_path)
    assert score(name, PUBLISHED, PUBLISHED_REFERENCES, ["", ""]) == before
    assert set(before.components) == {f"{name}-plain"}


def test_rouge_l_scorer() -> None:
    scored = score("rouge-l", ["The dog.", "x"], [["a dog", "THE DOG!"], ["y"]], ["", ""])
    assert scored.per_sample == [1.0, 0.0]
    assert scored.value == 50.0
