"""Hooks on the targets that collect the gradient G (M2) and the feature covariance C (M8), and touch nothing else.

No weight ever gets ``requires_grad``: a target's output is made to require a gradient, so autograd runs from the loss
back to the shallowest target, and G = Σ g xᵀ is formed from what passes by (g the output's gradient, x the input).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import TargetError
from keeplora.math import CovarianceSketch, FrequentDirections
from keeplora.tuner import ranks
from keeplora.tuner.activations import lean_activations
from keeplora.tuner.memory import full_float32, release_cached
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore

LossFn = Callable[[nn.Module, Any], Any]
"""``loss_fn(model, batch)``: a scalar (mean over the batch), a 1-D tensor (one loss per sample or answer token), or a
pair (sum of losses, how many)."""
MaskFn = Callable[[Any], Mapping[str, Tensor]]
"""``mask_fn(batch)``: per tower, a tensor shaped like that tower's inputs without their last dimension: which positions
count (bool), or how much each of them counts (float weights w ≥ 0: C = Σ w x xᵀ and G = Σ w g xᵀ)."""


def attention_masks(batch: Any) -> dict[str, Tensor]:
    """The default `MaskFn`: a batch's ``attention_mask`` serves every tower that is not a vision tower."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return {"": mask.bool()} if isinstance(mask, Tensor) else {}


def _uncompiled() -> contextlib.AbstractContextManager[object]:
    """Modules that somebody compiled run as they are written: only so do hooks see every layer, and nothing is compiled anew."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing compiled and no weight gradients inside; every flag as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    restore = lean_activations(model)
    try:
        model.eval()
        for p in flags:
            p.requires_grad_(False)
        with _uncompiled():
            yield
    finally:
        restore()
        for module, mode in modes.items():
            module.training = mode
        for p, flag in flags.items():
            p.requires_grad_(flag)


class _Observer:
    """Shared: hook handles, the mask of the batch under way, and the record of which targets fired."""

    def __init__(self, targets: Sequence[Target], store: WeightStore) -> None:
        self.targets = list(targets)
        self.store = store
        self.masks: Mapping[str, Tensor] = {}
        self.fired: set[str] = set()
        self.paused = False
        """The batch under way is another process's, gone through for the sake of a sharded model alone."""
        self._handles: list[Any] = []

    def _attach(self, target: Target, module: nn.Linear) -> Any:
        raise NotImplementedError

    def __enter__(self):
        self._handles = [self._attach(t, self.store.module(t.name)) for t in self.targets]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _rows(self, target: Target, x: Tensor, power: float) -> Tensor:
        """x as (rows, in) in float32, each row times its weight to the ``power``; padding rows are zero."""
        mask = self._mask_for(target, x)
        x = x.detach().to(torch.float32)
        if mask is not None:
            weights = mask.to(x.device, torch.float32)
            if mask.is_floating_point():
                if not (torch.isfinite(weights).all() and (weights >= 0).all()):
                    raise TargetError(
                        f"the weights of tower {target.tower!r}'s positions must be finite and not negative"
                    )
                weights = weights**power
            x = x * weights.unsqueeze(-1)
        return x.reshape(-1, x.shape[-1])

    def _mask_for(self, target: Target, x: Tensor) -> Tensor | None:
        if (mask := self.masks.get(target.tower)) is not None:
            if mask.shape != x.shape[:-1]:
                raise TargetError(
                    f"the mask of tower {target.tower!r} has shape {tuple(mask.shape)} but {target.name} was given "
                    f"inputs of shape {tuple(x.shape)}: it must match all but the last dimension"
                )
            return mask
        mask = self.masks.get("")
        if mask is None or "vis" in target.tower or mask.shape != x.shape[:-1]:
            return None
        return mask

    def require_all_fired(self, what: str) -> None:
        silent = [t.name for t in self.targets if t.name not in self.fired]
        if silent:
            more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
            raise TargetError(
                f"{', '.join(silent[:3])}{more}: no {what} reached {'it' if len(silent) == 1 else 'them'} in the first "
                "batch, so nothing could be learned or protected there; take what the loss does not use out of "
                "target_modules"
            )


class GradientObserver(_Observer):
    """Accumulates Σ_n ∂ℓ_n/∂W of every target into ``G[name]``, float64, (out, in)."""

    def __init__(self, targets: Sequence[Target], store: WeightStore) -> None:
        super().__init__(targets, store)
        self.G: dict[str, Tensor] = {}

    def _product(self, target: Target, g: Tensor, x: Tensor) -> Tensor:
        """What a batch adds: gᵀ x of the output's gradient g (T, out) and the input x (T, in), float32."""
        return g.T @ x

    def _attach(self, target: Target, module: nn.Linear) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # the first half of a checkpointed block; it comes again with gradients
                return None
            x: Tensor = args[0]
            version = x._version
            changed = None
            if not y.requires_grad:
                # A leaf may not be changed in place by what follows; its copy may.
                y = changed = y.detach().requires_grad_(True).clone()

            def collect(g: Tensor) -> None:
                if self.paused:
                    return
                if x._version != version:
                    raise TargetError(f"the input of {target.name} is changed in place later on; its gradient is lost")
                with torch.autocast(g.device.type, enabled=False), full_float32():
                    rows = self._rows(target, x.to(g.device), 1.0)  # a device map's hook moves inputs behind this one
                    G = self._product(target, g.detach().to(torch.float32).reshape(-1, g.shape[-1]), rows)
                self.fired.add(target.name)
                if target.name in self.G:
                    self.G[target.name] += G
                else:
                    self.G[target.name] = G.to(torch.float64)

            y.register_hook(collect)
            return changed

        return module.register_forward_hook(hook)


