"""What the benchmarks share: the machine's name, clocks, memory, medians and ratios, on a CPU and on a GPU."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
HOST = torch.device("cpu")


def machine() -> str:
    """Processor, threads, torch, GPU: a line that goes above a table."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    gpu = ""
    if torch.cuda.is_available():
        tf32 = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
        gpu = f", {torch.cuda.get_device_name()} (CUDA {torch.version.cuda}, TF32 {tf32})"
    return (
        f"{name}{gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )


def reset_peak() -> bool:
    """Forget the process's peak of resident memory so far; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(key: str = "VmRSS") -> int:
    """Bytes of resident memory now, or with "VmHWM" at the peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def synchronise() -> None:
    """Wait for what a GPU was given to do, where this process has used one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def now(*, cpu: bool = False) -> float:
    """Seconds of a clock, once a GPU's work is done. ``cpu``: of the processor, over all threads."""
    synchronise()
    return time.process_time() if cpu else time.perf_counter()


def timed(work: Callable[[], T], *, cpu: bool = False) -> tuple[float, T]:
    """(seconds, what ``work`` returned). ``cpu``: of the processor, over all threads: for a machine that does other work as well,
    with one thread."""
    started = now(cpu=cpu)
    found = work()
    return now(cpu=cpu) - started, found


def begin_peak(device: torch.device) -> int:
    """Bytes held now, from which `peak_since` counts: of the GPU's allocator, or resident; 0 where the system forgets no peak."""
    if device.type == "cuda":
        synchronise()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident() if reset_peak() else 0


def peak_since(before: int, device: torch.device) -> int:
    """Bytes held at most beyond ``before``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return resident("VmHWM") - before


def kept_bytes(loss: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd holds for the backward pass of ``loss()``, each storage once, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    total = sum(t.untyped_storage().nbytes() for t in held.values())
    value.backward()
    return total


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (least–most)``.

    >>> spread([3.0, 1.0, 2.0])
    '2.00 (1.00–3.00)'
    """
    middle = f"{statistics.median(values):.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else middle


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Run by run, ours over theirs."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
