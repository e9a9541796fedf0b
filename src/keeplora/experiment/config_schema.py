"""What an experiment's configuration may hold: every key, its type and its range. `config.load_config` fills it in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from keeplora.experiment.config_checks import config_problems
from keeplora.experiment.config_fields import (
    DEFAULT_KEY,
    Bytes,
    Count,
    CountPer,
    DataSpec,
    Modules,
    Positive,
    PositivePer,
    Samples,
    SchedulePer,
    SharePer,
    ValidationPer,
    pick,
)
from keeplora.experiment.config_generation import GenerationConfig, PartsConfig, Section, TokenWeightsConfig
from keeplora.experiment.config_judge import JudgeConfig
from keeplora.experiment.config_video import VideoConfig
from keeplora.experiment.presets import preset_values
from keeplora.files import expand


def variant_of(method: str) -> str | None:
    """The variant that a method's name ends in.

    >>> variant_of("keeplora++-cls"), variant_of("keeplora++")
    ('cls', None)
    """
    return "cls" if method.endswith("-cls") else None


class ModelConfig(Section):
    """Which pretrained model."""

    name: str = Field(min_length=1, description="'embedded', a Hugging Face name or a local folder")
    image_size: int | None = Field(
        default=None, ge=1, description="side of the square input in pixels; None: the model's own"
    )
    revision: str | None = Field(default=None, description="commit, tag or branch of a Hugging Face name")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="of the weights of a generative model; auto: fp32 on the CPU, bf16 on a GPU that has it",
    )
    quantize: Literal["8bit", "4bit"] | None = Field(
        default=None, description="hold a generative model's base in 8 or 4 bits; it is never merged"
    )
    max_length: int | None = Field(
        default=None, ge=1, description="most tokens of a conversation; None: the model's own limit"
    )


class TunerConfig(Section):
    """KeepLoRA's own settings. The keys of a mapping are towers ("vision", "text"), module prefixes or "default"."""

    target_modules: Modules | None = Field(
        default=None, description="suffixes of the linears to adapt, or one pattern; None: the family's q, k, v, o"
    )
    exclude_modules: Modules | None = Field(default=None, description="modules left out of the targets; same forms")
    r: CountPer = Field(description="rank, at least 1")
    lora_alpha: Positive = Field(description="s = layer_scale * lora_alpha / r")
    energy_weights: SharePer = Field(description="energy of W to protect (M1), 0 to 1")
    energy_features: SharePer = Field(description="energy of the features to protect (M8), 0 to 1")
    energy_general: SharePer = Field(
        default=0.0,
        description="energy of the features of drawn pictures that a task's update leaves alone, 0 to 1; picture towers alone",
    )
    gamma: SharePer = Field(description="scale of the shallowest block (M6), 0 to 1; 1 is KeepLoRA")
    schedule: SchedulePer = Field(description="linear (M6), constant, or a list with one scale per block")
    memory: Literal["features", "gradients"] = Field(description="what is protected after a task: M8 or M8g")
    gradient_samples: Samples | None = Field(
        default=None, description="cap on the samples of G: a number, a share of the task's data, or None for all"
    )
    feature_samples: Samples | None = Field(
        default=None, description="cap on the samples of C: a number, a share of the task's data, or None for all"
    )
    residual_gradient: Literal["auto", "exact", "sketch"] = Field(
        default="auto",
        description="what A is taken from: whole gradients, sketches of them, or auto: sketches where the gradients take more "
        "than 4 GiB",
    )
    sketch_oversampling: int | None = Field(
        default=None, ge=0, description="rows of a sketch beyond the rank; None: three times the rank"
    )
    statistics_tolerance: float | None = Field(
        default=None, ge=0, lt=1, description="end a statistics pass once twice the samples change what is taken from them by "
        "less than this share; None: all samples"
    )  # fmt: skip
    covariance_sketch: Count | None = Field(
        default=None,
        description="rows that stand for C where a layer's inputs are at least four times as wide; None: C itself",
    )
    linear_algebra: Literal["auto", "cpu"] = Field(
        default="auto",
        description="where layers are decomposed: auto, on the GPU that the model is on; or cpu, on the CPU's cores",
    )
    when_full: Literal["shrink", "freeze", "raise"] = Field(
        default="shrink", description="what becomes of a target without room for its rank"
    )
    max_basis_bytes: Bytes | None = Field(
        default=None,
        description="most that the protected subspaces may take: bytes, or text such as 200MiB; None: no limit",
    )
    keep_covariance: bool = Field(default=False, description="keep C of each task for exact audits")
    parts: PartsConfig = Field(default_factory=PartsConfig, description="which parts of a generative model learn")
    token_weights: TokenWeightsConfig = Field(
        default_factory=TokenWeightsConfig, description="weights of text, image and answer tokens in C and G"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the method's own settings (`keeplora methods show NAME`)"
    )

    def samples(self, field: Literal["gradient_samples", "feature_samples"], available: int) -> int | None:
        """The cap as a number of samples out of ``available`` (at least 1), or None for no cap."""
        cap = getattr(self, field)
        return max(1, math.ceil(cap * available - 1e-9)) if isinstance(cap, float) else cap


