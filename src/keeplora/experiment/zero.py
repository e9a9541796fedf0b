"""DeepSpeed under ``accelerate launch --use_deepspeed``: what the launcher asks for, and the optimiser's state in parts (ZeRO-2).

Of ZeRO, stage 2 divides gradients and the optimiser's state of what trains, and stage 3 the weights as well. Here what trains
is small and whole in every process, so that ledger, checkpoints and results are those of any other run: every process has the
gradient of the whole batch (`keeplora.experiment.training_step.add_up`), hands it to DeepSpeed's optimiser, and DeepSpeed
keeps one part in n of it, of the moments, and of the float32 values that it steps. Stage 3 does that, and divides the base's
blocks (`keeplora.tuner.zero3`).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keeplora.errors import ConfigError
from keeplora.tuner import ranks

_ASKED = "ACCELERATE_USE_DEEPSPEED"
_NONE = (None, "none", "auto", False, 0, 0.0)
_REFUSED = {
    "zero_optimization.offload_param.device": "offload of weights: they stay on the devices that compute",
    "zero_optimization.offload_optimizer.device": "offload of the optimiser: what trains here is small",
    "zero_optimization.zero_hpz_partition_size": "zero_hpz_partition_size: weights are divided over all processes",
    "zero_optimization.mics_shard_size": "mics_shard_size: weights are divided over all processes",
    "zero_optimization.zero_quantized_weights": "zero_quantized_weights: weights are sent as they are",
    "zero_optimization.zero_quantized_nontrainable_weights": "zero_quantized_nontrainable_weights: weights are sent as they are",
    "zero_optimization.zero_quantized_gradients": "zero_quantized_gradients: gradients are sent as they are",
    "fp16.enabled": "fp16.enabled: set training.precision, or model.dtype",
    "bf16.enabled": "bf16.enabled: set training.precision, or model.dtype",
    "gradient_accumulation_steps": "gradient_accumulation_steps: set training.batch_size, of the whole batch, and micro_batch",
    "gradient_clipping": "gradient_clipping: set training.grad_clip",
    "optimizer": "an optimizer section: set training.learning_rate and training.weight_decay",
    "scheduler": "a scheduler section: set training.schedule",
}
"""What of DeepSpeed's configuration would change a run's numbers or memory and is not followed, and what to do instead."""
_NOTHING = {
    "gradient_accumulation_steps": 1, "zero_optimization.zero_hpz_partition_size": 1, "zero_optimization.mics_shard_size": -1,
}  # fmt: skip
"""Further values that ask for nothing."""


def said(key: str) -> bool:
    """Whether an environment variable of the launcher says yes."""
    return os.environ.get(key, "").lower() in ("true", "1")


def stage() -> int:
    """The stage that the launcher asks for, of several processes; 0: it does not ask for DeepSpeed."""
    return int(settings()["zero_optimization"]["stage"]) if said(_ASKED) and ranks.active() else 0


def settings() -> dict[str, Any]:
    """DeepSpeed's configuration as accelerate reads it, from its flags, its own file, or a file of DeepSpeed's.

    Raises:
        ConfigError: it cannot be read.
    """
    from accelerate import DeepSpeedPlugin

    try:
        return copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the launcher's DeepSpeed configuration cannot be read: {error}") from None


def _at(config: Mapping[str, Any], path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def check_launcher() -> None:
    """Refuse what the launcher asks of DeepSpeed and a run does not do; does nothing where it does not ask for DeepSpeed.

    Raises:
        ConfigError: DeepSpeed is not installed, its configuration cannot be read, or holds what is not followed.
    """
    if not said(_ASKED):
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'the launcher asks for DeepSpeed, which is not installed: `pip install "keeplora[deepspeed]"`, or launch with '
            "--use_fsdp --fsdp_version 2, which shards the base as well"
        )
    config = settings()
    if (asked := _at(config, "zero_optimization.stage")) not in (2, 3):
        raise ConfigError(
            f"the launcher asks for ZeRO stage {asked}: add --zero_stage 2 or --zero_stage 3, or leave DeepSpeed out"
        )
    for path, told in _REFUSED.items():
        if (value := _at(config, path)) in _NONE or value == _NOTHING.get(path):
            continue
        raise ConfigError(f"`keeplora run` does not follow DeepSpeed's {told}; leave it out")


def join(device: torch.device) -> None:
    """Let DeepSpeed use the process group that is there."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU that this run leaves alone
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it sets its own when it is imported
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


def config_of(stage: int, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's configuration for what is used of it: it makes no batches, clips nothing, and prints nothing."""
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 2**62,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
    }  # fmt: skip


