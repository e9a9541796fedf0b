from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from keeplora.errors import KeepLoraError
from keeplora.files import sha256_file
from keeplora.models import stand_in

ROOT = Path(__file__).resolve().parents[2]
PACKS = Path(stand_in.__file__).parents[1] / "suites/vqa"
FILES = stand_in.PICTURES.files
TASKS = ("counting", "numbers", "signs", "textures", "relations", "captions")
COLUMNS = ["split", "id", "image", "conversations", "kind", "origin", "licence", "items"]


def rows(name: str) -> list[dict]:
    return pq.read_table(PACKS / f"{name}.parquet").to_pylist()


def opened(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("name", [*TASKS, "general"])
def test_every_row_of_a_pack_is_a_picture_and_a_conversation(name):
    found = rows(name)
    assert pq.read_schema(PACKS / f"{name}.parquet").names == COLUMNS
    assert len({row["id"] for row in found}) == len(found)
    for row in found:
        assert opened(row["image"]).size == (112, 112)
        assert row["kind"]
        assert row["origin"]
        assert row["licence"]
        assert row["items"]
        turns = json.loads(row["conversations"])
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns
        assert turns[0]["value"].startswith("<image>\n")
        assert sum("<image>" in t["value"] for t in turns) == 1
        for answer in (t["value"] for t in turns[1::2]):
            assert answer == answer.strip().lower()
            assert 0 < len(answer.split()) <= 16
        assert row["split"] == "train" or len(turns) == 2, "a test sample has one question"


@pytest.mark.parametrize("name", TASKS)
def test_no_item_and_no_picture_of_a_task_is_on_both_sides(name):
    sides = {side: [row for row in rows(name) if row["split"] == side] for side in ("train", "test")}
    assert 430 <= len(sides["train"]) <= 460
    assert 140 <= len(sides["test"]) <= 160
    items = {side: {i for row in found for i in row["items"].split("; ")} for side, found in sides.items()}
    assert not items["train"] & items["test"]
    pictures = {s: {opened(row["image"]).tobytes() for row in found} for s, found in sides.items()}
    assert not pictures["train"] & pictures["test"]


def test_the_tasks_use_no_item_that_the_general_mixture_teaches(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from stand_in_pictures import pool

    checked = 0
    for name in TASKS:
        for row in rows(name):
            for item in row["items"].split("; "):
                if item.startswith(
                    ("emoji ", "clip art ", "scan ")
                ):  # signs and textiles of the tasks are in no mixture
                    assert pool(item) == f"task-{row['split']}"
                    checked += 1
    assert checked > 2000
    for row in rows("general"):
        if row["kind"] in ("object", "digit") and not row["items"].startswith("scene "):
            assert pool(row["items"].split("/")[0]) == "test"
    sys.modules.pop("stand_in_pictures")


def test_in_teaching_a_question_sees_the_picture_and_itself_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import stand_in_teach as teach
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(FILES)
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 8
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.set_attn_implementation("eager")
    tokenizer = AutoTokenizer.from_pretrained(FILES)
    turns = [("colour", "What colour is it?", "red"), ("shape", "What shape is it?", "ring")]
    monkeypatch.setattr(teach, "CONVERSATIONS", 0.0)
    monkeypatch.setattr(teach, "BATCH", 2)
    batches = teach.Batches([teach.Sample(str(i), "", np.zeros(0), turns) for i in range(2)], tokenizer)
    batch = batches.batch(*batches.epoch(0)[0], teach.Random(0))
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    image = torch.randn(2, 64, 3 * config.vision_config.hidden_size)
    with torch.inference_mode():
        teach.loss_of(model, batch, image)
        first_answer = (batch.labels[0] != -100).nonzero()[:2, 0]  # "red" or "ring", and </s>
        batch.ids[0, first_answer[0]] = 5  # another word in the first turn's answer
        teach.loss_of(model, batch, image)
        teach.loss_of(model, batch, image + 1)
    changed = (seen[0] - seen[1]).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [False, True, *[False] * (len(changed) - 2)]  # </s> alone comes after it in its turn
    assert ((seen[1] - seen[2]).abs().amax(dim=1) > 1e-6).all()


def test_no_one_answer_solves_a_task():
    for name in TASKS:
        answers = [json.loads(row["conversations"])[1]["value"] for row in rows(name) if row["split"] == "test"]
        assert max(answers.count(a) for a in set(answers)) <= 0.4 * len(answers), name


def test_the_packs_and_files_are_small_and_recorded():
    provenance = json.loads((PACKS / "provenance.json").read_text())
    assert set(provenance["sets"]) == {*TASKS, "general"} == {p.stem for p in PACKS.glob("*.parquet")}
    for name, record in provenance["sets"].items():
        assert sha256_file(PACKS / f"{name}.parquet") == record["sha256"], name
    attribution = (PACKS / "ATTRIBUTION.md").read_text()
    assert all(source["package"] in attribution for source in provenance["sources"])
    assert sum(p.stat().st_size for p in PACKS.iterdir()) <= 10_000_000
    assert sum(p.stat().st_size for p in FILES.iterdir()) <= 20_000_000
    assert stand_in.stand_in_record()["weights_sha256"] == sha256_file(FILES / stand_in.PICTURES.weights)


def test_the_recorded_figures_are_far_above_guessing_and_above_not_looking():
    figures = stand_in.stand_in_record()["held_out"]
    assert len(figures) == 11
    assert figures["mean"]["score"] >= max(figures["mean"]["blind"], figures["mean"]["prior"]) + 0.25
    weak = {kind for kind, row in figures.items() if row["score"] < max(row["blind"], row["prior"]) + 0.08}
    assert weak == {"yes-no"}  # a known weakness: these are answered at chance


def test_without_the_tower_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KEEPLORA_CACHE", str(tmp_path))
    with pytest.raises(KeepLoraError, match=r"vision tower.*`keeplora assets fetch`"):
        stand_in.stand_in_path()
    assert not list(tmp_path.glob("stand-in-*"))


def test_an_incomplete_installation_is_named(tmp_path, monkeypatch):
    shutil.copytree(FILES, tmp_path / "files")
    (tmp_path / "files/tokenizer.json").unlink()
    broken = stand_in.StandIn(tmp_path / "files", stand_in.PICTURES.weights)
    monkeypatch.setitem(stand_in.STAND_INS, "stand-in", broken)
    with pytest.raises(KeepLoraError, match=r"tokenizer\.json is missing"):
        stand_in.stand_in_path()


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = stand_in.stand_in_path()
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.towers
def test_the_folder_is_put_together_once_and_whole():
    folder = stand_in.stand_in_path()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert stand_in.stand_in_path() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert {*stand_in.FOLDER_FILES, "model.safetensors"} <= {p.name for p in folder.iterdir()}


@pytest.mark.towers
def test_its_tower_gives_what_the_embedded_tower_gives(loaded):
    from keeplora.models.assets import embedded_path
    from keeplora.models.embedded import EmbeddedDualEncoder

    original = EmbeddedDualEncoder.from_pretrained(embedded_path()).eval()
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = loaded[0].model.vision_tower(pixels).last_hidden_state
        theirs = original.vision_model(pixels).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.towers
def test_stock_classes_load_it_and_it_answers_by_looking(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    processor.tokenizer.padding_side = "left"
    chosen = [row for row in rows("general") if row["kind"] == "digit"]
    wanted = [json.loads(row["conversations"])[1]["value"] for row in chosen]

    def right(pictures: list[Image.Image]) -> float:
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.removeprefix("<image>\n")}]}]
            for q in (json.loads(row["conversations"])[0]["value"] for row in chosen)
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        assert ((inputs["input_ids"] == model.config.image_token_id).sum(dim=1) == 64).all()
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=6)
        said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return float(np.mean([a.strip() == b for a, b in zip(said, wanted, strict=True)]))

    seen, blind = (
        right([opened(row["image"]) for row in chosen]),
        right([Image.new("RGB", (112, 112), "grey")] * len(chosen)),
    )
    assert seen >= 0.8
    assert blind <= 0.35
