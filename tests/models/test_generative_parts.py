"""Where language model, vision tower and projector are, and which linears of them are targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from keeplora.errors import TargetError
from tests.models.test_generative import CASES, turns
from tests.models.tiny_generative import BLOCKS, VISION_BLOCKS, clip

TOWERS = {
    "llava": ("model.language_model", "model.vision_tower", "model.multi_modal_projector"),
    "qwen2-5-vl": ("model.language_model", "model.visual", "model.visual.merger"),
    "idefics3": ("model.text_model", "model.vision_model", "model.connector"),
    "video-llava": ("model.language_model", "model.image_tower", "model.video_tower", "model.multi_modal_projector"),
    "qwen3-vl": (
        "model.language_model", "model.visual", "model.visual.merger", "model.visual.deepstack_merger_list",
    ),
}  # fmt: skip
TOWERS["smolvlm"] = TOWERS["idefics3"]
NAMES = {
    "video-llava": ["language", "vision", "vision-2", "projector"],
    "qwen3-vl": ["language", "vision", "projector", "projector-2"],
}
PROJECTORS = {"qwen2-5-vl": 2, "qwen3-vl": 4, "idefics3": 1, "smolvlm": 1, "gemma3": 0}  # Gemma's is a bare parameter


def test_parts_and_targets(kind, generative):
    family = generative(kind)
    assert tuple(family.towers.values()) == TOWERS.get(kind, TOWERS["llava"])
    assert list(family.towers) == NAMES.get(kind, ["language", "vision", "projector"])
    language = family.target_modules()
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    prefix = family.towers["language"]
    assert sorted(language) == sorted(f"{prefix}.layers.{i}.{name}" for i in range(BLOCKS) for name in names)
    by_name = dict(family.model.named_modules())
    widths = {n.rsplit(".", 1)[-1]: by_name[n].out_features for n in language}
    assert widths["k_proj"] == widths["v_proj"] == widths["q_proj"] // 2
    projector = family.target_modules(("projector",))
    assert len(projector) == PROJECTORS.get(kind, 2)
    assert family.default_target_modules == language + projector
    vision = family.target_modules(("vision",))
    towers = sum(part.startswith("vision") for part in family.towers)
    assert len(vision) == towers * VISION_BLOCKS * {"qwen2-5-vl": 5, "qwen3-vl": 4}.get(kind, 6)
    for part, prefix in family.towers.items():
        if part.startswith("vision"):
            assert [name for name in vision if name.startswith(f"{prefix}.")]
    everything = family.target_modules(("projector", "vision", "language"))
    assert len(set(everything)) == len(language) + len(vision) + len(projector)
    assert all(type(by_name[name]) is nn.Linear for name in everything)
    with pytest.raises(TargetError, match="no part 'visoin'; did you mean 'vision'"):
        family.target_modules(("visoin",))


# Classes that are not among the tiny ones, as their configs make them: where the projector is, and how many linears it has.
OTHERS = {
    "qwen3_vl": (["model.visual.merger", "model.visual.deepstack_merger_list"], 8),
    "qwen2_5_omni_thinker": (["model.visual.merger"], 2),  # beside a tower for sound
    "video_llava": (["model.multi_modal_projector"], 2),  # beside two towers
    "granite_docling": (["model.vision_model.connector"], 15),
    "minicpmv4_6": (["model.merger"], 2),
    "idefics2": (["model.connector"], 24),
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_parts_of_other_classes(model_type):
    from transformers import AutoConfig

    from keeplora.models.parts import find_targets, find_towers

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type))
    towers = find_towers(model)
    targets = find_targets(model, towers)
    assert ([prefix for part, prefix in towers.items() if part.startswith("projector")], len(targets["projector"])) == (
        OTHERS[model_type]
    )
    assert ("vision-2" in towers) == (model_type == "video_llava")
    assert all(name.startswith(towers["language"] + ".") for name in targets["language"])


def test_every_target_acts_on_the_answer(kind, fresh):
    # LLaVA reads the last block but one of its tower: the last takes part in the forward pass, and never in the answer.
    family = fresh(kind)
    targets = family.target_modules(("language", "vision", "projector"))
    family.token_losses(family.encode(*CASES["two"])).sum().backward()
    if family.reads_videos:  # Video-LLaVA has a tower of its own for them
        family.token_losses(family.encode(turns("<video>what is it", "a cat"), (), [clip(4)])).sum().backward()
    still = [n for n in targets if (g := family.model.get_submodule(n).weight.grad) is None or not bool(g.any())]
    assert still == []


def test_linears_inside_a_multihead_attention_are_no_targets(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from keeplora.models.parts import _linears

    config = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    found = _linears(SiglipVisionModel(config))
    assert "head.mlp.fc1" in found
    assert not any("head.attention" in name for name in found)


def test_towers_that_are_not_there_are_told(generative_folder):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from keeplora.models.parts import find_targets, find_towers

    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(TargetError, match="was made from its vision_config"):
        find_towers(model, "a decoder")
    whole = AutoModelForImageTextToText.from_pretrained(generative_folder("llava"))
    towers = find_towers(whole)
    whole.model.language_model.layers = nn.ModuleList(list(whole.model.language_model.layers)[:1])
    with pytest.raises(
        TargetError, match=r"no list of 2 blocks is in its language tower \(LlamaModel at model\.language"
    ):
        find_targets(whole, towers)
