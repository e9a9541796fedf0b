"""What run directories say of their tasks' similarity, and of what it predicts (`keeplora analyze similarity`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keeplora.errors import KeepLoraError
from keeplora.evaluation.association import Association, spearman_within
from keeplora.experiment.ledgers import LedgerPlace
from keeplora.experiment.run_directory import RunDirectory
from keeplora.report.runs import method_label
from keeplora.tuner.similarity import (
    PREDICTORS,
    Pair,
    TaskFeatures,
    energy_inside,
    ledger_features,
    overlap_matrix,
    pairs_of,
    updates_of,
)

ALL, POOLED = "all, within runs", "all, pooled"
"""Sets of pairs beside the runs' own: the order inside each run alone, or every pair against every other."""


@dataclass(frozen=True)
class Similarity:
    """Tasks, how alike they are, and how well that predicts what they did to each other.

    Attributes:
        source: the folder whose ledger the subspaces are of. exact: whether it kept covariances. tasks: in its order.
        overlap: [i][j], symmetric. energy: [j][i], the share of j's energy inside i's subspace; None where unknown.
        pairs: of all runs. associations: per set of pairs (`ALL`, `POOLED`, or a run's name) and predictor.
        titles: per run with accuracies, its method and order, and its name where two of them are of one.
    """

    source: str
    exact: bool
    tasks: tuple[str, ...]
    overlap: list[list[float | None]]
    energy: list[list[float | None]]
    pairs: tuple[Pair, ...]
    associations: dict[str, dict[str, Association]]
    titles: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "source": self.source, "exact": self.exact, "tasks": list(self.tasks), "overlap": self.overlap,
            "energy": self.energy, "pairs": [asdict(pair) for pair in self.pairs],
            "associations": {
                name: {key: one.to_dict() for key, one in found.items()} for name, found in self.associations.items()
            },
            "titles": self.titles,
        }  # fmt: skip


Gradients = Mapping[str, Mapping[str, float | None]]
"""[later][earlier] `gradient_inside` of a run's tasks."""


def task_similarity(
    paths: Sequence[Path], energy: float = 0.99, *, subspaces: Path | None = None,
    gradients: Callable[[str, Path, Mapping[str, TaskFeatures]], Gradients] | None = None,
) -> Similarity:  # fmt: skip
    """Read runs of the same tasks, in whatever orders and by whatever methods, and compare prediction with measurement.

    Args:
        paths: run directories; also ledgers without a run around them, which have no accuracies.
        energy: share of a task's energy beyond U₀ that its own subspace holds. subspaces: whose ledger gives the subspaces;
            None: the first that kept covariances, else the first that protects.
        gradients: called with a run's name and folder and the subspaces; gives what `gradients_inside` does, taken anew or from
            where it was kept. None: the gradients are not taken, and predict nothing.

    Raises:
        KeepLoraError: none of the ledgers protects anything or has learned a task, two are of different base models, or a name is
            given twice.
    """
    places = {_name(path): LedgerPlace.open(path) for path in paths}
    if len(places) < len(paths):
        raise KeepLoraError(
            "two of the runs have the same folder name, so their rows could not be told apart; rename one"
        )
    hashes = {name: place.ledger.head["base"]["hash"] for name, place in places.items()}
    first = next(iter(hashes))
    if odd := [name for name, found in hashes.items() if found != hashes[first]]:
        raise KeepLoraError(
            f"{odd[0]} was learned on another base model than {first}: their features cannot be compared"
        )
    source, features = _features(places, subspaces, hashes[first])
    pairs: list[Pair] = []
    titles: dict[str, str] = {}
    for name, place in places.items():
        results = RunDirectory(place.root).read_results() if place.run else None
        if results:
            titles[name] = _title(results)
            updates = updates_of(place.ledger.records())
            taken = None if gradients is None else gradients(name, place.root, features)
            pairs += pairs_of(name, results["tasks"], results["accuracy"], updates, features, energy, taken)
    tasks = list(features.values())
    inside = [[energy_inside(j, i, energy) for i in tasks] for j in tasks]
    measured: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.drop is not None:
            measured.setdefault(pair.run, []).append(pair)
    groups = list(measured.values())
    # Pooled, the runs' own levels count as well: a method that disturbs less is to forget less.
    sets = {ALL: groups, POOLED: [[pair for group in groups for pair in group]]} if len(groups) > 1 else {}
    sets |= {name: [group] for name, group in measured.items()}
    predictors = [p for p in PREDICTORS if p != "gradient" or gradients is not None]
    return Similarity(
        source, all(t.exact for t in tasks), tuple(features), overlap_matrix(features, energy), inside, tuple(pairs),
        {key: {p: _association(groups, p) for p in predictors} for key, groups in sets.items()},
        _apart(titles),
    )  # fmt: skip


def _title(results: Mapping[str, Any]) -> str:
    method = str(results.get("method_title") or method_label(str(results.get("method")), results.get("variant")))
    return method if results.get("order") is None else f"{method}, order {results['order']}"


def _apart(titles: dict[str, str]) -> dict[str, str]:
    """Titles with the run's folder where two are equal.

    >>> _apart({"a": "LoRA", "b": "LoRA", "c": "EWC"})
    {'a': 'LoRA (a)', 'b': 'LoRA (b)', 'c': 'EWC'}
    """
    twice = Counter(titles.values())
    return {name: f"{title} ({name})" if twice[title] > 1 else title for name, title in titles.items()}


def _name(path: Path) -> str:
    return path.resolve().name


def _features(places: dict[str, LedgerPlace], subspaces: Path | None, base: str) -> tuple[str, dict[str, TaskFeatures]]:
    if subspaces is not None:
        ledger = LedgerPlace.open(subspaces).ledger
        if ledger.head["base"]["hash"] != base:
            raise KeepLoraError(
                f"{subspaces} was learned on another base model than the runs: their features cannot be compared"
            )
        if not (features := ledger_features(ledger)):
            raise KeepLoraError(f"{subspaces} has learned no task, so it has no subspaces; name another --subspaces")
        return str(subspaces), features
    found: tuple[str, dict[str, TaskFeatures]] | None = None
    problem: KeepLoraError | None = None
    for name, place in places.items():
        try:
            features = ledger_features(place.ledger)
        except KeepLoraError as error:
            problem = problem or error
            continue
        if features and all(t.exact for t in features.values()):
            return name, features
        found = found or ((name, features) if features else None)
    if found is not None:
        return found
    raise problem or KeepLoraError(
        "no task has been learned in what was given; give a run directory or ledger with tasks"
    )


def _association(groups: Sequence[Sequence[Pair]], predictor: str) -> Association:
    lists = []
    for group in groups:
        known = [
            (x, pair.drop) for pair in group if (x := pair.predicted[predictor]) is not None and pair.drop is not None
        ]
        lists.append(([x for x, _ in known], [y for _, y in known]))
    return spearman_within(lists)
