"""Model folders from anywhere: code that comes with them, pickled weights, settings that ask for what is elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.cli.tiny_world import World
from tests.torture.fuzz_damage import BYTES, change_tensors, cut, instead, json_mutation, pickle_canary, raw_header
from tests.torture.fuzz_harness import Arena, Expect, Input, Maker

AUTO = (
    "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor",
    "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor",
)  # fmt: skip


def code_canary(canary: Path) -> str:
    """A module that makes the canary when it is imported."""
    return (
        f"open({str(canary)!r}, 'w').write('imported')\n"
        "from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPImageProcessor, CLIPProcessor\n"
        "class C(CLIPConfig): model_type = 'clip'\nclass M(CLIPModel): config_class = C\n"
        "class T(CLIPTokenizer): pass\nclass I(CLIPImageProcessor): pass\nclass P(CLIPProcessor): pass\n"
    )


def plant_code(folder: Path, canary: Path, *, model_type: str | None = None) -> None:
    """Put modules that would make the canary into a model's folder, and name them wherever transformers looks for code."""
    for name in (
        "modeling_x.py",
        "configuration_x.py",
        "tokenization_x.py",
        "processing_x.py",
        "__init__.py",
        "conftest.py",
    ):
        (folder / name).write_text(code_canary(canary), encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code_canary(canary), encoding="utf-8")
    classes = {auto: f"modeling_x.{'C' if auto == 'AutoConfig' else 'M'}" for auto in AUTO}
    classes |= {"AutoTokenizer": ["tokenization_x.T", "tokenization_x.T"], "AutoProcessor": "processing_x.P",
                "AutoImageProcessor": "processing_x.I"}  # fmt: skip
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / file
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        value["auto_map"] = classes
        if file == "config.json" and model_type is not None:
            value["model_type"] = model_type
        if path.is_file() or file == "processor_config.json":
            path.write_text(json.dumps(value), encoding="utf-8")


