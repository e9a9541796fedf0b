"""`keeplora predict` and `keeplora export` as a person calls them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from keeplora.experiment import TrainedModel


@pytest.fixture
def picture(world):
    return world.root / "paint" / "test" / "red" / "0.png"


def answers(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_among_words_of_the_caller(world, cli, picture):
    path, _ = world.run()
    answer = cli("predict", path, "--image", picture, "--classes", "cat, small dog ,red", "--json")
    assert answer.code == 0, answer.err
    (told,) = answers(answer.out)
    assert told["image"] == str(picture)
    model = TrainedModel(path, device="cpu")
    expected = model.predict(Image.open(picture).convert("RGB"), classes=["cat", "small dog", "red"])
    assert [(p["class"], p["task"]) for p in told["predictions"]] == [(p.label, None) for p in expected]
    assert [p["probability"] for p in told["predictions"]] == pytest.approx([p.probability for p in expected], abs=1e-5)


def test_predict_among_the_classes_of_a_task(world, cli, picture):
    answer = cli("predict", world.run(method="keeplora++-cls")[0], "--image", picture, "--task", "paint", "--json")
    (told,) = answers(answer.out)
    assert {p["class"] for p in told["predictions"]} == {"red", "green", "blue"}
    assert {p["task"] for p in told["predictions"]} == {"paint"}
    assert told["predictions"][0]["class"] == "red"


def test_predict_among_everything_learned(world, cli, picture):
    path, _ = world.run()
    (told,) = answers(cli("predict", path, "--image", picture, "--json", "--top", "7").out)
    assert {p["task"] for p in told["predictions"]} == {"paint", "stripes", "dots"}
    assert len(told["predictions"]) == 7
    assert sum(p["probability"] for p in told["predictions"]) == pytest.approx(1, abs=1e-5)
    (short,) = answers(cli("predict", path, "--image", picture, "--json").out)
    assert short["predictions"] == told["predictions"][:5]


def test_predict_prints_a_table_per_picture(world, cli, picture):
    other = picture.with_name("1.png")
    answer = cli("predict", world.run()[0], "--image", picture, "--image", other, "--task", "paint")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    assert len(re.findall(r"\d+\.\d %", answer.out)) == 6
    flat = answer.out.replace("\n", "")
    assert flat.index("0.png") < flat.index("1.png")


def test_template_of_the_caller(world, cli, picture):
    path, _ = world.run()
    plain, other = (
        answers(cli("predict", path, "--image", picture, "--task", "paint", "--json", *extra).out)
        for extra in ((), ("--template", "art of the {}."))
    )
    assert plain != other


def test_corrupt_picture_is_named_before_anything_is_loaded(world, cli, picture, tmp_path):
    path, _ = world.run()
    (tmp_path / "torn.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (("torn.png", "damaged or cut short"), ("text.png", "not a picture that can be read")):
        answer = cli("predict", path, "--image", picture, "--image", tmp_path / name)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.startswith(f"Error: {tmp_path / name}: {words}")
        assert answer.err.count("\n") == 1
    answer = cli("predict", path, "--image", tmp_path / "none.png")
    assert answer.err == f"Error: {tmp_path / 'none.png'}: does not exist; mend the path or leave it out\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--task", "pant"), r"no learned task is named 'pant'; did you mean 'paint'\? "),
        (("--task", "paint", "--classes", "a,b"), r"give --classes or --task, not both"),
        (("--classes", "a,a"), r"must be different names"),
        (("--classes", " , "), r"at least one"),
        (("--template", "a photo"), r"has no place '\{\}' for the class name|neither a template with a place"),
    ],
)
def test_wrong_candidates_are_one_sentence(world, cli, picture, words, sentence):
    answer = cli("predict", world.run()[0], "--image", picture, *words)
    assert (answer.code, answer.out) == (1, "")
    assert re.search(sentence, answer.err)
    assert answer.err.startswith("Error: ")
    assert answer.err.count("\n") == 1


def test_export_peft_opens_in_stock_peft(world, cli, picture, tmp_path):
    from peft import PeftModel
    from transformers import CLIPModel

    path, _ = world.run()
    answer = cli("export", path, "--format", "peft", "--output", tmp_path / "adapter")
    assert (answer.code, answer.out) == (0, f"{tmp_path / 'adapter'}\n")
    model = TrainedModel(path, device="cpu").family
    pixels = model.preprocess(Image.open(picture).convert("RGB"))[None]
    text = model.tokenize(["a photo of a red.", "a photo of a many."])
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(world.model).eval(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        ours = model.model(**text, pixel_values=pixels).logits_per_image
        theirs = adapted(**text, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_export_merged_goes_beside_the_run_by_default(world, cli, picture, tmp_path):
    from transformers import pipeline

    path = world.copied(world.run()[0], tmp_path / "run")
    answer = cli("export", path, "--format", "merged")
    assert (answer.code, answer.out) == (0, f"{path / 'export-merged'}\n")
    classify = pipeline("zero-shot-image-classification", model=str(path / "export-merged"), device="cpu")
    shown = classify(
        Image.open(picture).convert("RGB"), candidate_labels=["red", "cat"], hypothesis_template="a photo of a {}."
    )
    (told,) = answers(cli("predict", path, "--image", picture, "--classes", "red,cat", "--json").out)
    assert {s["label"]: s["score"] for s in shown} == pytest.approx(
        {p["class"]: p["probability"] for p in told["predictions"]}, abs=1e-5
    )
    again = cli("export", path, "--format", "merged")
    assert again.code == 1
    assert again.err == f"Error: {path / 'export-merged'} exists already; choose a new folder\n"


@pytest.mark.parametrize("method", ["zero-shot", "full-ft"])
def test_export_peft_of_a_method_without_factors_is_refused(world, cli, tmp_path, method):
    answer = cli("export", world.run(method=method)[0], "--format", "peft", "--output", tmp_path / "out")
    assert (answer.code, answer.out) == (1, "")
    assert f"(method {method}) holds no low-rank factors; export it with --format merged" in answer.err
    assert not (tmp_path / "out").exists()


def test_export_of_an_unknown_format_is_refused(world, cli, tmp_path):
    answer = cli("export", world.run()[0], "--format", "pefd", "--output", tmp_path / "out")
    assert answer.code == 1
    assert answer.err == "Error: --format: unknown format 'pefd'; did you mean 'peft'? (one of: merged, peft)\n"