class TrainingConfig(Section):
    """How a task is trained. epochs and learning_rate may be mappings from task names (or "default")."""

    epochs: CountPer
    learning_rate: PositivePer
    batch_size: Count
    optimizer: Literal["adamw"] = "adamw"
    weight_decay: float = Field(ge=0)
    schedule: Literal["onecycle", "cosine", "constant"]
    warmup: float | None = Field(
        default=None, ge=0, lt=1, description="share of the steps; None: 0.3 for onecycle, 0 for the others"
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    grad_clip: float | None = Field(default=None, gt=0, description="largest gradient norm; None: no clipping")
    eval_batch_size: Count = 64
    micro_batch: Count | None = Field(
        default=None, description="samples that go through a generative model at once; None: the whole batch. Gradients "
        "add up to those of the batch"
    )  # fmt: skip
    group_by_length: bool = Field(default=True, description="batches of conversations of like length")
    cache_vision: bool = Field(
        default=True, description="keep what a frozen vision tower says of each picture in memory, up to 4 GiB"
    )
    prompt_tokens: Count | None = Field(
        default=None, description="tokens of class prompts, pads included, whose activations a training step of a dual encoder "
        "holds at once; beyond it they are computed in batches, and again in the backward pass: less memory, more time. None: "
        "no limit"
    )  # fmt: skip
    gradient_checkpointing: bool = Field(default=False, description="trade time for memory in a generative model")
    workers: int = Field(default=0, ge=0, description="processes that load data; 0: none beside the main one")
    checkpoint_minutes: float | None = Field(
        default=5.0, gt=0, description="minutes between two checkpoints of the task under way; None: none at intervals"
    )
    checkpoint_steps: Count | None = Field(
        default=None, description="optimiser steps between two checkpoints, beside the minutes; None: none"
    )

    def for_task(self, task: str) -> TrainingConfig:
        """The same settings with this task's own epochs (int) and learning_rate (float)."""
        own = {key: pick(getattr(self, key), task, key=f"training.{key}") for key in ("epochs", "learning_rate")}
        return self.model_copy(update=own)


class EarlyStoppingConfig(Section):
    """Stop a task when its validation accuracy has not risen for ``patience`` epochs."""

    patience: Count


class AcceptConfig(Section):
    """What to do when a new task costs an older task or a probe more than ``max_drop`` points on validation data."""

    max_drop: float = Field(ge=0, le=100)
    action: Literal["warn", "undo"] = "warn"


class Overridden(NamedTuple):
    """A value that differs from the preset's."""

    key: str
    preset: Any
    value: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.value} (preset: {self.preset})"


