"""What a generative run exports opens in stock transformers and PEFT, and gives the same answers there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from keeplora.experiment import Experiment, TrainedModel
from tests.experiment.generation_world import make_world


def trained(root: Path, kind: str = "llava", **changes: Any) -> TrainedModel:
    config = copy.deepcopy(make_world(root, kind)) | {"probes": [], "output": str(root / "run")}
    config["model"] = {"name": config["model"]}
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config[key], dict) else value
    Experiment(config, quiet=True).run()
    return TrainedModel(root / "run", device="cpu")


@pytest.fixture(scope="module", params=["llava", "qwen2-5-vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return trained(tmp_path_factory.mktemp(request.param), request.param)


def prompts(model: TrainedModel) -> dict[str, Tensor]:
    """Four questions with their pictures, as one batch padded on the left."""
    from keeplora.experiment.setup import load_tasks

    tasks, _ = load_tasks(model.config)
    family, found = model.family, []
    for task in tasks:
        for i in (0, 1):
            turns = task.test.conversation(i).prompt_turns
            found.append(family.encode(turns, task.test.pictures(i), answers=False))
    return {k: v for k, v in family.join(found, side="left").items() if k not in ("labels", "token_kinds")}


@torch.no_grad()
def stock_answers(stock: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits of the last position, generated tokens) by transformers alone."""
    logits = stock(**inputs).logits[:, -1]
    return logits, stock.generate(**inputs, max_new_tokens=6, do_sample=False)  # type: ignore[operator]


def base_of(model: TrainedModel) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(model.config.model.name).eval()


def test_the_adapter_of_all_tasks_opens_in_stock_peft(model: TrainedModel, tmp_path: Path) -> None:
    from peft import PeftModel

    inputs = prompts(model)
    wanted = stock_answers(model.family.model, inputs)
    folder = model.export(tmp_path / "adapter", "peft")
    untouched = stock_answers(base_of(model), inputs)
    assert not torch.allclose(wanted[0], untouched[0], atol=1e-3)
    found = stock_answers(PeftModel.from_pretrained(base_of(model), str(folder)).eval(), inputs)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1], wanted[1])


def test_the_merged_checkpoint_opens_in_stock_transformers(model: TrainedModel, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    inputs = prompts(model)
    wanted = stock_answers(model.family.model, inputs)
    folder = model.export(tmp_path / "merged", "merged")
    found = stock_answers(AutoModelForImageTextToText.from_pretrained(folder).eval(), inputs)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], wanted[1])
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == model.family.tokenizer.get_vocab()
    assert (folder / "chat_template.jinja").is_file()


def test_one_adapter_per_task_adds_up_to_the_run(model: TrainedModel, tmp_path: Path) -> None:
    from peft import PeftModel

    inputs = prompts(model)
    wanted = stock_answers(model.family.model, inputs)
    model.learner.save_pretrained(tmp_path / "saved")
    folders = sorted((tmp_path / "saved" / "adapters").iterdir())
    assert len(folders) == 2
    adapted = PeftModel.from_pretrained(base_of(model), str(folders[0]), adapter_name="first")
    adapted.load_adapter(str(folders[1]), adapter_name="second")
    adapted.base_model.set_adapter(["first", "second"])
    found = stock_answers(adapted.eval(), inputs)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1], wanted[1])


def test_a_server_that_reads_only_rank_and_alpha_serves_the_same(model: TrainedModel, tmp_path: Path) -> None:
    """vLLM and its kin read r, lora_alpha and the tensors; some ignore alpha_pattern, others refuse unknown keys of init."""
    inputs = prompts(model)
    wanted = stock_answers(model.family.model, inputs)
    folder = model.export(tmp_path / "adapter", "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert set(config["alpha_pattern"].items()) == set(config["rank_pattern"].items())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert max(v.shape[0] for k, v in tensors.items() if "lora_A" in k) == config["r"]  # what max_lora_rank must allow
    served = base_of(model)
    with torch.no_grad():
        for key, A in tensors.items():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B = tensors[key.replace("lora_A", "lora_B")]
                served.get_submodule(name).weight += config["lora_alpha"] / config["r"] * B @ A
    found = stock_answers(served, inputs)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1], wanted[1])


def test_a_free_projector_goes_with_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained(tmp_path / "world", tuner={"parts": {"projector": "free"}})
    inputs = prompts(model)
    wanted = stock_answers(model.family.model, inputs)
    folder = model.export(tmp_path / "adapter", "peft")
    found = stock_answers(PeftModel.from_pretrained(base_of(model), str(folder)).eval(), inputs)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_run_is_exported_to_the_unquantised_base(tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText

    model = trained(tmp_path / "world", model={"quantize": bits})
    results = json.loads((model.path / "results.json").read_text())
    assert all(len(row) == 2 for row in results["accuracy"])
    folder = model.export(tmp_path / "merged", "merged")
    merged = AutoModelForImageTextToText.from_pretrained(folder).eval()
    base = base_of(model)
    for target in model.learner.targets:
        delta = sum(
            record.factors[target.name].delta for record in model.learner.records if target.name in record.factors
        )
        found = merged.get_submodule(target.name).weight - base.get_submodule(target.name).weight
        torch.testing.assert_close(found, torch.as_tensor(delta), atol=1e-5, rtol=1e-4)


def test_a_mixture_of_experts_is_not_exported(tmp_path: Path) -> None:
    from keeplora.errors import KeepLoraError

    model = trained(tmp_path / "world", method="moelora")
    for format in ("peft", "merged"):
        with pytest.raises(KeepLoraError, match="moelora"):
            model.export(tmp_path / format, format)
    assert model.answer([], "What colour is it?", max_new_tokens=3) is not None
