"""Class prompts in batches: the cheapest partition, the features and gradients of the whole, and a bounded graph."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from keeplora.models import load_model
from keeplora.models.prompts import PromptBatches, cut_by_length
from tests.models.tiny import FAMILIES, make_tiny

PROMPTS = [
    "a photo of a cat.", "a photo of the large red car.", "cat", "art of the bird flower texture sign digit number.",
    "a photo of a small dog.", "dog", "an origami green square.",
]  # fmt: skip


@pytest.fixture(scope="module", params=[*FAMILIES, "xclip"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("prompts") / request.param
    return load_model(make_tiny(request.param, folder))


def cost(batches: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) + overhead for batch in batches)


def partitions(items: list[int]) -> Any:
    if not items:
        yield []
        return
    first, *rest = items
    for some in itertools.chain.from_iterable(itertools.combinations(rest, k) for k in range(len(rest) + 1)):
        for others in partitions([i for i in rest if i not in some]):
            yield [[first, *some], *others]


@pytest.mark.parametrize("overhead", [0, 1, 3, 10, 1000])
def test_no_partition_is_cheaper(overhead: int) -> None:
    generator = torch.Generator().manual_seed(overhead)
    for _ in range(6):
        lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
        found = cut_by_length(lengths, overhead=overhead)
        assert sorted(i for batch in found for i in batch) == list(range(6))
        least = min(cost(some, lengths, overhead) for some in partitions(list(range(6))))
        assert cost(found, lengths, overhead) == least


def test_a_batch_never_passes_the_bound_but_for_a_single_text() -> None:
    lengths = [5] * 7 + [9, 40]
    batches = cut_by_length(lengths, overhead=4, most=20)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    tokens = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert [t for t in tokens if t > 20] == [40]
    assert [len(batch) for batch in batches if lengths[batch[0]] == 5] == [3, 4]  # as equal as can be


def test_one_batch_keeps_the_order_of_the_texts() -> None:
    assert cut_by_length([4, 2, 3], overhead=1000) == [[0, 1, 2]]


def grouped(family: Any, most: int | None, monkeypatch: pytest.MonkeyPatch) -> PromptBatches:
    monkeypatch.setattr("keeplora.models.prompts._OVERHEAD", {"cpu": 1, "cuda": 1})
    batch = family.tokenize(PROMPTS)
    return PromptBatches(batch, family.text_lengths(batch), family.device, most)


@pytest.mark.parametrize("most", [None, 24])
def test_features_and_gradients_are_those_of_all_at_once(
    family: Any, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = grouped(family, most, monkeypatch)
    parameters = [p for name, p in family.model.named_parameters() if name.startswith(family.towers["text"])]

    def gradients(features: torch.Tensor) -> list[torch.Tensor | None]:
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        return list(torch.autograd.grad((features.square() * weights).sum(), parameters, allow_unused=True))

    wanted, found = family.text_features(family.tokenize(PROMPTS)), prompts.features(family)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    together, apart = gradients(wanted), gradients(found)
    assert any(g is not None and float(g.abs().max()) > 0 for g in together)
    for a, b in zip(together, apart, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert float((b - a).norm()) <= 1e-6 * max(float(a.norm()), 1.0)


def test_pads_are_cut_off_where_the_family_does_not_read_them(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = grouped(family, None, monkeypatch)
    whole = family.tokenize(PROMPTS)["input_ids"].shape[1]
    widths = {part["input_ids"].shape[1] for _, part in prompts.batches}
    if family.family in ("siglip", "siglip2"):
        assert widths == {whole}  # it pools at the last position: all of it is read
    else:
        assert min(widths) < whole
        assert max(widths) == whole


def test_with_a_bound_the_backward_pass_holds_one_batch_at_a_time(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(most: int | None) -> int:
        kept = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            grouped(family, most, monkeypatch).features(family)
        return sum(kept)

    tokens = family.tokenize(PROMPTS)["input_ids"].numel()
    assert not grouped(family, tokens, monkeypatch).recompute
    assert grouped(family, 24, monkeypatch).recompute
    assert held(24) < held(None) / 10