class ZeroOptimizer(torch.optim.Optimizer):
    """Another optimiser, of whose state, gradient and float32 values each process keeps one part in n (DeepSpeed ZeRO-2).

    To a training loop it is that optimiser: rates are set in ``param_groups``, and `step` reads ``p.grad``, which must be the
    same in all processes. `step`, `moments` and `load_state_dict` are called in all processes at once. A parameter without
    a gradient takes part with a gradient of zero.

    Args:
        parameters: what trains, float32, whole in every process. While this optimiser lives their memory is DeepSpeed's.
        make: the optimiser of parameters, of one group.

    Raises:
        ConfigError: a parameter is not float32.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        deepspeed: Any = importlib.import_module("deepspeed")
        if any(p.dtype != torch.float32 for p in parameters):
            raise ConfigError(
                "DeepSpeed divides the optimiser of float32 parameters alone, and this method trains weights of "
                f"{next(str(p.dtype) for p in parameters if p.dtype != torch.float32).removeprefix('torch.')}: load the model in "
                "float32 (model.dtype), or launch without --use_deepspeed"
            )
        # DeepSpeed gets parameters of its own, on the same memory: its hooks divide a gradient as soon as it is there, in each
        # process in the order of its backward pass, which differs where one has pictures and another none.
        self._stepped = nn.ParameterList(nn.Parameter(p.data) for p in parameters)
        self._inner = make(list(self._stepped))
        super().__init__(parameters, dict(self._inner.defaults))
        (group,) = self._inner.param_groups
        self.param_groups[0] |= {key: value for key, value in group.items() if key != "params"}
        # DeepSpeed would put 2 GB aside to collect gradients in.
        total = sum(p.numel() for p in parameters)
        self._engine, *_ = deepspeed.initialize(
            model=self._stepped,
            optimizer=self._inner,
            config=config_of(2, reduce_bucket_size=total, overlap_comm=False),
        )
        (self._part,) = self._engine.optimizer.single_partition_of_fp32_groups
        self._share()

    def _share(self) -> None:
        for p, stepped in zip(self._parameters, self._stepped, strict=True):
            p.data = stepped.data

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step by ``p.grad``."""
        self._inner.param_groups[0] |= {key: value for key, value in self.param_groups[0].items() if key != "params"}
        with torch.enable_grad():
            handed = [
                torch.dot(s.view(-1), (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1))
                for s, p in zip(self._stepped, self._parameters, strict=True)
            ]  # the gradient of s · g by s is g
            self._engine.backward(torch.stack(handed).sum())
        self._engine.step()
        self._share()

    def moments(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The state of every parameter, put together on the CPU."""
        found: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for p in self._parameters}
        for key, value in self._inner.state.get(self._part, {}).items():
            if isinstance(value, Tensor) and value.shape == self._part.shape:
                whole = ranks.gathered("a checkpoint", value, [value.numel()] * ranks.size())
                for p, piece in zip(found, self._cut(whole), strict=True):
                    found[p][key] = piece
            elif value is not None:
                for p in found:
                    found[p][key] = torch.as_tensor(value).clone()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What any other optimiser of these parameters gave; also takes the parameters' values as they are now."""
        group, moments = state_dict["param_groups"][0], state_dict["state"]
        self.param_groups[0] |= {key: value for key, value in group.items() if key != "params"}
        self._part.data.copy_(self._own({i: p.detach() for i, p in enumerate(self._parameters)}))
        state = self._inner.state[self._part]
        state.clear()
        for key in dict.fromkeys(key for own in moments.values() for key in own):
            held = {i: own[key] for i, own in moments.items() if key in own}
            if all(value.shape == self._parameters[i].shape for i, value in held.items()):
                state[key] = self._own(held)
            else:
                state[key] = next(iter(held.values())).clone()

    def _cut(self, whole: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._parameters]
        return [piece.reshape(p.shape).clone() for p, piece in zip(self._parameters, whole[: sum(sizes)].split(sizes))]

    def _own(self, values: Mapping[int, Tensor]) -> Tensor:
        """This process's part of the values of all parameters, one after another; those that lack are zero."""
        whole = torch.zeros(self._part.numel() * ranks.size(), device=self._part.device)
        at = 0
        for i, p in enumerate(self._parameters):
            if i in values:
                whole[at : at + p.numel()] = values[i].to(whole.device).reshape(-1)
            at += p.numel()
        start = self._part.numel() * ranks.rank()
        return whole[start : start + self._part.numel()].clone()

    def close(self) -> None:
        """Give the parameters memory of their own again."""
        for p in self._parameters:
            p.data = p.data.clone()
        self._engine.destroy()


def moments(optimizer: torch.optim.Optimizer) -> Mapping[Any, Mapping[str, Any]]:
    """An optimiser's state by parameter; of one whose state is divided in all processes at once."""
    return optimizer.moments() if isinstance(optimizer, ZeroOptimizer) else optimizer.state
