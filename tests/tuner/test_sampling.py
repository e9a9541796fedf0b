"""Which samples the statistics see: stratified, capped, none dropped, and no random number taken from training."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from keeplora import ContinualLearner
from keeplora.errors import KeepLoraError
from keeplora.tuner.sampling import batch_size, statistics_batches, stratified_indices
from tests.tuner.blocks import Samples, config, loader, loss_fn, make_net, train


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    samples=st.integers(1, 70), seed=st.integers(0, 1000),
)  # fmt: skip
def test_stratified_choice(labels, samples, seed):
    chosen = stratified_indices(labels, samples, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(samples, len(labels))
    assert chosen == stratified_indices(labels, samples, seed)
    have, took = Counter(labels), Counter(labels[i] for i in chosen)
    # As even as the sizes allow: a class falls behind another by more than one only when it has no more.
    for a in have:
        for b in have:
            assert took[a] >= took[b] - 1 or took[a] == have[a]
    assert stratified_indices(labels, None, seed) == list(range(len(labels)))


def test_seed_decides_the_choice():
    labels = [0] * 50
    assert len({tuple(stratified_indices(labels, 5, seed)) for seed in range(10)}) > 5


def seen(batches) -> list[int]:
    return [int(y) for _, labels in batches for y in labels]


def test_cap_is_respected_and_stratified_and_nothing_is_dropped():
    batches = loader(10, batch_size=4, drop_last=True, shuffle=True)
    assert len(seen(statistics_batches(batches, None, 0))) == 10
    assert Counter(seen(statistics_batches(batches, 6, 0))) == {0: 2, 1: 2, 2: 2}
    labels = [7] * 9 + [8]
    capped = statistics_batches(batches, 2, 0, labels)
    assert len(seen(capped)) == 2
    assert 9 in capped.dataset.indices  # the only sample of class 8
    with pytest.raises(ValueError, match="labels has 3 entries but the loader's dataset has 10"):
        statistics_batches(batches, 2, 0, [0, 1, 2])


def test_passes_of_the_learner_respect_their_caps():
    counts = {"gradient": 0, "feature": 0}
    phase = "gradient"

    def loss(model, batch):
        counts[phase] += len(batch[1])
        return loss_fn(model, batch)

    learner = ContinualLearner(make_net(), config(gradient_samples=5, feature_samples=7))
    learner.start_task("a", loader(10, batch_size=2), loss)
    phase = "feature"
    learner.finish_task()
    assert counts == {"gradient": 5, "feature": 7}


def test_batch_size_of_a_batch_sampler_is_kept():
    data = Samples(10)
    batches = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, drop_last=True))
    assert [len(y) for _, y in statistics_batches(batches, None, 0)] == [3, 3, 3, 1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Samples(10))


class Whole(IterableDataset):
    def __iter__(self):
        return iter(list(loader(10, batch_size=2)))


class Shared(IterableDataset):
    """Shares itself out among workers, as `datasets` does; `Stream` does not, and would come once from each."""

    def __iter__(self):
        told = torch.utils.data.get_worker_info()
        return itertools.islice(iter(Samples(10)), told.id if told else 0, None, told.num_workers if told else 1)


@pytest.mark.parametrize("stream", [Stream, Shared])
def test_workers_bring_no_sample_of_a_stream_twice(stream):
    batches = DataLoader(stream(), batch_size=2, num_workers=2)
    assert seen(statistics_batches(batches, None, 0)) == [0, 1, 2] * 3 + [0]


def test_a_stream_gives_the_factors_of_the_same_samples_in_a_list():
    found = []
    for batches in (DataLoader(Stream(), batch_size=2), loader(10, batch_size=2)):
        learner = ContinualLearner(make_net(), config())
        torch.manual_seed(0)  # dropout draws from it
        model = learner.start_task("a", batches, loss_fn)
        train(model, list(loader(10, batch_size=2)), steps=2)
        learner.finish_task()
        found.append(learner)
    for name, one in found[0].records[0].factors.items():
        other = found[1].records[0].factors[name]
        assert torch.equal(one.A, other.A)
        assert torch.equal(one.B, other.B)
    assert all(torch.equal(U, found[1].U[name]) for name, U in found[0].U.items())


def test_what_comes_only_once_is_refused():
    learner = ContinualLearner(make_net(), config())
    once = (batch for batch in loader(10, batch_size=2))
    with pytest.raises(KeepLoraError, match=r"task 'a': batches is a generator, which can be gone through only once"):
        learner.start_task("a", once, loss_fn)
    assert learner._open is None
    learner.start_task(
        "a", once, loss_fn, feature_batches=loader(10, batch_size=2)
    )  # goes through each of the two once
    learner.abort_task()

    class Worn(IterableDataset):
        rest = iter(Samples(10))

        def __iter__(self):
            return self.rest

    learner.start_task("a", DataLoader(Worn(), batch_size=2), loss_fn)
    with pytest.raises(ValueError, match=r"the feature pass was given no sample.*does not begin anew"):
        learner.finish_task()


def test_streams_and_plain_iterables_are_cut_after_the_cap():
    batches = DataLoader(Stream(), batch_size=4, drop_last=True)
    assert seen(statistics_batches(batches, None, 0)) == [0, 1, 2] * 3 + [0]  # nothing is dropped
    capped = statistics_batches(batches, 5, 0)
    assert seen(capped) == seen(capped) == [0, 1, 2, 0, 1]  # exactly so many, and again
    whole = DataLoader(Whole(), batch_size=None)
    assert len(seen(statistics_batches(whole, 5, 0))) == 6  # it brings batches of its own
    listed = list(loader(10, batch_size=2))
    assert len(seen(statistics_batches(listed, 5, 0))) == 6  # whole batches
    assert statistics_batches(listed, None, 0) is listed


@pytest.mark.parametrize("own", [False, True])
def test_statistics_take_no_random_number_from_training(own):
    """A shuffled loader brings the same order whether or not statistics were taken before."""

    def order(statistics: bool) -> list[int]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own else None
        batches = DataLoader(torch.arange(40), batch_size=4, shuffle=True, generator=generator)
        if statistics:
            list(statistics_batches(batches, None, 0))
            list(statistics_batches(batches, 12, 0))
        return [int(i) for batch in batches for i in batch]

    assert order(True) == order(False)
    assert order(True) != list(range(40))


def test_number_of_samples_in_a_batch():
    x = torch.zeros(4, 3)
    assert batch_size(x) == 4
    assert batch_size((x, torch.zeros(4))) == 4
    assert batch_size({"input_ids": torch.zeros(9, 5), "labels": torch.zeros(4)}) == 4  # prompts are not samples
    assert batch_size({"input_ids": torch.zeros(9, 5), "pixel_values": torch.zeros(2, 3, 4, 4)}) == 2
    with pytest.raises(TypeError, match="batch of type int"):
        batch_size(3)
