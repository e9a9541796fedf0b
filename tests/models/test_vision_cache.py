"""The vision cache: same answers as the tower, computed once per picture, and gone when it is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from keeplora.models.vision_cache import VisionCache


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.rows = 0

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: object = None) -> BaseModelOutputWithPooling:
        self.rows += len(pixel_values)
        x = self.linear(pixel_values.flatten(1))
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=2 * x, hidden_states=(x, None, x + 1))


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def test_answers_are_the_towers_and_each_picture_is_computed_once(tower: Tower) -> None:
    pictures = torch.randn(3, 3, 2, 2)
    with torch.no_grad():
        wanted = tower(pictures)
    tower.rows = 0
    cache = VisionCache(tower)
    with cache.active():
        for order in ([0, 1, 2], [2, 0], [1]):
            found = tower(pictures[order], output_hidden_states=[0, 2])
            torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state[order])
            torch.testing.assert_close(found.hidden_states[2], wanted.hidden_states[2][order])
            assert found.hidden_states[1] is None
    assert tower.rows == 3
    assert (cache.hits, cache.misses) == (3, 3)
    assert "forward" not in vars(tower)


def test_what_the_caller_writes_into_an_answer_is_not_kept(tower: Tower) -> None:
    picture = torch.randn(1, 3, 2, 2)
    with VisionCache(tower).active():
        first = tower(picture)
        first.pooler_output = "changed"
        first.last_hidden_state.zero_()
        again = tower(picture)
        assert isinstance(again.pooler_output, torch.Tensor)
        assert again.last_hidden_state.abs().sum() > 0


def test_another_setting_or_precision_is_another_entry(tower: Tower) -> None:
    picture = torch.randn(1, 3, 2, 2)
    cache = VisionCache(tower)
    with cache.active():
        tower(picture)
        tower(picture, output_hidden_states=[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert tower(picture).last_hidden_state.dtype == torch.bfloat16
        assert tower(picture).last_hidden_state.dtype == torch.float32
    assert cache.misses == 3


def test_two_towers_share_a_cache_and_no_answers(tower: Tower) -> None:
    other, picture = Tower(), torch.randn(1, 3, 2, 2)
    with torch.no_grad():
        wanted = [t(picture).last_hidden_state for t in (tower, other)]
    cache = VisionCache(tower, other)
    with cache.active():
        for _ in range(2):
            found = [t(picture).last_hidden_state for t in (tower, other)]
            assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert (cache.hits, cache.misses) == (2, 2)


def test_what_stands_beside_a_picture_is_part_of_it(tower: Tower) -> None:
    class Masked(Tower):
        def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor) -> BaseModelOutputWithPooling:  # type: ignore[override]
            return super().forward(pixel_values * mask[:, None, None, None])

    masked, pictures, mask = Masked(), torch.randn(2, 3, 2, 2), torch.tensor([1.0, 2.0])
    cache = VisionCache(masked)
    with torch.no_grad(), cache.active():
        for order in ([0, 1], [1, 0]):
            for given in (mask, 3 * mask):
                expected = masked.linear((pictures * given[:, None, None, None])[order].flatten(1))
                found = masked(pixel_values=pictures[order], mask=given[order]).last_hidden_state
                torch.testing.assert_close(found, expected)
    assert (cache.hits, cache.misses) == (4, 4)


def test_a_full_cache_still_answers(tower: Tower) -> None:
    cache = VisionCache(tower, max_bytes=0)
    picture = torch.randn(1, 3, 2, 2)
    with cache.active():
        tower(picture)
        tower(picture)
    assert tower.rows == 2


def test_an_exception_inside_gives_the_tower_back(tower: Tower) -> None:
    with pytest.raises(RuntimeError), VisionCache(tower).active():
        raise RuntimeError
    assert "forward" not in vars(tower)


def test_new_pictures_go_through_eight_at_a_time_with_what_stands_beside_them(tower: Tower) -> None:
    class Masked(Tower):
        def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor) -> BaseModelOutputWithPooling:  # type: ignore[override]
            pictures = (pixel_values * mask[:, None, None, None]).flatten(1)
            x = torch.cat(
                [self.linear(row) for row in pictures.split(1)]
            )  # a product of eight rows may have other bits
            return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=2 * x, hidden_states=(x, None, x + 1))

    masked, pictures, mask = Masked(), torch.randn(24, 3, 2, 2), torch.arange(1.0, 25.0)
    with torch.no_grad():
        alone = [masked(pictures[i : i + 1], mask[i : i + 1]) for i in range(24)]
    calls: list[int] = []
    inner = masked.forward

    def counted(pixel_values: torch.Tensor, mask: torch.Tensor) -> BaseModelOutputWithPooling:
        calls.append(len(pixel_values))
        return inner(pixel_values, mask)

    masked.forward = counted  # type: ignore[method-assign]
    cache = VisionCache(masked)
    forward = cache._around(counted, 0)
    forward(pixel_values=pictures[:8], mask=mask[:8])
    assert calls == [8] + [1] * 8  # what eight together say is held against what each says alone
    calls.clear()
    found = forward(pixel_values=pictures[4:20], mask=mask[4:20])
    assert calls == [8, 4] + [1] * 4  # of four there had been no trial
    for i, wanted in enumerate(alone[4:20]):
        assert torch.equal(found.last_hidden_state[i : i + 1], wanted.last_hidden_state)
        assert torch.equal(found.pooler_output[i : i + 1], wanted.pooler_output)
        assert torch.equal(found.hidden_states[2][i : i + 1], wanted.hidden_states[2])


def test_pictures_of_one_call_are_not_mixed_up(tower: Tower) -> None:
    pictures = torch.randn(11, 3, 2, 2)
    with torch.no_grad():
        wanted = tower(pictures)
    with VisionCache(tower).active():
        tower(pictures[[2, 7, 9]])  # these are known when the others come
        order = [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 4]
        found = tower(pictures[order])
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state[order])
