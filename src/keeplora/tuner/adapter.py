"""A task's adapter: stock PEFT, put in and taken out, with A held still while it is there."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from keeplora.errors import KeepLoraError
from keeplora.math import lora_delta
from keeplora.tuner.activations import lean_activations
from keeplora.tuner.sharding import is_sharded, settle, shard_update, whole
from keeplora.tuner.targets import Target

if TYPE_CHECKING:
    from keeplora.tuner.weights import WeightStore

ADAPTER = "default"


@dataclass(frozen=True)
class Factors:
    """ΔW = s B A of one layer: A (r', in), B (out, r'), float32 on the CPU."""

    A: Tensor
    B: Tensor
    s: float

    @property
    def delta(self) -> Tensor:
        return lora_delta(self.s, self.B, self.A)

    def numel(self) -> int:
        """Entries of A and B."""
        return self.A.numel() + self.B.numel()


def concatenate(parts: Sequence[Factors]) -> Factors | None:
    """Σ_t s_t B_t A_t as one pair of factors, exactly: A stacked, s_t B_t side by side, s = 1; None of none.

    >>> f = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]), 0.5)
    >>> both = concatenate([f, f])
    >>> both.A.shape, both.delta.tolist()
    (torch.Size([2, 2]), [[2.0, 0.0]])
    """
    if not parts:
        return None
    return Factors(torch.cat([f.A for f in parts]), torch.cat([f.s * f.B for f in parts], dim=1), 1.0)


def random_factor(target: Target, generator: torch.Generator) -> Tensor:
    """A as plain LoRA starts it: Kaiming-uniform with a = √5, that is U(−1/√in, 1/√in), (min(r, in, out), in)."""
    rank = min(target.r, target.n_in, target.n_out)
    bound = 1 / math.sqrt(target.n_in)
    return torch.empty(rank, target.n_in).uniform_(-bound, bound, generator=generator)


def lora_config(targets: Sequence[Target], ranks: Mapping[str, int]) -> LoraConfig:
    """The stock config of an adapter: a rank and an alpha per layer.

    Patterns match whole names alone: PEFT takes a listed name, and an unanchored key, as a suffix of longer names too.
    """
    adapted = [t for t in targets if ranks.get(t.name, 0) > 0]
    r = max(ranks[t.name] for t in adapted)
    return LoraConfig(
        r=r, lora_alpha=r, target_modules="|".join(re.escape(t.name) for t in adapted), lora_dropout=0.0, bias="none",
        init_lora_weights=True, rank_pattern={f"^{t.name}": ranks[t.name] for t in adapted if ranks[t.name] != r},
        alpha_pattern={f"^{t.name}": t.alpha(ranks[t.name]) for t in adapted},
    )  # fmt: skip


class ParameterState:
    """Which parameters of a model required a gradient, and the gradients they held, to come back to with `restore`."""

    def __init__(self, model: nn.Module) -> None:
        self._state = {p: (p.requires_grad, p.grad) for p in model.parameters()}

    def restore(self) -> None:
        for p, (flag, grad) in self._state.items():
            p.requires_grad_(flag)
            p.grad = grad


def _forward_hooks(model: nn.Module) -> set[tuple[nn.Module, int]]:
    return {(module, key) for module in model.modules() for key in module._forward_hooks}


def _never_reenters(model: nn.Module) -> bool:
    """Whether blocks are checkpointed, and every one of them without reentrance; what is not known counts as no."""
    functions = [
        getattr(m, "_gradient_checkpointing_func", None)
        for m in model.modules() if getattr(m, "gradient_checkpointing", False)
    ]  # fmt: skip
    return bool(functions) and all(getattr(f, "keywords", {}).get("use_reentrant") is False for f in functions)


class TaskAdapter:
    """One task's adapter while it is in the model.

    ``trainable_A = False`` (KeepLoRA, M4–M5) freezes A, freezes it again before every optimiser step of the process
    (PEFT thaws it on `set_adapter` and `disable_adapter`), and refuses the step when its values have changed.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], A: Mapping[str, Tensor], *, trainable_A: bool = False,
        shard: bool = True,
    ) -> None:  # fmt: skip
        self.targets = {t.name: t for t in targets if A.get(t.name) is not None and A[t.name].shape[0] > 0}
        self.A0 = {name: A[name].to(torch.float32) for name in self.targets}
        self.trainable_A = trainable_A
        self.model = model
        self._state = ParameterState(model)
        ranks = {name: a.shape[0] for name, a in self.A0.items()}
        hooks = _forward_hooks(model)
        peft_model = get_peft_model(model, lora_config(targets, ranks), adapter_name=ADAPTER)
        assert isinstance(peft_model, PeftModel)
        self.peft_model = peft_model
        # Where gradient checkpointing is on, PEFT hooks the embeddings so that they ask for gradients, and `unload` leaves
        # the hooks there. Only reentrant checkpoints need them; others would run backwards, and compute again, what lies
        # below the shallowest target.
        self._peft_hooks = _forward_hooks(model) - hooks
        if _never_reenters(model):
            self._drop_hooks()
        self._layers: dict[str, Any] = {name: model.get_submodule(name) for name in self.targets}
        with torch.no_grad():
            for name, layer in self._layers.items():
                layer.lora_A[ADAPTER].weight.copy_(self.A0[name])
                scaling, s = layer.scaling[ADAPTER], self.targets[name].s
                if not math.isclose(scaling, s, rel_tol=1e-9, abs_tol=1e-12):
                    raise RuntimeError(f"PEFT scales {name} by {scaling}, not by s = {s}")
        if shard:
            for layer in self._layers.values():
                shard_update(layer.base_layer.weight, layer.lora_B[ADAPTER])
                if trainable_A:
                    shard_update(layer.base_layer.weight, layer.lora_A[ADAPTER])
        self._versions = {name: self._weight_A(name)._version for name in self._layers}
        self._handle = None
        if not trainable_A:
            self.freeze_A()
            me = weakref.ref(self)  # the hook outlives a task that is left open; it must not keep the model alive

            def before_step(optimizer: Optimizer, *_: Any) -> None:
                if (adapter := me()) is not None:
                    adapter._before_step(optimizer)

            self._handle = register_optimizer_step_pre_hook(before_step)
            weakref.finalize(self, self._handle.remove)
        self._restore_activations = lean_activations(model)

    def _drop_hooks(self) -> None:
        for module, key in self._peft_hooks:
            module._forward_hooks.pop(key, None)

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The live (A, B) of a target that is adapted."""
        layer = self._layers[name]
        return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    def _weight_A(self, name: str) -> nn.Parameter:
        return self.weights(name)[0]

    def freeze_A(self) -> None:
        """Freeze every A again."""
        for name in self._layers:
            A = self._weight_A(name)
            A.requires_grad_(False)
            A.grad = None

    def check_A(self, *, thorough: bool = False) -> None:
        """`KeepLoraError` if an A no longer holds the values it was set to.

        Values are compared where torch counted a write, and with ``thorough`` everywhere (``A.data`` is not counted).
        """
        for name in self._layers:
            A = self._weight_A(name)
            written = thorough or A._version != self._versions[name]
            if written and not torch.equal(whole(name, A).float(), self.A0[name]):
                raise KeepLoraError(
                    f"A of {name} was changed during the task: it must stay as it was set, or the update leaves the "
                    "residual space; train only the parameters that require a gradient"
                )
            self._versions[name] = A._version

    def _before_step(self, optimizer: Optimizer) -> None:
        self.freeze_A()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in self.model.parameters()):  # another model's optimiser is no place to complain
            self.check_A()

    @torch.no_grad()
    def largest_update(self, store: WeightStore, norms: dict[str, float]) -> tuple[str, float]:
        """(layer, ‖s B A‖_F / ‖W₀‖_F) where that is largest; ‖W₀‖_F is kept in ``norms``.

        ‖B A‖_F² = Σ (BᵀB ∘ A Aᵀ), two r × r products: the update itself is never formed.
        """
        found, sharded = [], is_sharded(self.model)
        for name in self._layers:
            if name not in norms:
                norms[name] = float(store.W0[name].to(torch.float32).norm()) or 1e-30
            A, B = ((whole(name, w) if sharded else w).to(torch.float32) for w in self.weights(name))
            squared = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0.0)
            ratio = squared.sqrt() * (self.targets[name].s / norms[name])
            found.append(ratio.to(found[0].device) if found else ratio)  # a device map has layers on several
        ratios = torch.stack(found).tolist()
        i = max(range(len(ratios)), key=ratios.__getitem__)
        return list(self._layers)[i], ratios[i]

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.peft_model.parameters() if p.requires_grad]

    def factors(self) -> dict[str, Factors]:
        """Trained factors per layer; checks that a frozen A is still what it was."""
        settle(self.model)
        # Sharded ones are put together by all processes: nothing may fail in one of them before.
        values = {
            name: [whole(name, w).to(torch.float32, copy=True) for w in self.weights(name)] for name in self._layers
        }
        if not self.trainable_A:
            self.check_A(thorough=True)
        out = {}
        for name in self._layers:
            A, B = values[name]
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise FloatingPointError(f"the trained factors of {name} hold NaN or infinity; nothing is merged")
            out[name] = Factors(A, B, self.targets[name].s)
        return out

    def remove(self) -> None:
        """Take the adapter out; modules, ``requires_grad`` flags and gradients are as they were before."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._restore_activations()
        self.peft_model.unload()
        self._drop_hooks()
        self._state.restore()
