"""Where a stream without task labels goes over to a new task, told from how much feature energy lies outside what was seen.

What was seen is, per layer, S = span[U, V]: the protected subspace U, and the directions V that the task under way adds to
it (M8, from a few of its own samples). Of a sample whose layer inputs are x_1 … x_T (its tokens) the share outside is

    e = Σ_t ‖(I − P_S) x_t‖² / Σ_t ‖x_t‖².

Layers are put on one scale (each less its mean, over its spread, both over the samples that made V) and averaged to one
number a sample, which `keeplora.math.change.RankCusum` watches against the samples of this task that made no V.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError, TargetError
from keeplora.math import Subspace, new_directions
from keeplora.math.change import Alarm, RankCusum
from keeplora.tuner.observers import FeatureObserver, MaskFn, _Observer, attention_masks, quiet_model
from keeplora.tuner.sampling import batch_size, to_device
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore

DEFAULT_RATE = 1e-4
"""False alarms per sample where the user names none: one in 10 000 samples."""


class ShareObserver(_Observer):
    """Per target that has a subspace, each sample's share of energy outside it, (n,), of the batch under way."""

    def __init__(self, targets: Sequence[Target], store: WeightStore, seen: dict[str, Subspace]) -> None:
        super().__init__([t for t in targets if t.name in seen], store)
        self.seen = seen
        self.n = 0
        self.outside: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}

    def begin(self, n: int, masks: Any) -> None:
        self.n, self.masks, self.outside, self.total = n, masks, {}, {}

    def shares(self) -> dict[str, Tensor]:
        """(n,) per target; of one that a batch reaches in several calls, over all of them."""
        return {k: self.outside[k] / self.total[k].clamp(min=1e-30) for k in self.outside}

    def _attach(self, target: Target, module: nn.Linear) -> Any:
        name = target.name

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if self.n == 0 or x.shape[0] % self.n or (x.ndim > 2 and x.shape[0] != self.n):
                return  # not a row, or so many rows, per sample: the class prompts of a dual encoder
            with torch.autocast(x.device.type, enabled=False):
                rows = self._rows(target, x, 0.5)
                S = self.seen[name] = self.seen[name].to(x.device)
                inside = (rows @ S.held).square().sum(-1).reshape(self.n, -1).sum(1)
                total = rows.square().sum(-1).reshape(self.n, -1).sum(1)
                outside = inside if S.by_complement else (total - inside).clamp(min=0.0)
            self.outside[name] = self.outside.get(name, 0.0) + outside
            self.total[name] = self.total.get(name, 0.0) + total

        return module.register_forward_pre_hook(hook)


