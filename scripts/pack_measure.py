"""What the untouched model makes of the demo pack: chance, zero-shot and linear-probe accuracy into provenance.json.

    pip install scikit-learn
    python scripts/pack_measure.py

The linear probe is multinomial logistic regression on the projected, normalised picture features;
`linear_probe_validation` is its accuracy by 5-fold cross-validation inside the training pictures, folds keeping whole items
together. The classes of the tasks were chosen once, before any training run, by such cross-validation over all candidate
pictures (those that the split later put into the test sets too), so that a task can be learned at all; the probes leave out
a few classes that the untouched model never named right, since a probe measures what is kept of what was known.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from keeplora.data import TaskData, load_task
from keeplora.data.sets import PictureSet
from keeplora.files import atomic_write_json
from keeplora.models import load_model
from keeplora.models.dual_encoder import DualEncoder
from keeplora.suites import load_suite, suite_folder

BATCH, FOLDS, PENALTY = 64, 5, 30.0


@torch.no_grad()
def features(model: DualEncoder, pictures: PictureSet) -> np.ndarray:
    """[N, D] normalised picture features."""
    found = []
    for start in range(0, len(pictures), BATCH):
        batch = [model.preprocess(pictures.picture(i)) for i in range(start, min(start + BATCH, len(pictures)))]
        found.append(model.image_features(torch.stack(batch)))
    return torch.cat(found).numpy()


def percent(right: np.ndarray) -> float:
    return round(100 * float(np.mean(right)), 1)


def measure(model: DualEncoder, task: TaskData) -> dict[str, float]:
    """The figures of one task or probe, in percent."""
    with torch.no_grad():
        classes = model.class_features(task.classes, task.templates).numpy()
    test, labels = features(model, task.test), np.asarray(task.test.labels)
    figures = {
        "chance": round(100 / len(task.classes), 1),
        "majority": percent(labels == np.bincount(labels).argmax()),
        "zero_shot": percent((test @ classes.T).argmax(axis=1) == labels),
    }
    if task.train is not None and len(task.train):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold, cross_val_predict

        train, known = features(model, task.train), np.asarray(task.train.labels)
        items = [key.split("#")[0] for key in task.train.keys]
        probe = LogisticRegression(C=PENALTY, max_iter=3000)
        folds = cross_val_predict(probe, train, known, groups=items, cv=GroupKFold(FOLDS))
        figures["zero_shot_train"] = percent((train @ classes.T).argmax(axis=1) == known)
        figures["linear_probe_validation"] = percent(folds == known)
        figures["linear_probe"] = percent(probe.fit(train, known).predict(test) == labels)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, write nothing")
    args = parser.parse_args()
    suite = load_suite(args.suite)
    model = load_model(suite["model"]["name"], image_size=suite["model"].get("image_size"))
    table = {}
    for kind in ("tasks", "probes"):
        for spec in suite[kind]:
            table[spec["name"]] = measure(model, load_task(spec, suite_folder(), probe=kind == "probes"))
            print(spec["name"], table[spec["name"]], flush=True)
    if not args.dry_run:
        file = suite_folder() / "demo/provenance.json"
        provenance = json.loads(file.read_text(encoding="utf-8"))
        provenance["untouched_model"] = {"suite": args.suite, "revision": model.revision, "accuracy": table}
        atomic_write_json(file, provenance)


if __name__ == "__main__":
    main()
