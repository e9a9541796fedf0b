"""Whole experiments on class folders of videos: what they measure, which frames they read, what they refuse."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("av")

from keeplora.cli import main
from keeplora.data import load_task
from keeplora.data.sets import PictureSet
from keeplora.data.video import FrameCache, Sampling
from keeplora.errors import ConfigError
from keeplora.experiment import Experiment, TrainedModel
from keeplora.experiment.pictures import PictureTensors, TensorCache
from keeplora.models import load_model
from tests.cli.tiny_world import ledger_tensors, record_of
from tests.data.clip_files import plain, write_clip
from tests.models.tiny import CLIP_FRAMES, make_tiny

TRAIN, TEST = 4, 3
#: By task and class: the grey levels of the frames, from first to last. The classes of "turn" differ by their order alone.
TASKS = {
    "shade": {"light": [200, 190, 180, 190, 200, 190, 200], "dark": [40, 50, 60, 50, 40, 50, 40]},
    "turn": {"up": [30, 60, 90, 120, 150, 180, 210], "down": [210, 180, 150, 120, 90, 60, 30]},
}
PROBE = {"plain": {"white": [225] * 6, "black": [10] * 6}}
TURN = [{"name": "turn", "source": "folder", "path": "turn"}]
FAMILIES = ("clip", "siglip", "siglip2", "vision-text", "xclip")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for n, (task, classes) in enumerate({**TASKS, **PROBE}.items()):
        for label, levels in classes.items():
            for split, count in (("train", TRAIN), ("test", TEST)):
                for i in range(count):
                    # One texture for both classes: "up" and "down" have the same frames.
                    seed = 1000 * n + 10 * i + (split == "test")
                    write_clip(folder / task / split / label / f"{i}.mp4", plain(levels, seed), intra=True)
    for family in FAMILIES:
        make_tiny(family, folder / "models" / family)
    return folder


def config(root: Path, family: str = "clip", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": str(root / "models" / family),
        "tasks": [{"name": name, "source": "folder", "path": name} for name in TASKS],
        "probes": [{"name": "plain", "source": "folder", "path": "plain/test"}],
        "method": "keeplora++", "base_dir": str(root), "device": "cpu", "tuner": {"r": 4},
        "video": {"frames": CLIP_FRAMES, "statistics_frames": 2},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "precision": "fp32"},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return copy.deepcopy(values)


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Any:
    """Runs a configuration: (run directory, results)."""

    def go(**changes: Any) -> tuple[Path, dict[str, Any]]:
        path = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return path, Experiment(config(root, **changes, output=str(path)), quiet=True).run()

    return go


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often a clip of so many frames was read, by split."""
    counts: Counter[tuple[str, int]] = Counter()
    whole = PictureSet.clip

    def clip(self: PictureSet, index: int, sampling: Any, cache: Any = None) -> Any:
        found = whole(self, index, sampling, cache)
        counts[self.keys[index].split("/")[0], len(found.frames)] += 1
        return found

    monkeypatch.setattr(PictureSet, "clip", clip)
    return counts


def files(root: Path, task: str, split: str = "test") -> list[tuple[str, Path]]:
    """(class, file) of every video of a task."""
    return [(label, file) for label in TASKS[task] for file in sorted((root / task / split / label).iterdir())]


def stock_accuracy(root: Path, family: str, task: str) -> float:
    """Percent right of the untouched model by PyAV, NumPy and `transformers` alone: no code of keeplora."""
    import av
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(root / "models" / family).eval()
    processor = AutoProcessor.from_pretrained(root / "models" / family, backend="pil")
    prompts = processor.tokenizer(
        [f"a photo of a {c}." for c in sorted(TASKS[task])], padding=True, return_tensors="pt"
    )
    right = 0
    for label, file in files(root, task):
        with av.open(str(file)) as container:
            decoded = [frame.to_image() for frame in container.decode(video=0)]
        chosen = [decoded[int(i)] for i in np.floor(np.linspace(0, len(decoded) - 1, CLIP_FRAMES) + 1e-6)]
        with torch.no_grad():
            if family == "xclip":
                pixels = processor(videos=chosen, return_tensors="pt")["pixel_values"]
                logits = model(**prompts, pixel_values=pixels).logits_per_video[0]
            else:
                out = model(
                    **prompts, pixel_values=processor.image_processor(chosen, return_tensors="pt")["pixel_values"]
                )
                logits = out.text_embeds @ out.image_embeds.mean(0)  # both unit vectors
        right += sorted(TASKS[task])[int(logits.argmax())] == label
    return 100.0 * right / len(files(root, task))


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_every_family(root: Path, run: Any, family: str) -> None:
    path, results = run(family=family)
    accuracy, probes = results["accuracy"], results["probe_accuracy"]
    assert ([len(row) for row in accuracy], [len(row) for row in probes]) == ([2] * 3, [1] * 3)
    cells = [value for row in [*accuracy, *probes] for value in row]
    assert all(math.isclose(value * 2 * TEST / 100, round(value * 2 * TEST / 100), abs_tol=1e-9) for value in cells)
    record = record_of(path, 1)["info"]
    assert (record["video"]["frames"], record["video"]["statistics_frames"]) == (CLIP_FRAMES, 2)
    # The last row is what the saved model says of the files, one by one.
    model = TrainedModel(path, device="cpu")
    for column, task in enumerate(TASKS):
        right = [model.predict(file, task=task)[0].label == label for label, file in files(root, task)]
        assert accuracy[2][column] == pytest.approx(100 * sum(right) / len(right))


