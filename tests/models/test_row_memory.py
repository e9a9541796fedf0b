"""Answers per row: whatever the company, the bits of the row alone; together only where that is so; bounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from keeplora.models.row_memory import RowMemory

Row = tuple[Tensor, ...]


class Exact:
    """A function that gives each row the same bits in every batch; it counts its calls."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        self.calls: list[int] = []

    def answer(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(row) for row in x.split(1)])

    @torch.no_grad()
    def __call__(self, rows: list[Row]) -> dict[str, Tensor | None]:
        x = torch.cat([x for (x,) in rows])
        self.calls.append(len(x))
        y = self.answer(x)
        return {"y": y, "twice": 2 * y, "none": None}


class Company(Exact):
    """A function whose last bits depend on how many rows there are, as a kernel's may."""

    def answer(self, x: Tensor) -> Tensor:
        return super().answer(x) * (1 + 1e-6 * len(x))


def rows(count: int, seed: int = 0) -> list[Row]:
    return [(row,) for row in torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).split(1)]


def test_rows_go_through_together_after_a_trial() -> None:
    function, memory = Exact(), RowMemory(1 << 20)
    memory("f", rows(8), function)
    assert function.calls == [8] + [1] * 8  # the trial: together, and each alone
    function.calls.clear()
    found = memory("f", rows(21, seed=1), function)
    assert function.calls == [8, 8, 4, 1, 1, 1, 1, 1]  # of four there had been no trial yet
    for (x,), answer in zip(rows(21, seed=1), found, strict=True):
        assert torch.equal(answer["y"], function.linear(x))
        assert torch.equal(answer["twice"], 2 * function.linear(x))
        assert answer["none"] is None
    function.calls.clear()
    memory("f", rows(13, seed=2), function)
    assert function.calls == [8, 4, 1]


@pytest.mark.parametrize("kind", [Exact, Company])
def test_a_row_has_the_bits_of_the_row_alone_whatever_came_with_it(kind: type[Exact]) -> None:
    function = kind()
    wanted = [function([row])["y"] for row in rows(24)]
    for order in (range(24), reversed(range(24)), [3, 1, 3, 20, 7]):
        memory, order = RowMemory(1 << 20), list(order)
        for _ in range(2):
            for start in range(0, len(order), 5 + len(order) // 3):
                some = order[start : start + 5 + len(order) // 3]
                found = memory("f", [rows(24)[i] for i in some], function)
                assert all(torch.equal(answer["y"], wanted[i]) for i, answer in zip(some, found, strict=True))


def test_where_company_changes_bits_every_row_goes_alone() -> None:
    function, memory = Company(), RowMemory(1 << 20)
    memory("f", rows(16), function)
    function.calls.clear()
    memory("f", rows(16, seed=1), function)
    assert function.calls == [1] * 16


def test_another_form_is_another_answer_and_another_trial() -> None:
    function, memory = Exact(), RowMemory(1 << 20)
    memory("f", rows(8), function)
    function.calls.clear()
    memory("g", rows(8), function)
    assert function.calls == [8] + [1] * 8
    assert (memory.hits, memory.misses) == (0, 16)


def test_bytes_are_bounded_and_what_does_not_fit_is_still_answered() -> None:
    each = 4 * 4  # two floats, twice
    function, memory = Exact(), RowMemory(5 * each)
    memory("f", rows(12), function)
    assert memory.left == 0
    again = memory("f", rows(12), function)
    assert (memory.hits, memory.misses) == (5, 12 + 7)
    assert all(torch.equal(a["y"], function.linear(x)) for (x,), a in zip(rows(12), again, strict=True))


def test_a_kept_row_does_not_hold_its_batch() -> None:
    memory, function = RowMemory(1 << 20), Exact()
    memory("f", rows(8), function)
    function.calls.clear()
    found = memory("f", rows(8, seed=1), function)
    assert function.calls == [8]
    assert all(answer["y"].untyped_storage().nbytes() == 2 * 4 for answer in found)


def test_rows_that_are_equal_are_computed_once() -> None:
    function, memory = Exact(), RowMemory(0)
    found = memory("f", [*rows(1), *rows(1), *rows(1)], function)
    assert function.calls == [1]
    assert all(torch.equal(answer["y"], found[0]["y"]) for answer in found)


def test_no_room_for_several_means_one_by_one() -> None:
    class Narrow(Exact):
        def __call__(self, rows: list[Row]) -> dict[str, Tensor | None]:
            if len(rows) > 1:
                self.calls.append(-len(rows))
                raise torch.OutOfMemoryError("no room")
            return super().__call__(rows)

    function, memory = Narrow(), RowMemory(1 << 20)
    for seed in (0, 1):
        found = memory("f", rows(8, seed), function)
        assert all(torch.equal(a["y"], function.linear(x)) for (x,), a in zip(rows(8, seed), found, strict=True))
    assert function.calls == [-8] + [1] * 8 + [-4] + [1] * 8


def test_an_output_without_an_entry_for_each_row_is_asked_for_alone() -> None:
    class Total(Exact):
        def __call__(self, rows: list[Row]) -> Tensor:  # type: ignore[override]
            self.calls.append(len(rows))
            return torch.cat([x for (x,) in rows]).sum(dim=0, keepdim=True)

    function, memory = Total(), RowMemory(1 << 20)
    found = memory("f", rows(8), function)
    assert all(torch.equal(answer, x) for (x,), answer in zip(rows(8), found, strict=True))