class ModelInputs:
    """Mutators of a saved dual encoder; read by the plan of a run."""

    def __init__(self, world: World) -> None:
        self.world = world

    def makers(self) -> dict[str, Maker]:
        found: dict[str, Maker] = {}
        for name in dir(self):
            if name.startswith("make_"):
                found[name.removeprefix("make_").replace("_", " ")] = getattr(self, name)
        return found

    def _copy(self, arena: Arena) -> Path:
        return Path(shutil.copytree(self.world.model, arena.fresh() / "model"))

    def _input(self, folder: Path, mutator: str, expect: Expect = "either") -> Input:
        file = self.world.yaml(folder.parent / "e.yaml", model=str(folder))
        return Input(mutator, ("run", str(file), "--dry-run"), expect)

    def _change(self, folder: Path, file: str, **values: Any) -> None:
        path = folder / file
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**old, **values}), encoding="utf-8")

    def make_code(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        kind = rng.choice([None, "x", "clip", "llava", "new-model"])
        plant_code(folder, arena.canary, model_type=kind)
        return self._input(folder, "code in the folder", "refused" if kind in ("x", "new-model", "llava") else "either")

    def make_code_of_the_tokenizer(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        (folder / "t.py").write_text(code_canary(arena.canary), encoding="utf-8")
        self._change(
            folder, "tokenizer_config.json", tokenizer_class=rng.choice(["T", "t.T", "PreTrainedTokenizerFast", None,
            "CLIPTokenizer"]),
            auto_map={"AutoTokenizer": ["t.T", "t.T"]},
        )  # fmt: skip
        return self._input(folder, "code of the tokenizer")

    def make_code_of_the_processor(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        (folder / "p.py").write_text(code_canary(arena.canary), encoding="utf-8")
        self._change(
            folder, "preprocessor_config.json", image_processor_type=rng.choice(["I", "p.I", "CLIPImageProcessor", None]),
            processor_class=rng.choice(["P", "p.P", None]), auto_map={"AutoImageProcessor": "p.I", "AutoProcessor": "p.P"},
        )  # fmt: skip
        return self._input(folder, "code of the processor")

    def make_code_elsewhere(self, arena: Arena, rng: random.Random) -> Input:
        """auto_map and kernels that name another repository or a path outside."""
        folder = self._copy(arena)
        (arena.outside / "evil.py").write_text(code_canary(arena.canary), encoding="utf-8")
        try:
            there = rng.choice(["someone/repo--modeling_x.M", "../../outside/evil.M", f"{arena.outside}/evil.M", "..evil.M",
                "os.system"])  # fmt: skip
            self._change(folder, "config.json", auto_map=dict.fromkeys(AUTO, there), **rng.choice([
                {"model_type": "x"}, {"attn_implementation": "someone/kernel"}, {"_attn_implementation": "someone/kernel:f"},
                {"quantization_config": {"quant_method": "x"}}, {"quantization_config": {"quant_method": "bitsandbytes",
                "load_in_4bit": 1}},
                {"torch_dtype": "os.system"}, {"dtype": "system"}, {"transformers_weights": "pytorch_model.bin"},
                {"transformers_weights": "../../outside/victim.txt"}, {"base_model_pp_plan": {"x": 1}},
                {"architectures": ["os.system"]},
                {"_name_or_path": "../../outside"}, {"adapter_config": {"x": 1}}, {"custom_pipelines": {"a": {"impl": "evil.M"}}},
            ]))  # fmt: skip
            return self._input(folder, "code and kernels elsewhere")
        finally:
            (folder / "pytorch_model.bin").write_bytes(pickle_canary(arena.canary))

    def make_pickled_weights(self, arena: Arena, rng: random.Random) -> Input:
        import torch

        folder = self._copy(arena)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        name = rng.choice(["pytorch_model.bin", "model.bin", "pytorch_model.pt", "pytorch_model-00001-of-00001.bin"])
        if rng.random() < 0.5:
            torch.save(weights, folder / name)
        else:
            (folder / name).write_bytes(pickle_canary(arena.canary))
        if name.endswith("1.bin"):
            index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        return self._input(folder, "pickled weights", "refused")

    def make_pickle_beside(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tf_model.h5",
            "model.pkl"):  # fmt: skip
            (folder / name).write_bytes(pickle_canary(arena.canary))
        return self._input(folder, "a pickle beside the weights", "accepted")

    def make_index(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        weights = load_file(folder / "model.safetensors")
        name = rng.choice(["../../../outside/victim.txt", "/etc/passwd", "model.safetensors", "pytorch_model.bin", "a\0b",
            "nowhere.safetensors"])  # fmt: skip
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "pytorch_model.bin").write_bytes(pickle_canary(arena.canary))
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return self._input(folder, "index that leads out", "refused")

    def make_adapter_folder(self, arena: Arena, rng: random.Random) -> Input:
        """An adapter among the weights: transformers would load the base that it names."""
        folder = self._copy(arena)
        config = {"peft_type": rng.choice(["LORA", "X"]), "base_model_name_or_path": rng.choice(["someone/model",
            "../../outside", str(folder)]),
                  "r": 4, "target_modules": ["q_proj"], "auto_mapping": {"parent_library": "evil",
                  "base_model_class": "M"}}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "adapter_model.bin").write_bytes(pickle_canary(arena.canary))
        if rng.random() < 0.5:
            (folder / "config.json").unlink()
        return self._input(folder, "adapter in a model's place", "refused")

    def make_json(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        path = rng.choice(sorted(folder.glob("*.json")))
        _, text = json_mutation(json.loads(path.read_text(encoding="utf-8")), rng)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return self._input(folder, f"{path.name} changed")

    def make_bytes(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        path = rng.choice(sorted(p for p in folder.iterdir() if p.suffix != ".safetensors" and p.stat().st_size))
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng))
        return self._input(folder, f"bytes of {path.name}")

    def make_weights(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        path = folder / "model.safetensors"
        kind = rng.randrange(3)
        if kind == 0:
            raw_header(path, rng)
        elif kind == 1:
            path.write_bytes(cut(path.read_bytes(), rng))
        else:
            change_tensors(
                path, lambda tensors: tensors.__delitem__(rng.choice([k for k in sorted(tensors) if "weight" in k]))
            )
        return self._input(folder, "weights damaged", "either" if kind == 0 else "refused")

    def make_something_else(self, arena: Arena, rng: random.Random) -> Input:
        folder = self._copy(arena)
        path = rng.choice([folder / "config.json", folder / "model.safetensors", folder / "tokenizer.json",
            folder / "preprocessor_config.json"])  # fmt: skip
        if not path.is_file():
            path = folder / "config.json"
        instead(path, arena, rng)
        return self._input(folder, f"something else for {path.name}")