class ExperimentConfig(Section):
    """A complete experiment: what to learn, in which order, with which method and settings.

    Made by `keeplora.experiment.config.load_config`, which fills in preset and suite (its tasks included).
    """

    name: str | None = Field(default=None, description="shown in reports; None: the suite's name")
    model: ModelConfig
    suite: str | None = None
    tasks: list[DataSpec]
    probes: list[DataSpec] = Field(default_factory=list)
    order: list[str] | None = Field(
        default=None, description="names of the tasks in the order of learning, the name of one of the suite's orders, or "
        "shuffle-SEED; None: as listed"
    )  # fmt: skip
    order_name: str | None = Field(default=None, description="how the order is called; set when it is given by name")
    first_tasks: int | None = Field(default=None, ge=1, description="learn only the first tasks of the order")
    candidates: Literal["own", "seen", "all"] = Field(
        default="own",
        description="test candidates: the task's classes, those of learned tasks too, or those of every task",
    )
    evaluate_on: Literal["test", "validation"] = Field(
        default="test", description="validation: held-out training pictures in place of test pictures, and no probes"
    )
    reference: DataSpec | None = Field(
        default=None, description="pictures and texts beside the tasks', for the methods that ask for them (zscl)"
    )
    method: str
    preset: str = "default"
    tuner: TunerConfig
    training: TrainingConfig
    validation: ValidationPer | None = Field(
        default=None, description="a share of the training data, a path, or a mapping of those from task names"
    )
    validation_seed: int = Field(
        default=0, ge=0, lt=2**32, description="which samples a share holds out (with `accept`, of each probe): the same for "
        "every `seed`, whose runs learn and are judged on the same data"
    )  # fmt: skip
    early_stopping: EarlyStoppingConfig | None = None
    generation: GenerationConfig = Field(
        default_factory=GenerationConfig, description="how a generative model answers when it is scored"
    )
    video: VideoConfig = Field(default_factory=VideoConfig, description="which frames of a video the model sees")
    judge: JudgeConfig = Field(default_factory=JudgeConfig, description="who rates answers where the score is `judge`")
    best_epoch: bool = Field(default=False, description="keep the epoch with the best validation accuracy")
    accept: AcceptConfig | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    auto: dict[str, Any] | None = Field(
        default=None, description="what `keeplora run --auto` took from an analysis, and from which; written by it"
    )
    output: str | None = Field(
        default=None, min_length=1, description="the run directory; None: runs/NAME-METHOD-seedSEED"
    )
    data_dir: str | None = Field(
        default=None, description="where the data of benchmark suites is; None: $KEEPLORA_DATA, else ./data"
    )
    base_dir: str = Field(default=".", description="the folder that relative paths in tasks and probes start from")
    loggers: list[str] = Field(
        default_factory=list, description="tensorboard, wandb, mlflow, trackio: beside our own record"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; None: torch's own choice")

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        if problems := config_problems(self):
            # One exception carries them all; config_errors takes it apart again.
            summary = "; ".join(f"{key} {sentence}" for key, sentence in problems)
            raise PydanticCustomError("problems", "{summary}", {"summary": summary, "problems": problems})
        return self

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks as listed (not in ``order``)."""
        return [spec["name"] for spec in self.tasks]

    @property
    def ordered_tasks(self) -> list[dict[str, Any]]:
        """Data specs of the tasks in the order of learning."""
        specs = {spec["name"]: spec for spec in self.tasks}
        known = [name for name in self.order or self.task_names if name in specs]
        return [specs[name] for name in known[: self.first_tasks]]

    def validation_for(self, task: str) -> float | str | None:
        """A share of the training data, a path, or None; ``validation:`` in the task's own data spec comes first."""
        own = next((spec.get("validation") for spec in self.tasks if spec["name"] == task), None)
        if own is not None:
            return own
        if isinstance(self.validation, Mapping):
            return self.validation.get(task, self.validation.get(DEFAULT_KEY))
        return self.validation

    @property
    def variant(self) -> str | None:
        """ "cls" for a method with a class-weight head, else None."""
        return variant_of(self.method)

    @property
    def overridden(self) -> list[Overridden]:
        """Every value of the preset that this experiment changes, by key path."""
        preset = preset_values(self.preset, self.task_names, self.variant)
        mine = self.model_dump()
        pairs = [("seed", preset["seed"], mine["seed"])]
        for section in ("tuner", "training"):
            pairs += [(f"{section}.{key}", value, mine[section][key]) for key, value in preset[section].items()]
        return [Overridden(*pair) for pair in pairs if pair[1] != pair[2]]

    @property
    def label(self) -> str:
        """The experiment's name, else its suite's, else "experiment"."""
        return self.name or (Path(self.suite).stem if self.suite else "experiment")

    @property
    def output_path(self) -> Path:
        """The run directory: ``output``, or runs/LABEL-METHOD-seedSEED below the current folder."""
        if self.output:
            return expand(self.output)
        order = f"-order{self.order_name}" if self.order_name not in (None, "1") else ""
        folder = re.sub(r"[^\w.+-]+", "-", f"{self.label}-{self.method}{order}-seed{self.seed}")
        return Path("runs") / folder

    def resolved(self) -> dict[str, Any]:
        """A plain mapping with every value spelt out, which `load_config` reads back as an equal configuration.

        A suite's tasks are left to the suite: its name stands for them.
        """
        values = self.model_dump()
        if self.suite is not None:
            values.pop("tasks")
        return values
