"""Which modules are adapted, and where they sit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from keeplora.errors import TargetError
from keeplora.models import load_model
from keeplora.tuner.targets import rank_too_large, resolve_targets
from tests.models import tiny
from tests.tuner.blocks import WIDTH, Block, Net, config, make_net, make_towers


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def encoder(request, tmp_path_factory):
    return load_model(tiny.make_tiny(request.param, tmp_path_factory.mktemp("targets") / request.param))


def test_towers_depths_and_blocks_of_every_family(encoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        targets = resolve_targets(encoder.model, config(target_modules=encoder.default_target_modules, gamma=0.2))
    towers = {t.tower for t in targets}
    vision, text = encoder.towers["vision"], encoder.towers["text"]
    assert towers == {vision, text}
    for tower, blocks in ((vision, tiny.VISION_BLOCKS), (text, tiny.TEXT_BLOCKS)):
        inside = [t for t in targets if t.tower == tower]
        assert {t.blocks for t in inside} == {blocks}
        assert sorted({t.depth for t in inside}) == list(range(blocks))
        for depth in range(blocks):
            block = [t for t in inside if t.depth == depth]
            assert len(block) == 4  # q, k, v, o
            assert {round(t.scale, 9) for t in block} == {round(0.2 + 0.8 * depth / (blocks - 1), 9)}
        assert all(f".{t.depth}." in t.name for t in inside)


def names(model, **kwargs):
    return [t.name for t in resolve_targets(model, config(**kwargs))]


def test_suffix_full_name_and_regular_expression():
    net = make_net()
    assert names(net, target_modules=["q"]) == ["encoder.layers.0.q", "encoder.layers.1.q"]
    assert names(net, target_modules=["layers.1.q"]) == ["encoder.layers.1.q"]
    assert names(net, target_modules=["encoder.layers.0.down"]) == ["encoder.layers.0.down"]
    assert names(net, target_modules=r".*layers\.1\.(q|up)") == ["encoder.layers.1.q", "encoder.layers.1.up"]
    with pytest.raises(TargetError, match="regular expression"):  # a string is the whole name, not a suffix
        names(net, target_modules="q")


def test_exclude():
    net = make_net()
    assert names(net, target_modules=["q", "k"], exclude_modules=["layers.0.q", "layers.1.k"]) == [
        "encoder.layers.0.k", "encoder.layers.1.q",
    ]  # fmt: skip
    assert names(net, target_modules=["q"], exclude_modules=r".*\.0\..*") == ["encoder.layers.1.q"]
    with pytest.raises(TargetError, match="leaves no linear"):
        names(net, target_modules=["q"], exclude_modules=["q"])


def test_module_outside_the_blocks_has_no_depth_and_scale_one():
    (target,) = resolve_targets(make_net(), config(target_modules=["head"], gamma=0.1))
    assert (target.depth, target.blocks, target.scale) == (None, 1, 1.0)


def test_one_block_is_not_scaled():
    assert {t.scale for t in resolve_targets(make_net(blocks=1), config(gamma=0.1))} == {1.0}


def test_nothing_matches():
    with pytest.raises(TargetError, match=r"no module is named 'dwn'; did you mean 'down'\?"):
        names(make_net(), target_modules=["q", "dwn"])
    with pytest.raises(TargetError, match="target_modules is not set"):
        names(make_net(), target_modules=None)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.blocks = nn.ModuleList([Block(WIDTH)])
        self.blocks[0].out_proj = nn.Linear(WIDTH, WIDTH)
        self.conv, self.table = nn.Conv2d(3, 4, 2), nn.Embedding(5, 4)


def test_attention_member_is_refused_by_full_name_and_left_out_by_suffix():
    model = Odd()
    with pytest.raises(TargetError, match=r"attention\.out_proj is part of the nn\.MultiheadAttention 'attention'"):
        names(model, target_modules=["attention.out_proj"])
    for patterns in (["out_proj"], r".*out_proj"):
        with pytest.warns(UserWarning, match=r"attention\.out_proj is part of .* left out"):
            assert names(model, target_modules=patterns) == ["blocks.0.out_proj"]
    with pytest.raises(TargetError, match=r"^attention is an nn\.MultiheadAttention"):
        names(model, target_modules=["attention"])


@pytest.mark.parametrize(("name", "kind"), [("conv", "Conv2d"), ("table", "Embedding"), ("norm", "LayerNorm")])
def test_module_that_is_no_linear_is_refused_by_name(name, kind):
    with pytest.raises(TargetError, match=rf"{name} is a {kind}, not an nn\.Linear.*exclude_modules"):
        names(Odd(), target_modules=["q", name])


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a subclass of nn.Linear."""


class Int8(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("module", [Linear4bit(4, 4), Int8()], ids=["Linear4bit", "int8"])
def test_quantised_linear_is_refused_by_name(module):
    model = make_net()
    model.encoder.layers[1].q = module
    with pytest.raises(
        TargetError, match=rf"encoder\.layers\.1\.q is a {type(module).__name__} whose weight is quantised"
    ):
        names(model, target_modules=["q"])


def test_shared_weight_is_refused():
    model = make_net()
    model.encoder.layers[1].q.weight = model.encoder.layers[0].q.weight
    with pytest.raises(TargetError, match=r"encoder\.layers\.1\.q shares its weight with encoder\.layers\.0\.q"):
        names(model, target_modules=["q"])
    assert names(model, target_modules=["q"], exclude_modules=["layers.1.q"]) == ["encoder.layers.0.q"]


def test_per_tower_settings_reach_the_targets():
    targets = resolve_targets(
        make_towers(), config(r={"vision": 5, "text": 2}, gamma={"vision": 0.4, "text": 1.0}, lora_alpha=10,
                              schedule={"vision": [0.1, 0.2, 0.3], "default": "linear"}),
    )  # fmt: skip
    vision, text = ([t for t in targets if t.tower == tower] for tower in ("vision_model", "text_model"))
    assert {t.r for t in vision} == {5}
    assert {t.r for t in text} == {2}
    assert {t.scale for t in text} == {1.0}
    assert [t.scale for t in vision if t.name.endswith(".q")] == [0.1, 0.2, 0.3]
    assert [t.s for t in vision if t.name.endswith(".q")] == pytest.approx([0.2, 0.4, 0.6])
    with pytest.raises(ValueError, match="lists 2 scales but the tower has 3 blocks"):
        resolve_targets(make_towers(), config(schedule={"vision": [1.0, 1.0], "default": "linear"}))


def test_sequential_blocks_are_blocks():
    model = nn.Module()
    model.trunk = nn.Sequential(*[Net(1) for _ in range(3)])
    targets = resolve_targets(model, config(target_modules=["head"]))
    assert [(t.tower, t.depth, t.blocks) for t in targets] == [("trunk", i, 3) for i in range(3)]


def test_a_rank_that_no_target_of_a_tower_can_take_is_told():
    net, towers = make_net(), make_towers()
    assert rank_too_large(resolve_targets(net, config(r=WIDTH))) is None  # q takes it, and k and v shrink
    told = rank_too_large(resolve_targets(net, config(r=5000, lora_alpha=16.0)))
    assert (
        told
        == f"r is 5000, but the widest target takes a rank of at most {WIDTH}, and s = lora_alpha / r = 0.0032; lower r"
    )
    told = rank_too_large(resolve_targets(towers, config(r={"vision": 2, "text": 99})))
    assert told is not None
    assert told.startswith("r is 99, but the widest target of text_model ")