def test_the_command_line_names_a_video(root: Path, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(family="xclip", probes=[], method="lora", training={"epochs": 8})[0]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(path), "--video", str(root / "shade/test/dark/0.mp4"), "--task", "shade", "--json"])
    assert not caught.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["video"].endswith("shade/test/dark/0.mp4")
    found = TrainedModel(path, device="cpu").predict(root / "shade/test/dark/0.mp4", task="shade")
    assert [p["class"] for p in told["predictions"]] == [p.label for p in found]
    assert found[0].label == "dark"


@pytest.mark.parametrize("family", ["clip", "xclip"])
def test_the_first_row_is_what_stock_transformers_measures(root: Path, run: Any, family: str) -> None:
    results = run(family=family, method="zero-shot", probes=[])[1]
    assert results["accuracy"][0] == pytest.approx([stock_accuracy(root, family, task) for task in TASKS])


def test_order_is_learned_by_xclip_and_cannot_be_by_mean_pooling(run: Any) -> None:
    changes = {"tasks": TURN, "probes": [], "method": "lora", "training": {"epochs": 12}}
    assert run(family="xclip", **changes)[1]["accuracy"][-1] == [100.0]
    assert run(family="clip", **changes)[1]["accuracy"][-1] == [50.0]  # the frames of both classes are the same
    shade = {**changes, "tasks": [{"name": "shade", "source": "folder", "path": "shade"}]}
    assert run(family="clip", **shade)[1]["accuracy"][-1] == [100.0]  # and what frames tell it does learn


# ---- which frames are read -------------------------------------------------------------------------------------------


def test_statistics_read_fewer_frames(run: Any, read: Counter[tuple[str, int]]) -> None:
    run(probes=[])
    each = 2 * len(TASKS)
    # Of the full length, clips are kept as tensors; of the statistics' length, their frames are kept.
    assert read["train", CLIP_FRAMES] == each * TRAIN
    assert read["train", 2] >= 2 * each * TRAIN  # gradients and features
    assert (read["test", CLIP_FRAMES], read["test", 2]) == (each * TEST, 0)


@pytest.mark.parametrize("method", ["replay", "rail-primal"])
def test_what_is_learned_from_or_kept_has_all_frames(run: Any, read: Counter[tuple[str, int]], method: str) -> None:
    run(probes=[], method=method)
    assert {frames for _, frames in read} == {CLIP_FRAMES}


def test_xclip_reads_its_own_number_everywhere(run: Any, read: Counter[tuple[str, int]]) -> None:
    run(family="xclip", probes=[])
    assert {frames for _, frames in read} == {CLIP_FRAMES}


@pytest.mark.parametrize(("family", "ranges"), [("clip", (3, 1, 1)), ("siglip2", (1, 8 * 8 * 3 + 2))])
def test_clips_of_different_lengths_stack(
    root: Path, run: Any, tmp_path: Path, family: str, ranges: tuple[int, ...]
) -> None:
    """Sampled by rate, each video gives as many frames as it lasts; replay keeps them so."""
    base = tmp_path / "lengths"
    for n, (label, level) in enumerate({"light": 200, "dark": 40}.items()):
        for split in ("train", "test"):
            for i in range(3):
                seed = 10 * i + n + 50 * (split == "test")
                write_clip(base / "a" / split / label / f"{i}.mp4", plain([level] * (2 + 3 * i), seed))
    tasks = [{"name": "a", "source": "folder", "path": str(base / "a")}, *TURN]
    video = {"sampling": "fps", "fps": 4.0}
    path, results = run(family=family, tasks=tasks, video=video, method="replay", probes=[])
    assert all(0 <= value <= 100 for row in results["accuracy"] for value in row)
    kept = next(v for k, v in ledger_tensors(path).items() if k.endswith("replay/low"))
    assert kept.shape == (6, CLIP_FRAMES, *ranges)
    assert sorted(kept.flatten(2)[..., 0].isnan().sum(1).tolist()) == [0, 0, 1, 1, 3, 3]
    with pytest.raises(ConfigError, match=r"reads 4 frames of every video.*set `frames: 4` and `sampling: uniform`"):
        run(family="xclip", tasks=tasks, video=video, probes=[])