class TaskDetector:
    """Tells where a stream of batches goes over to a new task.

    Args:
        model: the model; it is run in evaluation mode without gradients, once per batch. targets, store: a learner's.
        forward_fn: ``forward_fn(model, batch)``: one pass through the layers to watch.
        subspace: U of a target by its name; None: nothing is protected yet. energy: ε_f of a target by its name.
        alarm_rate: false alarms per sample while the samples of a task come in no particular order, above 0 and below 0.5.
        shift: the smallest change worth finding quickly, in standard deviations of a sample's number.
        mask_fn: which positions count, as in `ContinualLearner.start_task`.
        frozen: makes a context in which the model is as it was when `calibrate` saw it; by default it never changes.
        seed: of the draws that break ties. trace: keep `values` and `statistics`, a number each per sample, for a plot.

    Use `calibrate` at the start of a task, then `update` with each batch.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        store: WeightStore,
        forward_fn: Callable[[nn.Module, Any], Any],
        *,
        subspace: Callable[[str], Subspace] | None,
        energy: Callable[[str], float],
        alarm_rate: float = DEFAULT_RATE,
        shift: float = 1.0,
        mask_fn: MaskFn = attention_masks,
        frozen: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        seed: int = 0,
        trace: bool = False,
    ) -> None:
        check_rate(alarm_rate)
        self.model, self.targets, self.store = model, list(targets), store
        self.forward_fn, self.mask_fn, self.frozen = forward_fn, mask_fn, frozen
        self.subspace, self.energy = subspace, energy
        self.alarm_rate, self.shift, self.seed = alarm_rate, shift, seed
        self.seen: dict[str, Subspace] = {}
        """S per watched target: of targets with one input, the first alone."""
        self.watched: list[str] = []
        self.trace = trace
        self.values: list[float] = []
        """One number per sample since `calibrate`."""
        self.statistics: list[float] = []
        """The CUSUM after each of them, over its threshold: 1 at an alarm."""
        self.watch = RankCusum(alarm_rate, shift, seed=seed)
        self._mean = self._spread = torch.zeros(0)

    def calibrate(self, batches: Sequence[Any]) -> None:
        """Take what a task looks like from its first batches, two at least: every other one makes V, the others the ranks.

        Raises:
            KeepLoraError: fewer than two batches. TargetError: no layer is given its inputs sample by sample.
        """
        fit, rest = batches[::2], batches[1::2]
        if not rest:
            raise KeepLoraError(
                "a task is told from its first batches, and two at least are needed: half of them make its subspace, the others "
                "say what is usual; raise warmup, or use smaller batches"
            )
        self.seen = {}
        for name, C in self._covariances(fit).items():
            U = self.subspace(name) if self.subspace is not None else Subspace.of(torch.zeros(C.shape[0], 0))
            self.seen[name] = U.extended(new_directions(U, C, self.energy(name))[0])
        shares = self._shares(fit)
        per_batch = [set(one) for one in shares]
        self.watched = [name for name in self.seen if all(name in one for one in per_batch)]
        if not self.watched:
            raise TargetError(
                "no target is given one sample's inputs per sample of the batch, so there is nothing to watch; give a watch_fn "
                "that runs a tower on the batch's own samples"
            )
        table = self._table(shares)
        self._mean, self._spread = table.mean(0), table.std(0).clamp(min=1e-12) if len(table) > 1 else torch.ones(1)
        self.watch = RankCusum(self.alarm_rate, self.shift, seed=self.seed)
        self.values, self.statistics = [], []
        self.watch.learn(self._reduce(self._shares(rest)))

    def update(self, batch: Any) -> Alarm | None:
        """Judge the samples of one batch in their order; the alarm counts samples since `calibrate`, and ends the batch."""
        for value in self._reduce(self._shares([batch])):
            alarm = self.watch.update(value)
            if self.trace:
                self.values.append(value)
                self.statistics.append(self.watch.statistic if alarm is None else 1.0)
            if alarm is not None:
                return alarm
        return None

    @torch.no_grad()
    def _covariances(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """C of every target that the forward pass reaches, on the CPU; of targets with one input, the first's alone."""
        device = self.store.module(self.targets[0].name).weight.device
        with quiet_model(self.model), self.frozen(), FeatureObserver(self.targets, self.store) as observer:
            for batch in batches:
                batch = to_device(batch, device)
                observer.masks = self.mask_fn(batch)
                self.forward_fn(self.model, batch)
        return {name: C.cpu() for name, C in observer.leaders().items() if isinstance(C, Tensor)}

    @torch.no_grad()
    def _shares(self, batches: Iterable[Any]) -> list[dict[str, Tensor]]:
        """Per batch, the shares of its samples by target."""
        device = self.store.module(self.targets[0].name).weight.device
        out = []
        with quiet_model(self.model), self.frozen(), ShareObserver(self.targets, self.store, self.seen) as observer:
            for batch in batches:
                batch = to_device(batch, device)
                observer.begin(batch_size(batch), self.mask_fn(batch))
                self.forward_fn(self.model, batch)
                out.append(observer.shares())
        return out

    def _table(self, shares: list[dict[str, Tensor]]) -> Tensor:
        """(samples, watched targets) on the CPU."""
        for one in shares:
            if lost := [name for name in self.watched if name not in one]:
                raise TargetError(
                    f"{lost[0]} was given its inputs sample by sample at first, and in a later batch was not; give a watch_fn "
                    "that runs a tower on the batch's own samples alone"
                )
        rows = [torch.stack([one[name] for name in self.watched], dim=1).cpu().double() for one in shares]
        return torch.cat(rows)

    def _reduce(self, shares: list[dict[str, Tensor]]) -> list[float]:
        return reduce_layers(self._table(shares), self._mean, self._spread).tolist()


def reduce_layers(shares: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """One number per sample from its share at every layer, (n, layers) → (n,): the mean of what is left on one scale.

    >>> reduce_layers(torch.tensor([[0.1, 0.02], [0.3, 0.04]]), torch.tensor([0.1, 0.02]), torch.tensor([0.1, 0.01]))
    tensor([0., 2.])
    """
    return ((shares - mean) / spread).mean(1)


def check_rate(rate: float, name: str = "alarm_rate") -> None:
    """`KeepLoraError` unless it lies above 0 and below 0.5 false alarms per sample."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 0.5:
        raise KeepLoraError(
            f"{name} is the number of false alarms per sample, above 0 and below 0.5, got {rate!r}; 1e-4 is one in 10 000"
        )
