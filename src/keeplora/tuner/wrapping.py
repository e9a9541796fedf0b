"""What an engine does to the model within a task (FSDP2's ``fully_shard``, DeepSpeed ZeRO-3, accelerate with either), undone.

These engines change the modules and parameters that they are given. A learner that was given a whole model takes back a whole
model: the trained values are put together from all processes and go into the parameters that were there before, and everything
else is as it was. The parameters' own memory stays where it is during the task, so nothing of the base has to be sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.tuner.sharding import is_sharded, settle, whole


class Wrapping:
    """The model as it is handed to a training loop, to come back to with `undo`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [(m, type(m), _copied(vars(m))) for m in model.modules()]
        # `p.data` is another tensor on the same memory, which it keeps: engines put another in its place.
        self._parameters = [(name, p, p.data, dict(vars(p)), p.requires_grad) for name, p in model.named_parameters()]

    def undo(self, *, keep_trained: bool) -> None:
        """Give the model back whole, where an engine has sharded it; does nothing where none has.

        Args:
            keep_trained: put what was trained into it, in all processes at once; False: values of before the task.

        Raises:
            KeepLoraError: a parameter that trains is gone from the model.
        """
        if not is_sharded(self._model):
            return
        settle(self._model)
        trained = self._trained() if keep_trained else {}
        for module, kind, state in self._modules:
            training = module.training
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(_copied(state))
            module.training = training
            _forget_state(module)
        for name, p, data, state, flag in self._parameters:
            vars(p).clear()
            vars(p).update(state)
            p.data = data
            p.requires_grad_(flag)
            p.grad = None
            if name in trained:
                with torch.no_grad():
                    p.copy_(trained[name])

    def _trained(self) -> dict[str, Tensor]:
        """The values of what trains, and of the factors beside it, which are checked not to have."""
        now, found = {_plain(name): p for name, p in self._model.named_parameters()}, {}
        for name, _, _, _, flag in self._parameters:
            if flag or ".lora_" in name:
                if name not in now:
                    raise KeepLoraError(
                        f"{name} is gone from the model that start_task returned: what it learned is lost"
                    )
                found[name] = whole(name, now[name])
        return found


def wrapping_of(model: nn.Module) -> Wrapping | None:
    """Of a model that may be wrapped: one that is whole, where there is a process group (of one process, even)."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Wrapping(model) if there and not is_sharded(model) else None


def unwrap(wrapping: Wrapping | None, *, keep_trained: bool) -> None:
    """`Wrapping.undo`, where there is one."""
    if wrapping is not None:
        wrapping.undo(keep_trained=keep_trained)


def _plain(name: str) -> str:
    """A parameter's name without those of wrappers around modules."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module, its tables of parameters, buffers, children and hooks copied."""
    return {
        key: value.copy() if isinstance(value, dict) and key.startswith("_") else value for key, value in state.items()
    }


def _forget_state(module: nn.Module) -> None:
    # torch remembers beside the module, too, that fully_shard was applied, and would refuse the next task's.
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)
