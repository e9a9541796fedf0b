"""The model card: README.md of a repository on the hub, from what a ledger and a run say about themselves.

Nothing is guessed: what is not known is left out, or said to be unknown. `keeplora.experiment.card_facts` collects the
facts; the words are in ``templates/card.md.j2``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keeplora.files import atomic_write_bytes
from keeplora.report.charts import nice_top, number
from keeplora.report.compare import signed, untouched
from keeplora.report.kinds import IN_POINTS
from keeplora.report.pages import TEMPLATES
from keeplora.report.plots import SOFT, draw_curves
from keeplora.report.runs import Run
from keeplora.report.tables import count, moment, size

MOST_COLUMNS = 12
"""A matrix with more sets than this is told task by task: no reader sees thirty columns of a Markdown table."""
FIGURE = "figures/curves.png"
LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()  # noqa: SIM905
)
"""What the hub takes as ``license:``; any other goes in as ``other`` with its name."""


@dataclass(frozen=True)
class TaskFacts:
    """A task of the ledger; None or "" where nobody told.

    Attributes:
        fate: "learned", or why it is not in the model. learns: "7 classes", "questions (exact)". train, test: numbers of
            samples. fingerprint: hash of its data. dataset: its name on the hub. layers: how many layers it adapted.
        ranks: "16", or "3–16". when: an ISO time.
    """

    name: str
    fate: str = "learned"
    learns: str = ""
    train: int | None = None
    test: int | None = None
    fingerprint: str = ""
    licence: str | None = None
    seed: int | None = None
    when: str | None = None
    dataset: str | None = None
    layers: int = 0
    ranks: str = ""
    scorer: str | None = None


@dataclass(frozen=True)
class Room:
    """Dimensions of the protected subspaces: of one tower, or of one layer."""

    name: str
    used: int
    of: int
    start: int = 0

    @property
    def left(self) -> int:
        return self.of - self.used

    @property
    def share(self) -> str:
        """How much is left.

        >>> Room("vision", 96, 384).share
        '75.0 %'
        """
        return f"{number(100 * self.left / self.of)} %" if self.of else "–"


@dataclass(frozen=True)
class Leak:
    """The worst factor leak over layers and tasks (limit 1e-5), and where; the weights' worst beside its rounding floor."""

    factors: float
    layer: str
    task: str
    weights: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Opening:
    """Python that opens a model: its imports, and the lines after them."""

    imports: tuple[str, ...]
    lines: tuple[str, ...]

    def block(self, *imports: str) -> str:
        """Both, with further imports, in the order in which a person would write them.

        >>> print(Opening(("from transformers import CLIPModel",), ("base = ...",)).block("import torch"))
        import torch
        from transformers import CLIPModel
        <BLANKLINE>
        base = ...
        """
        first = sorted({*self.imports, *imports}, key=lambda line: (line.startswith("from"), line))
        return "\n".join([*first, "", *self.lines])


@dataclass(frozen=True)
class Base:
    """The base model. ``hub_id`` is None where it is no model of the hub; ``stock`` and ``own`` open it with transformers and
    with keeplora, as ``base``, None where they cannot; ``module`` is where its class is imported from, "" if nowhere."""

    name: str
    cls: str
    hash: str
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    stock: Opening | None = None
    own: Opening | None = None
    module: str = ""


