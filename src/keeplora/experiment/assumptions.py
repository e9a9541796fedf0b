"""What a dry run must be told where nothing can be measured: `keeplora run --dry-run --assume NAME=VALUE`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from keeplora.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Assumptions:
    """What neither the configuration nor config.json can tell; each is set by ``--assume NAME=VALUE``.

    Attributes:
        tokens: T, a sample in the language model, picture, question and answer. image_tokens: of those, the picture's;
            0: config.json's image_seq_length, else tokens. answer_tokens: of an answer, trained on and generated.
        samples, test_samples: of each task, where its data is not there.
        k: columns of U as a share of in, where one number is needed; the truth is known once U₀ has been decomposed.
        tflops: speed of the model's own products, in 10¹² operations per second. fp32_tflops: of the float32 products that
            form G and C. host_gflops: float64 speed of the CPU, in 10⁹, for SVD and eigh.
        bandwidth: of the device's memory, in GB per second. disk: of reading and writing files, likewise.
        tasks: how many the phases are told for; 0: those of the configuration. growth: what a task adds to U, as a share of in.
    """

    tokens: int = 700
    image_tokens: int = 0
    answer_tokens: int = 20
    samples: int = 10_000
    test_samples: int = 1_000
    k: float = 0.5
    tflops: float = 100.0
    fp32_tflops: float = 15.0
    host_gflops: float = 200.0
    bandwidth: float = 1_500.0
    disk: float = 1.0
    tasks: int = 0
    growth: float = 0.001

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> Assumptions:
        """
        >>> Assumptions.parse(["tokens=900", "tflops=60"]).tokens
        900
        """
        return replace(cls(), **cls.parse_values(pairs))

    @classmethod
    def parse_values(cls, pairs: Sequence[str]) -> dict[str, int | float]:
        """Only what is given. Raises `ConfigError`: a name that is not there, or a value out of range."""
        kinds = {f.name: type(f.default) for f in fields(cls)}
        out: dict[str, int | float] = {}
        for pair in pairs:
            name, _, text = pair.partition("=")
            if name not in kinds:
                raise ConfigError(f"--assume {pair}: there is no {name!r}{did_you_mean(name, kinds)}")
            try:
                value: Any = kinds[name](text)
            except ValueError:
                value = -1
            least = 0 if name in ("image_tokens", "tasks") else 1 if kinds[name] is int else 1e-9
            if not least <= value < math.inf or (name in ("k", "growth") and value > 1):
                what = (
                    "a share up to 1"
                    if name in ("k", "growth")
                    else f"a {'whole ' if kinds[name] is int else ''}number above 0"
                )
                raise ConfigError(
                    f"--assume {pair}: {name} must be {what}, for example {name}={kinds[name](getattr(cls, name))}"
                )
            out[name] = value
        return out