SKETCH_WIDTH = 4
"""A sketch of ℓ rows is held where the inputs are at least this many times ℓ wide: its buffer of 2 ℓ rows is half of C then."""


class FeatureObserver(_Observer):
    """Accumulates C = Σ x xᵀ over the inputs of every target, float64, (in, in); targets with one input share one C.

    Args:
        sketch: ℓ, to hold frequent directions in place of C where the inputs are ≥ `SKETCH_WIDTH` ℓ wide; None: C everywhere.

    Where a GPU has no memory for a C, all of them move to the CPU, which is said once; the sums are the same.
    """

    def __init__(self, targets: Sequence[Target], store: WeightStore, sketch: int | None = None) -> None:
        super().__init__(targets, store)
        self._sketch = sketch
        self._sketches: dict[str, FrequentDirections] = {}
        self._on_cpu = False
        self.leader: dict[str, str] = {}
        """Target name → the target whose C it shares: q, k and v of a block read the same tensor."""
        self._C: dict[str, Tensor] = {}
        self._last: dict[str, weakref.ref[Tensor]] = {}
        self._block = {t.name: (t.tower, t.depth) for t in targets}

    def C(self, name: str) -> Tensor | CovarianceSketch:
        """Covariance of a target's inputs, (in, in), float64, or what stands for it."""
        leader = self.leader[name]
        return self._sketches[leader].sketch() if leader in self._sketches else self._C[leader]

    def leaders(self) -> dict[str, Tensor | CovarianceSketch]:
        """C so far of every target that does not share another's."""
        return {name: self.C(name) for name in self._last}

    def _add(self, target: Target, x: Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False), full_float32():
            rows = self._rows(target, x, 0.5)  # C has x twice
            if self._sketch is not None and target.n_in >= SKETCH_WIDTH * self._sketch:
                if target.name not in self._sketches:
                    self._sketches[target.name] = FrequentDirections(self._sketch, target.n_in, self._device(x))
                self._sketches[target.name].add(rows)
                return
            C = rows.T @ rows
            if target.name in self._C:
                self._C[target.name] += C.to(self._C[target.name].device)
            else:
                self._C[target.name] = C.to(self._device(x), torch.float64)

    def _device(self, x: Tensor) -> torch.device:
        return torch.device("cpu") if self._on_cpu else x.device

    def _offload(self) -> None:
        """Move what has been summed to the CPU."""
        self._on_cpu = True
        self._C = {name: C.cpu() for name, C in self._C.items()}
        for sketch in self._sketches.values():
            sketch.to("cpu")
        release_cached()
        warnings.warn(
            "the memory of the GPU does not hold the covariances of all targets beside the model: they are summed on the CPU, "
            "which takes longer; covariance_sketch makes them smaller",
            stacklevel=2,
        )

    def join_ranks(self, what: str) -> None:
        """C over what every process has seen; does nothing where there is one process.

        Raises:
            TargetError: processes disagree on which targets share an input.
        """
        if not ranks.active():
            return
        for leaders in ranks.exchange(what, self.leader):
            for name, leader in leaders.items():
                if self.leader.setdefault(name, leader) != leader:
                    raise TargetError(
                        f"{name} shares its input with {leader} in one process and with {self.leader[name]} in another; "
                        "their covariances cannot be added up"
                    )
        self.fired = set().union(*ranks.exchange(what, self.fired))
        self._C = ranks.summed(what, self._C, [t.name for t in self.targets])

    def _find_leader(self, name: str, x: Tensor) -> str:
        for other, reference in self._last.items():
            if self._block[other] == self._block[name] and reference() is x:
                return other
        return name

    def _attach(self, target: Target, module: nn.Linear) -> Any:
        name = target.name

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.paused:
                return
            x: Tensor = args[0]
            leader = self.leader.get(name)
            if leader is None:
                leader = self.leader[name] = self._find_leader(name, x)
            self.fired.add(name)
            if leader != name:
                if self._last[leader]() is not x:
                    raise TargetError(
                        f"{name} shared its input with {leader} in an earlier batch but not in this one; "
                        "their covariances cannot be kept as one"
                    )
                return
            self._last[name] = weakref.ref(x)
            try:
                self._add(target, x)
                return
            except torch.OutOfMemoryError:
                if self._on_cpu:  # it is the batch that is too large: `in_smaller_batches`
                    raise
            self._offload()
            self._add(target, x)

        return module.register_forward_pre_hook(hook)
