"""The training step against stock PEFT LoRA and against its floor, and serving against the base model.

    python benchmarks/step.py                          # CLIP ViT-B/16, a 100 M LLaMA-style model, the demo's model
    python benchmarks/step.py llama --layers 2 --rounds 3
    python benchmarks/step.py clip llama --kept-only   # bytes alone: seconds, and the same on every machine

The arms of a model run in turn in one process, on one model, one batch and one rank:

- floor: forward pass, and the gradients of the activations down to the shallowest target; no weight has a gradient.
- lora: stock `peft.LoraConfig`, A and B train. ours: as `ContinualLearner` opens a task (A frozen, lean activations). Both with
  AdamW's step.
- peft: stock PEFT with A frozen and nothing else, which shows what the lean activations do.
- fused: `ours` with each linear and its adapter as one autograd function: a prototype that only this file has.

Kept: bytes that autograd holds for the backward pass, weights left out: the same on every machine. Peak: what a process of its
own takes at most beyond what it held with the model loaded (on CUDA: the allocator's peak, in this process). Time: CPU seconds of
the process with one thread, else seconds. Ratios are the median over the rounds of ratios of medians, [smallest, largest].
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import machine as bench
import torch
from peft import LoraConfig, get_peft_model
from step_works import WORKS, Work, prepared  # the sibling scripts: this folder is sys.path[0]
from torch import Tensor, nn

from keeplora.errors import KeepLoraError
from keeplora.experiment.environment import collect_environment
from keeplora.tuner.adapter import TaskAdapter, lora_config, random_factor
from keeplora.tuner.targets import Target
from keeplora.tuner.weights import WeightStore

# ---- the arms --------------------------------------------------------------------------------------------------------


class _AdaptedLinear(torch.autograd.Function):
    """y = W x + b + s B A x in one function: h = A x is all that it keeps, and neither sum takes a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        rows = x.flatten(0, -2)
        h = rows @ A.T
        ctx.save_for_backward(W, A, B, h)
        ctx.s, ctx.shape = s, x.shape
        return nn.functional.linear(rows, W, b).addmm_(h, B.T, alpha=s).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, h = ctx.saved_tensors
        g = g.reshape(-1, g.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ W).addmm_((g @ B).mul_(ctx.s), A).view(ctx.shape)
        return dx, None, None, None, (g.T @ h).mul_(ctx.s), None


def _fuse(model: nn.Module, targets: Sequence[Target]) -> None:
    for target in targets:
        layer: Any = model.get_submodule(target.name)
        W, b, s = layer.base_layer.weight, layer.base_layer.bias, layer.scaling["default"]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.forward = lambda x, W=W, b=b, A=A, B=B, s=s: _AdaptedLinear.apply(x, W, b, A, B, s)


