"""On which device layers are decomposed: on the GPU that a matrix lies on, or on the CPU's cores.

U₀ (M1), A (M4) and what joins U (M8, M8g) are functions of one layer's matrices. Where those are on a CUDA device, the matrices
are decomposed there, one layer after another, and what comes out goes to the CPU, where W₀, U and the records are kept: the GPU
holds one layer's work at a time and nothing from task to task. It is done on the main stream, for at a boundary nothing else is
to be computed meanwhile. What the GPU has no room for, or its solver fails at, is decomposed on the CPU.

The bits are those of the device. Nothing that a run goes on from is decomposed anew: U₀, A and the new directions are read from
the ledger and the checkpoint, and the smaller side of U follows from them on the CPU, whatever computed them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from keeplora.tuner import ranks
from keeplora.tuner.layerwise import over_layers
from keeplora.tuner.memory import first_line, full_float32, release_cached

T = TypeVar("T")
R = TypeVar("R")

CPU = torch.device("cpu")
FLOAT64 = ("cuda",)
"""Kinds of devices that decompose in float64; ROCm's are called so too. MPS has no float64."""
SHORT = ("CUSOLVER_STATUS_", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
"""What a GPU's libraries say where they have no memory for their own needs, or fail at a matrix."""


class LinearAlgebra:
    """Where a learner's layers are decomposed.

    Args:
        setting: `KeepLoraConfig.linear_algebra`: "auto", on the device of the matrix where it can; "cpu".

    >>> LinearAlgebra().device(torch.device("cuda", 1)), LinearAlgebra("cpu").device(torch.device("cuda", 1))
    (device(type='cuda', index=1), device(type='cpu'))
    >>> LinearAlgebra().device(torch.device("mps"))
    device(type='cpu')
    """

    def __init__(self, setting: str = "auto") -> None:
        self.setting = setting
        self._said = False

    def device(self, lies: torch.device) -> torch.device:
        """Where a matrix that lies on a device is decomposed."""
        return lies if self.setting == "auto" and lies.type in FLOAT64 else CPU

    def one(self, name: str, lies: torch.device, work: Callable[[torch.device], R]) -> R:
        """``work(device)``, and where a GPU fails at it ``work`` of the CPU, which is said once.

        Args:
            name: of the layer. lies: where its matrix is. work: brings what it needs to the device, and its result to the CPU;
                may be called twice.
        """
        device = self.device(lies)
        if device == CPU:
            return work(CPU)
        found = self._tried(name, device, work)
        return found[0] if found else work(CPU)

    def over_layers(
        self, work: Callable[[T, torch.device], R], layers: Sequence[T], lies: Callable[[T], torch.device]
    ) -> list[R]:
        """`one` for each of ``layers``: those of GPUs one after another, and then those of the CPU side by side.

        >>> LinearAlgebra().over_layers(lambda n, device: (n, str(device)), [1, 2], lambda n: CPU)
        [(1, 'cpu'), (2, 'cpu')]
        """
        done: dict[int, R] = {}
        for i, layer in enumerate(layers):
            device = self.device(lies(layer))
            if device == CPU:
                continue
            if found := self._tried(str(layer), device, lambda device, layer=layer: work(layer, device)):
                done[i] = found[0]
        left = [i for i in range(len(layers)) if i not in done]
        done |= dict(zip(left, over_layers(lambda i: work(layers[i], CPU), left), strict=True))
        return [done[i] for i in range(len(layers))]

    def spread(
        self, what: str, names: Sequence[str], work: Callable[[str, torch.device], T], lies: Callable[[str], torch.device]
    ) -> dict[str, T]:  # fmt: skip
        """`over_layers`, each layer on one rank and its result on all (`ranks.spread`)."""
        return ranks.spread(what, names, lambda mine: self.over_layers(work, mine, lies))

    def _tried(self, name: str, device: torch.device, work: Callable[[torch.device], R]) -> tuple[R] | None:
        """What ``work`` gives on a GPU, as a tuple of one; None where the GPU fails at it."""
        try:
            # What is compared in float32 is meant in full, whatever the model's own products are made with.
            with torch.autocast(device.type, enabled=False), full_float32():
                return (work(device),)
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
            told = first_line(error)
        except RuntimeError as error:
            if not any(word in str(error) for word in SHORT):
                raise
            told = first_line(error)
        release_cached()  # out here nothing holds what was being computed
        if not self._said:
            self._said = True
            warnings.warn(
                f"the GPU did not decompose {name} ({told}): this layer, and any other that it fails at, is decomposed on the "
                "CPU, which takes longer; linear_algebra: cpu decomposes all of them there",
                stacklevel=2,
            )
        return None