def test_what_does_not_fit_into_memory_is_kept_as_frames(root: Path) -> None:
    family = load_model(root / "models" / "clip")
    task: Any = load_task(config(root)["tasks"][0], root)
    frames = FrameCache(1 << 30)
    sampling = Sampling(frames=CLIP_FRAMES)
    room = family.preprocess_clip(task.train.clip(0, sampling).frames).numel() * 4
    data = PictureTensors(task.train, family, TensorCache(3 * room), sampling=sampling, frames=frames)
    first = [data[i]["pixel_values"] for i in range(len(data))]
    assert (len(frames), data.kept) == (
        len(data) - 4,
        False,
    )  # three fitted, and that the fourth does not was seen too late
    assert all(torch.equal(data[i]["pixel_values"], pixels) for i, pixels in enumerate(first))
    fewer = data.sampled(Sampling(frames=2))
    assert fewer[0]["pixel_values"].shape[0] == 2
    assert data.sampled(sampling) is data


def test_workers_change_nothing_and_what_they_decode_is_kept(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []
    keep = PictureTensors.keep

    def counted(self: PictureTensors, batch: Any) -> None:
        handed.append(len(batch["index"]))
        keep(self, batch)

    monkeypatch.setattr(PictureTensors, "keep", counted)
    alone = run(probes=[])[1]
    assert not handed
    beside = run(probes=[], training={"workers": 1})[1]
    assert sum(handed) == 2 * len(TASKS) * TEST  # in the first evaluation alone: then all are in memory
    assert beside["accuracy"] == alone["accuracy"]


# ---- methods ---------------------------------------------------------------------------------------------------------


WITH_FEATURES = [
    ("keeplora++-cls", "own"), ("replay", "all"), ("lwf", "own"), ("zscl", "all"), ("rail-primal", "all"),
    ("rail-dual", "own"), ("joint", "own"),
]  # fmt: skip


@pytest.mark.parametrize("family", ["clip", "xclip"])
@pytest.mark.parametrize(("method", "candidates"), WITH_FEATURES)
def test_methods_that_use_features_and_class_prompts(run: Any, family: str, method: str, candidates: str) -> None:
    reference = {"name": "beside", "source": "folder", "path": "plain/test"} if method == "zscl" else None
    more = {"training": {"epochs": 1}, "candidates": candidates, "probes": [], "reference": reference}
    path, results = run(family=family, method=method, **more)
    assert [len(row) for row in results["accuracy"]] == [2] * 3
    assert results["chance"]["shade"] == pytest.approx(25.0 if candidates == "all" else 50.0)
    assert all(torch.isfinite(tensor.float()).all() for tensor in ledger_tensors(path).values())


def test_pictures_and_videos_in_one_sequence(root: Path, run: Any, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, level in {"bright": 220, "dim": 60}.items():
            folder = tmp_path / "stills" / split / label
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(plain([level], i + 10 * (split == "test"))[0]).save(folder / f"{i}.png")
    stills = {"name": "stills", "source": "folder", "path": str(tmp_path / "stills")}
    both = [stills, {"name": "shade", "source": "folder", "path": "shade"}, {**stills, "name": "again"}]
    results = run(tasks=both, method="replay", probes=[])[1]
    assert [len(row) for row in results["accuracy"]] == [3] * 4
    assert results["accuracy"][0][0] == results["accuracy"][0][2]
    with pytest.raises(ConfigError, match=r"\.png is a picture, but .*xclip reads videos alone, of 4 frames"):
        run(family="xclip", tasks=both, probes=[])


# ---- what is refused or counted --------------------------------------------------------------------------------------


def test_xclip_with_another_number_of_frames_is_refused(run: Any) -> None:
    changes = {"family": "xclip", "method": "zero-shot", "probes": []}
    run(video={"sampling": "segment"}, **changes)
    with pytest.raises(ConfigError, match="xclip reads 4 frames of every video, no more and no fewer; set `frames: 4`"):
        run(video={"frames": 8}, **changes)


def test_an_unreadable_test_video_counts_as_wrong(root: Path, run: Any, tmp_path: Path) -> None:
    copied = shutil.copytree(root / "shade", tmp_path / "shade")
    task = {"name": "shade", "source": "folder", "path": str(copied), "on_error": "skip", "max_skipped": 0.5}
    learned = {"tasks": [task], "method": "lora", "probes": [], "training": {"epochs": 8}}
    assert run(**learned)[1]["accuracy"][-1] == [100.0]
    (copied / "test" / "light" / "z.mp4").write_bytes(b"nothing")  # one more, which cannot be read
    assert run(**learned)[1]["accuracy"][-1] == pytest.approx([100 * 2 * TEST / (2 * TEST + 1)])


def test_runs_with_other_frames_are_not_compared(run: Any) -> None:
    def key(**video: Any) -> str:
        return run(tasks=TURN, probes=[], method="zero-shot", video=video)[1]["comparison_key"]

    assert key() == key(cache_mib=7)
    assert key() != key(frames=3)
