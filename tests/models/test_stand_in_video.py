"""The video stand-in: its files, what its record says, and that it answers by looking at several frames."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from keeplora.errors import KeepLoraError
from keeplora.files import sha256_file
from keeplora.models import stand_in

ROOT = Path(__file__).resolve().parents[2]
FILES = stand_in.VIDEOS.files
TASKS = ("counting", "motion", "order", "speed", "actions")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_the_files_are_small_and_recorded():
    assert sum(p.stat().st_size for p in FILES.iterdir()) <= 12_500_000
    record = stand_in.stand_in_record("stand-in-video")
    assert record["weights_sha256"] == sha256_file(FILES / stand_in.VIDEOS.weights)
    assert record["command"] == "python scripts/train_stand_in_video.py"


def test_the_weights_are_all_but_the_tower_and_what_is_shared():
    from safetensors import safe_open

    with safe_open(FILES / stand_in.VIDEOS.weights, "pt") as own:
        names = set(own.keys())
    assert "model.image_newline" in names
    assert not [n for n in names if "vision_tower" in n or "multi_modal_projector" in n]
    file, prefix = stand_in.VIDEOS.shared or (Path(), "")
    with safe_open(file, "pt") as shared:
        assert [n for n in shared.keys() if n.startswith(prefix)]  # noqa: SIM118


def test_the_processor_speaks_for_eight_frames_of_sixteen_places():
    settings = json.loads((FILES / "processor_config.json").read_text())
    assert settings["processor_class"] == "LlavaOnevisionProcessor"
    assert settings["num_image_tokens"] == 65  # 8 x 8 patches and the tower's class token, which "default" leaves out
    assert settings["video_processor"]["size"] == {"height": 112, "width": 112}
    config = json.loads((FILES / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 112
    assert config["vision_feature_select_strategy"] == settings["vision_feature_select_strategy"]


def test_the_recorded_figures_are_far_above_guessing_blindness_and_one_frame():
    figures = stand_in.stand_in_record("stand-in-video")["held_out"]
    general = figures["general"]
    assert general["score"] >= max(general["blind"], general["prior"], general["one_frame"]) + 0.2
    assert all(figures[task]["score"] <= 0.1 for task in TASKS), "the tasks are new to the model"


def test_a_question_in_teaching_sees_its_frames_and_itself_alone(scripts):
    import stand_in_video_teach as teach
    from stand_in_reels import Actor, Reel
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    config = AutoConfig.from_pretrained(FILES)
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 8
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.model.language_model.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(FILES)
    reel = Reel("act", [Actor("a bird", None)], [], {"place": "top"})  # type: ignore[arg-type]
    bank = np.random.default_rng(0).normal(size=(26, 16, 256)).astype(np.float16)
    clips = teach.Clips([reel], bank, bank, [[("x", "What?", "red")]], tokenizer)
    clips.clip = lambda rng: (bank[:8], [("a", "What colour is it?", "red"), ("b", "What shape is it?", "ring")])  # type: ignore[method-assign]
    batch = clips.batch(teach.Random(0))
    assert batch.frames.shape == (teach.BATCH, 128, 256)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.inference_mode():
        teach.loss_of(model, batch)
        first = (batch.labels[0] != -100).nonzero()[0, 0]
        batch.ids[0, first] = 5  # another word in the first turn's answer
        teach.loss_of(model, batch)
        batch.frames = batch.frames + 1
        teach.loss_of(model, batch)
    changed = (seen[0] - seen[1]).abs().amax(dim=1) > 1e-6
    assert changed.sum() == 1, "only </s> comes after that word in its turn"
    assert ((seen[1] - seen[2]).abs().amax(dim=1) > 1e-6).all()


def test_reels_of_teaching_say_what_is_true(scripts):
    """What a clip says of a line's ends and heading follows from where the thing is drawn."""
    from stand_in_reels import COMPASS, MAKERS, Cast
    from stand_in_reels import Random as Chance

    class Alone(Cast):
        def __init__(self) -> None:
            self.groups, self.names = {}, []

        def actors(self, rng, count, shapes=0.4):
            return super().actors(rng, count, 1.0)

    make, ask = MAKERS["line"]
    headings = set()
    for seed in range(30):
        rng = Chance(seed)
        reel = make(Alone(), rng)
        clip = ask(reel, rng)
        told = {kind: said for kind, asked, said in clip.turns if asked.startswith(("Where", "On the", "In which"))}
        spots = [reel.facts["spots"][i] for i in clip.states]
        for key, (x, y) in (("start", spots[0]), ("end", spots[-1])):
            word = ("top", "middle", "bottom")[int(y % 112 * 3 // 112)]
            assert word == "middle" or word in told[key]
            side = ("left", "centre", "right")[int(x % 112 * 3 // 112)]
            assert side == "centre" or side in told[key]
        moves = [tuple((b - a + 56) % 112 - 56 for a, b in zip(p, q, strict=True)) for p, q in pairwise(spots)]
        total = tuple(float(np.sign(round(sum(m[i] for m in moves), 3))) for i in (0, 1))
        assert told["heading"] == (COMPASS[total] if any(total) else "nowhere")
        halved = [said for kind, asked, said in clip.turns if kind == "heading" and asked.startswith("Is ")]
        assert " ".join(w for w in reversed(halved) if w != "neither") == (told["heading"] if any(total) else "")
        lengths = [np.hypot(*m) for m in moves]
        early, late = sum(lengths[:3]), sum(lengths[-3:])
        halves = {"the first half": early > late, "the second half": late > early}
        assert halves.get(told["pace"], abs(early - late) < 1e-6)
        headings.add(told["heading"])
    assert len(headings) >= 6


def test_without_the_tower_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path))
    with pytest.raises(KeepLoraError, match=r"vision tower.*`keeplora assets fetch`"):
        stand_in.stand_in_path("stand-in-video")
    assert not list(tmp_path.glob("stand-in-*"))


def test_an_incomplete_installation_is_named(tmp_path, monkeypatch):
    shutil.copytree(FILES, tmp_path / "files")
    (tmp_path / "files/tokenizer.json").unlink()
    broken = stand_in.StandIn(tmp_path / "files", stand_in.VIDEOS.weights, (tmp_path / "gone.safetensors", "model."))
    monkeypatch.setitem(stand_in.STAND_INS, "stand-in-video", broken)
    with pytest.raises(KeepLoraError, match=r"tokenizer\.json, gone\.safetensors is missing"):
        stand_in.stand_in_path("stand-in-video")


@pytest.mark.towers
def test_stock_classes_load_it_and_it_answers_by_looking_at_all_frames(scripts):
    pytest.importorskip("av")
    from stand_in_video_score import PACKS, answers, read, score
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = stand_in.stand_in_path("stand-in-video")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(model).__name__ == "LlavaOnevisionForConditionalGeneration"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = [r for r in read(PACKS / "general.parquet") if r[0].split(": ")[1] in ("change", "end", "heading")]
    clips = np.stack([r[3] for r in chosen])

    def right(shown: np.ndarray) -> float:
        said = answers(model, tokenizer, [r[1] for r in chosen], shown)
        return float(np.mean([score("", a, r[2]) for a, r in zip(said, chosen, strict=True)]))

    seen, backwards = right(clips), right(clips[:, ::-1].copy())
    one, grey = right(np.repeat(clips[:, 4:5], 8, axis=1)), right(np.full_like(clips, 200))
    assert seen >= max(backwards, one, grey) + 0.2
