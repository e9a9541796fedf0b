"""The kinds of run and the words for each: which metrics are shown, in which order, and what a number is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from keeplora.errors import KeepLoraError, did_you_mean


class Metric(NamedTuple):
    """A key of results["metrics"], its short name, whether a larger value is better, and what it is."""

    key: str
    name: str
    higher: bool
    meaning: str


IN_POINTS = ("forgetting", "bwt")
"""Metrics that are differences. What never learns cannot forget: it is no rival in them."""


@dataclass(frozen=True)
class Kind:
    """How the numbers of one kind of run are called and which come first.

    ``percents`` are the metrics that get bars, ranks and marks per order; ``told`` those that sentences and tiles name;
    ``best`` those whose best mean a study's summary names, the first of them the score at the end of the sequence.
    """

    name: str
    does: str
    quantity: str
    entry: str
    items: str
    others: str
    metrics: tuple[Metric, ...]
    percents: tuple[str, ...]
    told: tuple[str, ...]
    best: tuple[str, ...]
    probes: str
    group: str
    matrix: str
    ends: str
    untouched: str

    @property
    def end(self) -> str:
        """The metric of the end of the sequence."""
        return self.best[0]


CLASSIFICATION = Kind(
    name="classification",
    does="names pictures",
    quantity="accuracy",
    entry="acc",
    items="test pictures",
    others="pictures",
    metrics=(
        Metric(
            "transfer", "Transfer", True,
            "how well a task is done before it is learned, on average (mean over j ≥ 2 of mean over i < j of acc[i][j])",
        ),
        Metric("average", "Avg", True, "all tasks at all moments, learned yet or not (mean of acc[i][j] over all i, j = 1…N)"),
        Metric("last", "Last", True, "all tasks at the end, after the last one was learned (mean over j of acc[N][j])"),
        Metric("probe", "Probe", True, "the probe sets, never trained on, after each task (mean over the sets and over i = 1…N)"),
        Metric(
            "forgetting", "Forgetting", False,
            "points that a task ends below its best, on average (mean over j < N of max over i < N of acc[i][j] − acc[N][j])",
        ),
        Metric(
            "bwt", "BWT", True,
            "points that a task moved from its learning to the end, on average (mean over j < N of acc[N][j] − acc[j][j])",
        ),
    ),
    percents=("transfer", "average", "last", "probe"),
    told=("transfer", "average", "last", "probe", "forgetting"),
    best=("last", "forgetting", "probe"),
    probes="probe sets",
    group="probes",
    matrix="Percent of test pictures named right.",
    ends="it names {} of the test pictures right, averaged over the tasks (Last)",
    untouched="The untouched model names {} of the test pictures right, averaged over {} tasks.",
)  # fmt: skip

GENERATION = Kind(
    name="generation",
    does="answers questions",
    quantity="score",
    entry="score",
    items="test questions",
    others="questions",
    metrics=(
        Metric("mft", "MFT", True, "each task right after it was learned (mean over i of score[i][i])"),
        Metric("mfn", "MFN", True, "every task at the end, after the last one was learned (mean over j of score[N][j])"),
        Metric(
            "maa", "MAA", True,
            "the tasks learned so far, at each moment (mean over i of the mean over j ≤ i of score[i][j])",
        ),
        Metric(
            "bwt", "BWT", True,
            "points gained (lost: below 0) between a task's learning and the end (mean over j < N of score[N][j] − score[j][j])",
        ),
        Metric(
            "probe", "General", True,
            "the general sets (probes), never trained on, after each task (mean over the sets and over i = 1…N)",
        ),
    ),
    percents=("mft", "mfn", "maa", "probe"),
    told=("mft", "mfn", "maa", "bwt", "probe"),
    best=("mfn", "bwt", "probe"),
    probes="general sets",
    group="general (probes)",
    matrix="Score of the answers to the test questions, in percent, each set by its own scorer.",
    ends="its answers score {}, averaged over the tasks (MFN)",
    untouched="The untouched model’s answers score {}, averaged over {} tasks.",
)  # fmt: skip

KINDS = {kind.name: kind for kind in (CLASSIFICATION, GENERATION)}


def kind_named(name: object) -> Kind:
    """The kind of that name; runs from before there were two name none and are classification.

    >>> kind_named(None).name, kind_named("generation").metrics[0].name
    ('classification', 'MFT')
    """
    if name is None:
        return CLASSIFICATION
    if name not in KINDS:
        raise KeepLoraError(
            f"'kind' is {name!r}{did_you_mean(str(name), KINDS)}, and only {' and '.join(KINDS)} are known; "
            "update keeplora to read it"
        )
    return KINDS[str(name)]
