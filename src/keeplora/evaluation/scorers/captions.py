"""Captions: the mean that UCIT reports, and ROUGE-L and CIDEr by themselves.

`caption` needs Java for METEOR and the Penn Treebank tokeniser (`keeplora.evaluation.scorers.coco_java`). Without it
there is no caption score; BLEU, ROUGE-L and CIDEr are then computed on plain tokens and carry other names. `rouge_l` and
`cider` always use plain tokens, so that they mean the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from keeplora.evaluation.scorers.base import References, Scored
from keeplora.evaluation.scorers.coco_java import Unavailable, meteor, treebank_tokens
from keeplora.evaluation.scorers.ngrams import Tokens, bleu
from keeplora.evaluation.scorers.ngrams import cider as cider_score
from keeplora.evaluation.scorers.ngrams import rouge_l as rouge_l_score

Sentences = tuple[list[Tokens], list[list[Tokens]]]

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:['’-]\w+)*")


def plain_tokens(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation; hyphens and apostrophes within words stay.

    >>> plain_tokens("A two-tone van, 3.5 m (it's red).")
    ['a', 'two-tone', 'van', '3.5', 'm', "it's", 'red']
    """
    return _WORD.findall(text.lower())


def _plain(predictions: Sequence[str], references: References) -> Sentences:
    return [plain_tokens(p) for p in predictions], [[plain_tokens(r) for r in accepted] for accepted in references]


def _treebank(predictions: Sequence[str], references: References) -> Sentences:
    tokens = iter(treebank_tokens([*predictions, *(r for accepted in references for r in accepted)]))
    return [next(tokens) for _ in predictions], [[next(tokens) for _ in accepted] for accepted in references]


def _clip(items: Sequence[float]) -> list[float]:
    return [min(1.0, item) for item in items]


def _components(sentences: Sentences, suffix: str = "") -> tuple[dict[str, float], list[float]]:
    """(BLEU-1..4, ROUGE-L and CIDEr in percent, ROUGE-L per item)."""
    blues, _ = bleu(*sentences)
    rouge, items = rouge_l_score(*sentences)
    parts = {f"bleu-{n}": value for n, value in enumerate(blues, start=1)}
    parts |= {"rouge-l": rouge, "cider": cider_score(*sentences)[0]}
    return {f"{name}{suffix}": 100 * value for name, value in parts.items()}, items


def caption(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """UCIT's caption score: the mean of BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr, each times 100.

    The numbers are those of the COCO caption evaluation. Without Java (or ``keeplora[captions]``) ``value`` is None,
    ``missing`` says why and the components are "bleu-1-plain" and so on. Per item: ROUGE-L.
    """
    try:
        sentences = _treebank(predictions, references)
        alignment, _ = meteor(*sentences)
    except Unavailable as reason:
        components, items = _components(_plain(predictions, references), "-plain")
        missing = (
            f"the caption score is a mean with METEOR on Penn Treebank tokens, which cannot be had here: {reason}; "
            "BLEU, ROUGE-L and CIDEr are given on plain tokens instead."
        )
        return Scored(None, _clip(items), components, missing)
    components, items = _components(sentences)
    components["meteor"] = 100 * alignment
    return Scored(fmean(components.values()), _clip(items), components)


def rouge_l(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """ROUGE-L on plain tokens: mean over the items of `keeplora.evaluation.scorers.ngrams.rouge_l`.

    >>> round(rouge_l(["The cat sat."], [["the cat"]], [""]).value, 2)
    82.99
    """
    value, items = rouge_l_score(*_plain(predictions, references))
    return Scored(100 * value, _clip(items), {"rouge-l-plain": 100 * value})


def cider(predictions: Sequence[str], references: References, questions: Sequence[str]) -> Scored:
    """CIDEr-D on plain tokens, times 100, as papers print it: it may exceed 100 and is at most 1000.

    Document frequencies are those of the references given: scores of different sets do not compare, and a set of one
    item scores 0. Per item: the item's CIDEr-D, cut at 1.

    >>> cider(["a b", "c d"], [["a b"], ["c d"]], ["", ""]).value
    500.0
    """
    value, items = cider_score(*_plain(predictions, references))
    return Scored(100 * value, _clip(items), {"cider-plain": 100 * value})