def _asks_for_gradient(module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
    return None if y.requires_grad else y.detach().requires_grad_(True).clone()


@contextlib.contextmanager
def opened(arm: str, work: Work) -> Iterator[list[nn.Parameter]]:
    """The model as the arm trains it; gives the parameters that train. Afterwards the model is as it was."""
    model, targets = work.model, work.targets
    model.requires_grad_(False)
    with contextlib.ExitStack() as stack:
        if arm == "floor":
            for t in targets:
                stack.callback(model.get_submodule(t.name).register_forward_hook(_asks_for_gradient).remove)
        elif arm == "lora":
            ranks = {t.name: t.r for t in targets}
            settings = lora_config(targets, ranks)
            assert isinstance(settings, LoraConfig)
            stack.callback(get_peft_model(model, settings).unload)
        else:
            generator = torch.Generator().manual_seed(0)
            A = {t.name: torch.linalg.qr(random_factor(t, generator).T).Q.T.contiguous() for t in targets}
            adapter = TaskAdapter(model, targets, A)
            stack.callback(adapter.remove)
            if arm == "peft":
                adapter._restore_activations()
            if arm == "fused":
                _fuse(model, targets)
        yield [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)


def make_step(work: Work, parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3) if parameters else None

    def step() -> None:
        work.loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---- what is measured ------------------------------------------------------------------------------------------------


def clock(device: torch.device, cpu: bool | None = None) -> float:
    """Seconds, once a GPU is done. ``cpu``: of the processor; None: where that says what a step costs.

    On a machine that others use as well, CPU time does; with several threads it is no measure.
    """
    if cpu is None:
        cpu = device.type == "cpu" and torch.get_num_threads() == 1
    return bench.now(cpu=cpu)


def times(
    work: Work, arms: Sequence[str], rounds: Iterable[int], steps: int, device: torch.device, cpu: bool | None = None
) -> dict[str, list[float]]:
    """Seconds of a step per arm and round: the median of ``steps``, after one that is not counted."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    shuffled = list(arms)
    for _ in rounds:
        random.shuffle(shuffled)
        for arm in shuffled:
            with opened(arm, work) as parameters:
                step, taken = make_step(work, parameters), []
                for i in range(steps + 1):
                    start = clock(device, cpu)
                    step()
                    if i:
                        taken.append(clock(device, cpu) - start)
            found[arm].append(median(taken))
            gc.collect()
    return found


def peak_bytes(work: Work, arm: str, device: torch.device) -> int:
    """What two steps take at most beyond what was held before them."""
    gc.collect()
    with opened(arm, work) as parameters:
        step = make_step(work, parameters)
        before = bench.begin_peak(device)
        step()
        step()
        return bench.peak_since(before, device)


def peaks(work: Work, arms: Sequence[str], options: argparse.Namespace) -> dict[str, int]:
    """`peak_bytes` per arm, on the CPU in a process of its own each."""
    if options.device.type == "cuda":
        return {arm: peak_bytes(work, arm, options.device) for arm in arms}
    found = {}
    for arm in arms:
        command = [sys.executable, __file__, work.name, "--peak-of", arm, "--threads", str(options.threads)]
        for name in ("layers", "batch", "rank"):
            if (value := getattr(options, name)) is not None:
                command += [f"--{name}", str(value)]
        out = subprocess.run([*command, "--dtype", options.dtype], check=True, capture_output=True, text=True).stdout
        found[arm] = int(json.loads(out.splitlines()[-1]))
    return found


def ratio(values: Sequence[float], to: Sequence[float]) -> str:
    each = [a / b for a, b in zip(values, to, strict=True)]
    return f"{median(each):.3f} [{min(each):.3f}, {max(each):.3f}]"


def serving(work: Work, rounds: Iterable[int], device: torch.device, cpu: bool | None = None) -> dict[str, list[float]]:
    """Seconds of a forward pass per round: of the model before ("base"), with a learned task merged, and beside stock LoRA.

    A merged model must have the base model's modules, no hook and no replaced forward, which is checked.
    """
    model, targets = work.model, work.targets
    shape = [(name, type(m)) for name, m in model.named_modules()]
    store = WeightStore(model, [t.name for t in targets])
    with opened("ours", work) as parameters:
        step = make_step(work, parameters)
        step()
        learned = {t.name: layer_factors(model, t) for t in targets}
    found: dict[str, list[float]] = {"base": [], "merged": [], "lora": []}
    for _ in rounds:
        for state in ("base", "merged"):
            store.restore({} if state == "base" else learned)
            assert [(name, type(m)) for name, m in model.named_modules()] == shape
            assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
            found[state].append(_forward_seconds(work, device, cpu))
        store.restore({})
        with opened("lora", work):
            found["lora"].append(_forward_seconds(work, device, cpu))
    return found


@torch.no_grad()
def _forward_seconds(work: Work, device: torch.device, cpu: bool | None) -> float:
    """Median of three passes, after one that is not counted."""
    taken = []
    for _ in range(4):
        start = clock(device, cpu)
        work.infer()
        taken.append(clock(device, cpu) - start)
    return median(taken[1:])


def layer_factors(model: nn.Module, target: Target) -> Any:
    from keeplora.tuner.adapter import Factors

    layer: Any = model.get_submodule(target.name)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Factors(A.detach().float().cpu().clone(), B.detach().float().cpu().clone(), target.s)


# ---- the whole -------------------------------------------------------------------------------------------------------


def table(work: Work, options: argparse.Namespace) -> Iterator[str]:
    arms = ["floor", "lora", "peft", "ours"] + (["fused"] if options.fused else [])
    kept = {}
    for arm in arms:
        with opened(arm, work):
            kept[arm] = bench.kept_bytes(work.loss, work.model)
    yield f"\n**{work.name}**: rank {work.targets[0].r}, {len(work.targets)} linears, {options.dtype}\n"
    if options.kept_only:
        yield "| arm | kept, MB | × lora | × floor |\n|---|---|---|---|"
        for arm in arms:
            yield f"| {arm} | {kept[arm] / 1e6:.1f} | {kept[arm] / kept['lora']:.3f} | {kept[arm] / kept['floor']:.3f} |"
        return
    peak = peaks(work, arms, options)
    taken = times(work, arms, range(options.rounds), options.steps, options.device)
    yield "| arm | step, ms | × lora | × floor | kept, MB | × lora | × floor | peak, MB | × lora | × floor |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for arm in arms:
        memory = [
            f"{values[arm] / 1e6:.1f} | {values[arm] / values['lora']:.3f} | {values[arm] / values['floor']:.3f}"
            for values in (kept, peak)
        ]
        told = (
            f"{median(taken[arm]) * 1e3:.0f} | {ratio(taken[arm], taken['lora'])} | {ratio(taken[arm], taken['floor'])}"
        )
        yield f"| {arm} | {told} | {memory[0]} | {memory[1]} |"
    served = serving(work, range(options.rounds), options.device)
    yield f"\nforward pass, merged / base: {ratio(served['merged'], served['base'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=f"any of {', '.join(WORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="how often each arm has its turn")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--layers", type=int, help="blocks of clip and llama; default 12")
    parser.add_argument("--batch", type=int, help="pictures or sequences")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "autocast", "bf16"), default="fp32", help="autocast: to bf16")
    parser.add_argument("--fused", action="store_true", help="with the prototype")
    parser.add_argument("--kept-only", action="store_true", help="only the bytes that are kept for the backward pass")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.models) - WORKS.keys():
        parser.error(f"no model is called {min(unknown)!r}; choose among {', '.join(WORKS)}")
    torch.set_num_threads(options.threads)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random.seed(0)
    if options.peak_of:
        work = prepared(options.models[0], options)
        print(peak_bytes(work, options.peak_of, options.device))
        return
    machine = collect_environment()
    print(json.dumps({key: machine[key] for key in ("cpu", "torch", "versions", "git")}))
    for name in options.models or WORKS:
        try:
            work = prepared(name, options)
        except KeepLoraError as error:
            print(f"\n{name}: left out, {error}")
            continue
        for line in table(work, options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