@dataclass(frozen=True)
class Contents:
    """What of it lies in the repository beside the card and the ledger."""

    adapter: bool = False
    task_adapters: tuple[str, ...] = ()
    merged: bool = False
    figure: bool = False
    samples: bool = False
    left_out: tuple[str, ...] = ()
    why_no_adapter: str = ""


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. ``learner`` is the import line and the name of the class that opens the ledger;
    ``protection`` pairs of a setting and its value; ``removed`` tasks whose directions alone are here; ``gone`` measured ones
    that the ledger has no more, ``newer`` ones that it has and nobody measured; ``run`` is there where results are."""

    repo_id: str
    title: str
    base: Base
    tasks: tuple[TaskFacts, ...]
    method: str = ""
    learner: tuple[str, str] = ("from keeplora import ContinualLearner", "ContinualLearner")
    serves_task: bool = False
    pipeline_tag: str | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    rooms: tuple[Room, ...] = ()
    fullest: Room | None = None
    protection: tuple[tuple[str, str], ...] = ()
    memory: str = ""
    leak: Leak | None = None
    removed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    run: Run | None = None
    contents: Contents = Contents()

    @property
    def measured_with(self) -> list[str]:
        """Tasks that were in the model when it was measured last, and are not in what lies here."""
        measured = self.run.tasks[: self.run.done] if self.run is not None else []
        return [name for name in measured if name in (*self.removed, *self.gone)]

    @property
    def learned(self) -> list[TaskFacts]:
        return [task for task in self.tasks if task.fate == "learned"]


def cell(value: object) -> str:
    """Text that cannot leave its cell of a Markdown table, nor become a link, markup or HTML.

    >>> print(cell("a|b <i>"), cell(None))
    a\\|b &lt;i&gt; –
    """
    text = " ".join(str(value).split()) if value not in (None, "") else "–"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def front_matter(facts: CardFacts) -> str:
    """The YAML between the lines of dashes, as the hub reads it; only what is known."""
    from huggingface_hub import ModelCardData

    licence: dict[str, Any] = {}
    if facts.licence:
        known = facts.licence.lower()
        licence = {"license": known} if known in LICENCES else {"license": "other", "license_name": facts.licence}
    data = ModelCardData(
        base_model=facts.base.hub_id,
        library_name="peft" if facts.contents.adapter else "keeplora",
        pipeline_tag=facts.pipeline_tag,
        language=list(facts.languages) or None,
        tags=["keeplora", "continual-learning", *(["lora", "peft"] if facts.contents.adapter else [])],
        datasets=sorted({task.dataset for task in facts.tasks if task.dataset}) or None,
        **licence,
        **_model_index(facts),
    )
    return data.to_yaml()


def _model_index(facts: CardFacts) -> dict[str, Any]:
    """Each learned task's last row, as the hub's ``model-index``."""
    from huggingface_hub import EvalResult

    run = facts.run
    # A leaderboard must not tell of another model, nor of samples that settings were chosen on.
    if run is None or not run.done or facts.measured_with or run.on_validation:
        return {}
    found = []
    for task in facts.learned:
        value = next(iter(run.column(task.name)[-1:]), None)
        if value is None:
            continue
        metric = task.scorer or run.kind.quantity
        found.append(
            EvalResult(
                task_type=facts.pipeline_tag or "other",
                dataset_type=task.dataset or _slug(task.name),
                dataset_name=task.name,
                metric_type=metric,
                metric_value=round(value, 2),
                metric_name=f"{metric} in percent after {run.done} tasks" + (f", n = {task.test}" if task.test else ""),
            )
        )
    return {"model_name": facts.repo_id.split("/")[-1], "eval_results": found} if found else {}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "task"


def matrix(facts: CardFacts) -> dict[str, Any] | None:
    """The scores as a table: rows of moments where few sets are there, else one row per set."""
    run = facts.run
    if run is None or not run.accuracy:
        return None
    sets = [*run.tasks, *run.probes]
    counts = run.results.get("test_counts") or {}
    heads = [f"{cell(name)} (n = {count(counts.get(name))})" for name in sets]
    moments = ["untouched model", *(f"after {i} · {cell(n)}" for i, n in enumerate(run.tasks[: run.done], 1))]
    rows = [
        [*row, *(run.probe_accuracy[i] if i < len(run.probe_accuracy) else [])] for i, row in enumerate(run.accuracy)
    ]
    if len(sets) <= MOST_COLUMNS:
        table = [[m, *map(number, row)] for m, row in zip(moments, rows, strict=False)]
        return {
            "told": "Row by row, the untouched model and the model after each task",
            "head": ["", *heads],
            "rows": table,
        }
    table = []
    for j, head in enumerate(heads):
        column = [row[j] for row in rows]
        learned = column[j + 1] if j < run.done else None
        table.append([head, number(column[0]), number(learned), number(column[-1])])
    head = ["", "untouched model", "right after it was learned", f"after {run.done} tasks"]
    return {"told": "Row by row, one set at three moments", "head": head, "rows": table}


def metric_rows(run: Run) -> list[list[str]]:
    """Name, value, the untouched model's, meaning; those that the run has."""
    base, found = untouched(run), []
    for key, name, _, meaning in run.kind.metrics:
        if (value := run.metrics.get(key)) is not None:
            text = signed(value) if key == "bwt" else number(value)
            found.append([name, text, "–" if key in IN_POINTS else number(base.get(key)), cell(meaning)])
    return found


def render_card(facts: CardFacts) -> str:
    """README.md as text: front matter and body.

    Examples
    --------
    >>> base = Base("clip", "CLIPModel", "0" * 64, hub_id="openai/clip-vit-base-patch16", stock=Opening((), ("base = ...",)))
    >>> text = render_card(CardFacts("me/pets", "pets", base, (TaskFacts("pets", learns="37 classes"),)))
    >>> "base_model: openai/clip-vit-base-patch16" in text, "37 classes" in text
    (True, True)
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=False, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"cell": cell, "count": count, "moment": moment, "size": size}
    body = environment.get_template("card.md.j2").render(
        facts=facts, base=facts.base, contents=facts.contents, run=facts.run, scores=matrix(facts),
        metrics=metric_rows(facts.run) if facts.run is not None else [], figure=FIGURE,
    )  # fmt: skip
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{front_matter(facts).strip()}\n---\n\n{body}\n"


def write_figure(run: Run, folder: Path) -> Path:
    """The forgetting curves of one run as ``figures/curves.png`` below ``folder``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, run, run.label)
    axes.set_ylim(0, 1.03 * nice_top([v for row in run.accuracy for v in row], 100.0))  # markers at the top stay whole
    axes.set_ylabel(f"{run.kind.quantity} on the {run.kind.items} (%)", fontsize=9, color=SOFT)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return atomic_write_bytes(folder / FIGURE, buffer.getvalue())


def joined(names: Sequence[str]) -> str:
    """Names in one sentence.

    >>> joined(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))
