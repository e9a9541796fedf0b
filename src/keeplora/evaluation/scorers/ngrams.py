"""BLEU, ROUGE-L and CIDEr-D on sentences that are tokens already, with the constants of the COCO caption evaluation.

All three return (score of the set, score per item) as fractions, CIDEr times ten as its authors define it. They give the
numbers of ``pycocoevalcap`` on the same tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[str]
Ngrams = Counter[tuple[str, ...]]

# The COCO code's guards against dividing by zero; they show in the last digits, so they are its very values.
_SMALL, _TINY = 1e-9, 1e-15


def ngrams(tokens: Tokens, n: int) -> Ngrams:
    """Counts of the n-grams.

    >>> ngrams("a b a b".split(), 2)[("a", "b")]
    2
    """
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _geometric(hits: Sequence[int], guesses: Sequence[int], length: int, reference: int) -> list[float]:
    scores, product = [], 1.0
    for n, (hit, guess) in enumerate(zip(hits, guesses, strict=True), start=1):
        product *= (hit + _TINY) / (guess + _SMALL)
        scores.append(product ** (1 / n))
    ratio = (length + _TINY) / (reference + _SMALL)
    return [score * math.exp(1 - 1 / ratio) for score in scores] if ratio < 1 else scores


def bleu(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], most: int = 4
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to BLEU-``most`` of the corpus, and per item (Papineni et al. 2002; the closest reference's length).

    >>> scores, _ = bleu(["the cat sat".split()], [["the cat ran".split()]], most=2)
    >>> [round(score, 4) for score in scores]  # 2/3, and sqrt(2/3 · 1/2)
    [0.6667, 0.5774]
    """
    total_hits, total_guesses, total_length, total_reference = [0] * most, [0] * most, 0, 0
    items = []
    for candidate, accepted in zip(candidates, references, strict=True):
        length = len(candidate)
        _, reference = min((abs(len(r) - length), len(r)) for r in accepted)
        hits, guesses = [], []
        for n in range(1, most + 1):
            allowed: Ngrams = Counter()
            for r in accepted:
                allowed |= ngrams(r, n)
            hits.append((ngrams(candidate, n) & allowed).total())
            guesses.append(max(0, length - n + 1))
        items.append(_geometric(hits, guesses, length, reference))
        total_hits = [a + b for a, b in zip(total_hits, hits, strict=True)]
        total_guesses = [a + b for a, b in zip(total_guesses, guesses, strict=True)]
        total_length += length
        total_reference += reference
    return _geometric(total_hits, total_guesses, total_length, total_reference), items


def longest_common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence.

    >>> longest_common("a b c d".split(), "b x d".split())
    2
    """
    row = [0] * (len(b) + 1)
    for left in a:
        before = 0
        for j, right in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, list[float]]:
    """ROUGE-L (Lin 2004), beta = 1.2: F of the best precision and the best recall over the references.

    >>> score, _ = rouge_l(["the cat sat".split()], [["the cat".split()]])
    >>> round(score, 4)  # P = 2/3, R = 1: 2.44 · 2/3 / (1 + 1.44 · 2/3)
    0.8299
    """
    items = []
    for candidate, accepted in zip(candidates, references, strict=True):
        common = [(longest_common(candidate, r), len(r)) for r in accepted]
        recall = max(hit / size if size else 0.0 for hit, size in common)
        precision = max(hit for hit, _ in common) / len(candidate) if candidate else 0.0
        square = 1.2**2
        bottom = recall + square * precision
        items.append((1 + square) * precision * recall / bottom if bottom else 0.0)
    return math.fsum(items) / len(items), items


class _Weights:
    """n-gram counts weighed by inverse document frequency, with their norms, of one sentence."""

    def __init__(self, tokens: Tokens, seen: Ngrams, documents: float, most: int) -> None:
        self.length = max(0, len(tokens) - 1)  # the COCO code counts the 2-grams
        self.weights = [
            {gram: count * (documents - math.log(max(1, seen[gram]))) for gram, count in ngrams(tokens, n).items()}
            for n in range(1, most + 1)
        ]
        self.norms = [math.sqrt(math.fsum(w * w for w in weights.values())) for weights in self.weights]


def cider(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], most: int = 4, sigma: float = 6.0
) -> tuple[float, list[float]]:
    """CIDEr-D (Vedantam et al. 2015), times ten.

    A word's document frequency is the number of items OF THIS SET whose references contain it: the same caption scores
    differently in another set, and in a set of one item every score is 0.

    >>> score, items = cider(["a b".split(), "c d".split()], [["a b".split()], ["c d".split()]])
    >>> items  # 1-grams and 2-grams agree, of 3- and 4-grams there are none
    [5.0, 5.0]
    """
    seen: Ngrams = Counter()
    for accepted in references:
        seen.update({gram for r in accepted for n in range(1, most + 1) for gram in ngrams(r, n)})
    documents = math.log(len(references))
    items = []
    for candidate, accepted in zip(candidates, references, strict=True):
        own = _Weights(candidate, seen, documents, most)
        total = 0.0
        for r in accepted:
            other = _Weights(r, seen, documents, most)
            penalty = math.exp(-((own.length - other.length) ** 2) / (2 * sigma**2))
            for n in range(most):
                theirs = other.weights[n]
                agree = math.fsum(min(w, theirs[g]) * theirs[g] for g, w in own.weights[n].items() if g in theirs)
                norm = own.norms[n] * other.norms[n]
                total += penalty * (agree / norm if norm else agree)
        items.append(10 * total / most / len(accepted))
    return math.fsum(items) / len(items), items
