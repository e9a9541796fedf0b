"""The two passes over a task's data: the gradient G before it (M2), the feature covariance C after it (M8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.tuner import ranks
from keeplora.tuner.convergence import Enough
from keeplora.tuner.memory import in_smaller_batches
from keeplora.tuner.observers import FeatureObserver, GradientObserver, LossFn, MaskFn, attention_masks, quiet_model
from keeplora.tuner.sampling import batch_size, to_device
from keeplora.tuner.sharding import going_through, in_step
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore


def sum_and_count(loss: Any, batch: Any) -> tuple[Tensor, int]:
    """(Σ ℓ_n, N) from what a `LossFn` returned."""
    if isinstance(loss, (tuple, list)) and len(loss) == 2:
        return loss[0], int(loss[1])
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned a {type(loss).__name__}: return a scalar tensor (mean over the batch), a 1-D tensor "
            "(one loss per sample), or a pair (sum, count)"
        )
    if loss.ndim == 0:
        n = batch_size(batch)
        return loss * n, n
    return loss.sum(), loss.numel()


def collect_gradients(
    model: nn.Module, targets: Sequence[Target], store: WeightStore, batches: Iterable[Any], loss_fn: LossFn,
    mask_fn: MaskFn = attention_masks, enough: Enough | None = None,
    observe: Callable[[Sequence[Target], WeightStore], GradientObserver] = GradientObserver,
) -> dict[str, Tensor]:  # fmt: skip
    """G of every target at the current weights (M2): mean over samples, evaluation mode, whatever the batch size.

    With ``enough`` the pass may end before the last batch. Where a GPU's memory does not hold a batch, the pass is taken again
    with smaller ones. With several processes each goes through its own share, however large: sums and counts are added over
    all of them.

    Args:
        observe: makes the observer; another than the default's may sum something else that is linear in G.

    Raises:
        TargetError: a target that no gradient reached in the first batch.
        FloatingPointError: a loss that is not finite.
        RankError: another process failed in its share.
    """
    what = "the gradient pass"
    with going_through(model, what):
        found, count = in_smaller_batches(
            "gradient",
            batches,
            lambda b: _collect_gradients(model, targets, store, b, loss_fn, mask_fn, enough, observe),
        )
    total = int(ranks.totals(what, count)[0])
    if total == 0:
        raise ValueError("the gradient pass was given no sample: the loader is empty")
    G = ranks.summed(what, found, [t.name for t in targets])
    return {name: G.div_(total) for name, G in G.items()}  # in place: G of all targets is the largest thing held


def _collect_gradients(
    model: nn.Module, targets: Sequence[Target], store: WeightStore, batches: Iterable[Any], loss_fn: LossFn,
    mask_fn: MaskFn, enough: Enough | None, observe: Callable[[Sequence[Target], WeightStore], GradientObserver],
) -> tuple[dict[str, Tensor], int]:  # fmt: skip
    """(Σ_n ∂ℓ_n/∂W per target, N)."""
    device = store.module(targets[0].name).weight.device
    total = 0
    if enough is not None:
        enough.restart()
    with quiet_model(model), observe(targets, store) as observer:
        for batch, own in in_step(model, batches, "the gradient pass"):
            batch = to_device(batch, device)
            observer.paused, observer.masks = not own, mask_fn(batch)
            loss, n = sum_and_count(loss_fn(model, batch), batch)
            if not own:
                loss.backward()
                continue
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} in the gradient pass, after {total} samples")
            loss.backward()
            if total == 0:
                observer.require_all_fired("gradient")
            total += n
            if enough is not None and enough.reached(batches, batch_size(batch), lambda: observer.G) and _end(batches):
                break
    return observer.G, total


def _end(batches: Any) -> bool:
    """Have ``batches`` end by themselves, where they can: what follows their samples is still to come; True where they cannot."""
    if hasattr(batches, "end"):
        batches.end()
        return False
    return True


def collect_features(
    model: nn.Module, targets: Sequence[Target], store: WeightStore, batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any], mask_fn: MaskFn = attention_masks, enough: Enough | None = None,
    sketch: int | None = None, *, all_fire: bool = True,
) -> FeatureObserver:  # fmt: skip
    """C of every target at the merged weights (M8). Batches may each feed one tower only; in the end all must have fired,
    unless ``all_fire`` is off.

    With ``enough`` the pass may end before the last batch; ``sketch`` is `FeatureObserver`'s. Where a GPU's memory does not
    hold a batch, the pass is taken again with smaller ones. With several processes each goes through its own share, and the
    sums are added over all of them.
    """
    what = "the feature pass"
    with going_through(model, what):
        observer = in_smaller_batches(
            "feature",
            batches,
            lambda b: _collect_features(model, targets, store, b, forward_fn, mask_fn, enough, sketch),
        )
    observer.join_ranks(what)
    if all_fire:
        observer.require_all_fired("input")
    return observer


@torch.no_grad()
def _collect_features(
    model: nn.Module, targets: Sequence[Target], store: WeightStore, batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any], mask_fn: MaskFn, enough: Enough | None, sketch: int | None,
) -> FeatureObserver:  # fmt: skip
    device = store.module(targets[0].name).weight.device
    seen = False
    if enough is not None:
        enough.restart()
    with quiet_model(model), FeatureObserver(targets, store, sketch) as observer:
        for batch, own in in_step(model, batches, "the feature pass"):
            seen = True
            batch = to_device(batch, device)
            observer.paused, observer.masks = not own, mask_fn(batch)
            forward_fn(model, batch)
            if enough is not None and enough.reached(batches, batch_size(batch), observer.leaders) and _end(batches):
                break
    if not seen and not ranks.active():  # of several processes one may have no share
        raise ValueError(
            "the feature pass was given no sample: the loader is empty, or its stream does not begin anew when it is "
            "gone through again"
        )
    return observer
