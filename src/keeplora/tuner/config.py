"""Settings of the tuner; every field carries its own help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from keeplora.errors import ConfigError, did_you_mean
from keeplora.math import SCHEDULES

ROLE_KEYS = ("vision", "text", "language", "default")
"""Keys of per-tower mappings that may name a tower the model lacks: they come from presets that serve many families."""

WHEN_FULL = ("shrink", "freeze", "raise")
CHOICES = (
    ("memory", "kind", ("features", "gradients")),
    ("residual_gradient", "mode", ("auto", "exact", "sketch")),
    ("linear_algebra", "place", ("auto", "cpu")),
    ("when_full", "policy", WHEN_FULL),
)
"""Fields that take one of a few words: the field, what such a word is called, and the words."""

SKETCH_NEEDS_FEATURES = (
    "residual_gradient: sketch never holds a whole gradient, which memory: gradients (M8g) protects; set memory: features "
    "(the presets that end in -features), or residual_gradient: auto"
)


def _help(text: str, default: Any = None, **kwargs: Any) -> Any:
    metadata = {"help": text}
    return field(metadata=metadata, **kwargs) if kwargs else field(default=default, metadata=metadata)


@dataclass
class KeepLoraConfig:
    """What the learner protects, how much it may move, and where.

    Fields marked "per tower" take one value, or a mapping from a tower to a value. A tower is named by its module
    path (``"vision_model"``), by one component of it, or by its role (``"vision"``, ``"text"``, ``"language"``);
    ``"default"`` serves the towers that no other key names.

    Raises:
        ConfigError: naming the field and the offending value.

    >>> KeepLoraConfig(gamma=1.5)
    Traceback (most recent call last):
        ...
    keeplora.errors.ConfigError: gamma must lie between 0 and 1, got 1.5
    """

    r: int | Mapping[str, int] = _help("LoRA rank, per tower; shrinks where less residual space is left (M4).", 16)
    lora_alpha: float = _help("LoRA alpha: s = layer_scale · lora_alpha / r (METHOD.md, notation).", 16.0)
    target_modules: str | Sequence[str] | None = _help(
        "Suffixes of module names (q_proj), full names, or one regular expression as a string. None: the model "
        "family's own default.",
        None,
    )
    exclude_modules: str | Sequence[str] | None = _help("Left out of the targets; same forms as target_modules.", None)
    free_modules: str | Sequence[str] | None = _help(
        "Linears that train in full (weight and bias) and are not protected, such as a projector that the reference "
        "leaves free; same forms as target_modules.",
        None,
    )
    energy_weights: float | Mapping[str, float] = _help(
        "ε_w, per tower: share of ‖W₀‖² whose input directions are protected from the start (M1).",
        default_factory=lambda: {"vision": 0.85, "text": 0.2, "default": 0.6},
    )
    energy_features: float | Mapping[str, float] = _help(
        "ε_f, per tower: share of a finished task's feature energy that joins the protected subspace (M8).", 0.99
    )
    energy_general: float | Mapping[str, float] = _help(
        "ε_g, per tower: share of the feature energy of general samples (start_task's general_batches), as the model stands "
        "before a task, that the task's update is kept off (not in the paper); 0: none of it.",
        0.0,
    )
    gamma: float | Mapping[str, float] = _help(
        "γ, per tower: scale of the shallowest block (M6); 1 is KeepLoRA, 0.2 KeepLoRA++.", 0.2
    )
    schedule: str | Sequence[float] | Mapping[str, Any] = _help(
        "Layer scales over depth, per tower: linear (M6), constant, or a list with one number per block.", "linear"
    )
    memory: str = _help("What joins the subspace after a task: features (M8) or gradients (M8g).", "features")
    gradient_samples: int | None = _help(
        "Cap on the samples that the gradient G is taken over, stratified by class; None: all.", None
    )
    residual_gradient: str = _help(
        "What A is taken from (M3, M4): exact (G of every target, held at once), sketch (Z = Ψ G, r + p random mixtures of "
        "its rows: a fraction of the memory), or auto (exact while G of all targets takes at most 4 GiB, and always with "
        "memory: gradients).",
        "auto",
    )
    sketch_oversampling: int | None = _help("p, rows of the sketch beyond the rank; None: 3 r.", None)
    feature_samples: int | None = _help(
        "Cap on the samples that the covariance C is taken over, stratified by class; None: all.", None
    )
    statistics_tolerance: float | None = _help(
        "End a statistics pass (G, and C) early: samples come in a seeded order with the classes mixed, and the pass ends once "
        "twice the samples change what is taken from them by less than this share, 0 to below 1 (keeplora.tuner.convergence). "
        "None: all samples.",
        None,
    )
    covariance_sketch: int | None = _help(
        "ℓ: layers whose inputs are at least 4 ℓ wide hold ℓ rows (frequent directions) in place of the covariance C; what they "
        "explain is then a lower bound. None: C itself everywhere.",
        None,
    )
    linear_algebra: str = _help(
        "Where layers are decomposed (M1, M4, M8): auto (on the GPU that the model is on, where that is a CUDA device; on the "
        "CPU's cores otherwise, and where the GPU is short of memory), or cpu. Results lie on the CPU in either case.",
        "auto",
    )
    when_full: str = _help(
        "What becomes of a target whose residual space has no room for its rank: shrink (the rank goes down to what is left, "
        "and where nothing is the target sits the task out), freeze (it is not adapted any more, from then on), or raise "
        "(the task is refused before it starts).",
        "shrink",
    )
    max_basis_bytes: int | None = _help(
        "Most bytes that the protected subspaces may take in all, each by its smaller side; over it the directions that "
        "protect least per byte are given up, and said so. None: no limit.",
        None,
    )
    keep_covariance: bool = _help(
        "Keep C_t of each task in its record, for exact audits; training never reads it.", False
    )
    options: Mapping[str, Any] = _help(
        "Settings of the method's own; `keeplora methods show NAME` lists them.", default_factory=dict
    )
    seed: int = _help("Seeds the choice of samples where a cap applies.", 0)

    def __post_init__(self) -> None:
        self._check(
            "r", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "be an integer of at least 1"
        )
        for name in ("energy_weights", "energy_features", "energy_general", "gamma"):
            self._check(name, lambda v: _is_number(v) and 0 <= v <= 1, "lie between 0 and 1")
        self._check("lora_alpha", lambda v: _is_number(v) and 0 < v < float("inf"), "be a finite number above 0")
        for name in ("gradient_samples", "feature_samples"):
            self._check(
                name, lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
                "be an integer of at least 1, or None for all samples",
            )  # fmt: skip
        self._check(
            "statistics_tolerance", lambda v: v is None or (_is_number(v) and 0 <= v < 1),
            "be at least 0 and below 1, or None for all samples",
        )  # fmt: skip
        self._check(
            "covariance_sketch", lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
            "be a number of rows, at least 1, or None for the covariance itself",
        )  # fmt: skip
        if self.covariance_sketch is not None and self.keep_covariance:
            raise ConfigError(
                "keep_covariance keeps the exact covariances, which covariance_sketch does not make: turn one of them off"
            )
        for value in self.values_of("schedule"):
            if isinstance(value, str) and value not in SCHEDULES:
                raise ConfigError(f"schedule: unknown name {value!r}{did_you_mean(value, SCHEDULES)}")
        for name, kind, known in CHOICES:
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name}: unknown {kind} {value!r}{did_you_mean(str(value), known)}")
        if self.residual_gradient == "sketch" and self.memory == "gradients":
            raise ConfigError(SKETCH_NEEDS_FEATURES)
        self._check(
            "sketch_oversampling", lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
            "be an integer of at least 0, or None for 3 r",
        )  # fmt: skip
        self._check(
            "max_basis_bytes", lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
            "be a number of bytes, at least 1, or None for no limit",
        )  # fmt: skip
        for name in ("target_modules", "exclude_modules", "free_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                if not all(isinstance(item, str) and item for item in value) or not list(value):
                    raise ConfigError(f"{name} must be a string or a list of module names, got {value!r}")
                setattr(self, name, list(value))

    def values_of(self, name: str) -> list[Any]:
        """What a field holds, for any tower."""
        value = getattr(self, name)
        if isinstance(value, Mapping):
            if not value:
                raise ConfigError(f"{name} is an empty mapping: name at least one tower, or give one value")
            return list(value.values())
        return [value]

    def refuse_choices_of_A(self, method: str) -> None:
        """Refuse what says how A is taken from the residual gradient, for a ``method`` that takes it from elsewhere."""
        if any(self.values_of("energy_general")):
            raise ConfigError(
                "energy_general is for the methods whose A comes from the residual gradient (keeplora, keeplora++), and "
                f"{method} has another; leave it at 0"
            )

    def _check(self, name: str, valid: Any, rule: str) -> None:
        for value in self.values_of(name):
            if not valid(value):
                raise ConfigError(f"{name} must {rule}, got {value!r}")

    def for_tower(self, name: str, tower: str) -> Any:
        """The value of a per-tower field for ``tower``.

        >>> KeepLoraConfig(gamma={"vision": 0.2, "text": 1.0}).for_tower("gamma", "text_model")
        1.0
        """
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return value
        matches = [key for key in value if key != "default" and tower_matches(key, tower)]
        if matches:
            return value[max(matches, key=len)]
        if "default" in value:
            return value["default"]
        raise ConfigError(
            f"{name} gives no value for the tower {tower!r}: add the key {tower!r} or 'default' "
            f"(it names {', '.join(map(repr, value))})"
        )

    def check_towers(self, towers: Sequence[str]) -> None:
        """Refuse a key that names no tower of the model: it is a typing error, not a setting."""
        choices = {
            *towers,
            *(role for role in ROLE_KEYS if any(tower_matches(role, tower) for tower in towers)),
            "default",
        }
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "options" or not isinstance(value, Mapping):
                continue
            for key in value:
                if key not in ROLE_KEYS and not any(tower_matches(key, tower) for tower in towers):
                    raise ConfigError(f"{item.name}: no tower is named {key!r}{did_you_mean(key, choices)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `KeepLoraConfig(**d)` gives the same config back."""
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in asdict(self).items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def tower_matches(key: str, tower: str) -> bool:
    """Whether ``key`` names ``tower``: the whole path, one component of it, or a component's first word.

    >>> tower_matches("vision", "model.vision_tower.vision_model"), tower_matches("vis", "vision_model")
    (True, False)
    """
    parts = tower.split(".")
    return key == tower or key in parts or any(part.startswith(f"{key}_") for part in parts)
