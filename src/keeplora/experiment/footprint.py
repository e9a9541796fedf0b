"""What a generative model's run takes in memory, on disk and in time: arithmetic on shapes, nothing is loaded.

Symbols, as in METHOD.md where it has them: P parameters, e bytes per element of the base's compute dtype (4 in fp32, else 2),
T tokens of a sample in the language model, b the micro-batch, L blocks, H hidden width, I width of the MLP, h heads and g
key/value heads of width d, V vocabulary, r' = min(r, in, out) of a target, l rows of what the gradient pass sums of it: out, or
min(out, r + p) where gradients are sketched. Every function's docstring has its formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from keeplora.experiment.assumptions import Assumptions
from keeplora.math import held_bytes, sketch_rows

BASES = ("fp32", "bf16", "8bit", "4bit")
BLOCK_4BIT = 64
"""Weights that share one float32 scale in bitsandbytes' 4-bit format."""


@dataclass(frozen=True)
class Linear:
    """One target: y = W x with W (out, in). ``shared``: reads the tensor of an earlier target and adds no C of its own.
    ``tokens``: positions per sample. ``quantised``: held in 8 or 4 bits where the base is."""

    n_in: int
    n_out: int
    r: int
    tokens: int
    shared: bool = False
    quantised: bool = True

    @property
    def rank(self) -> int:
        return min(self.r, self.n_in, self.n_out)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks. ``linear``: entries of its linears. ``tokens`` per sample."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    linear: int
    tokens: int


@dataclass(frozen=True)
class ModelShape:
    """A model by its sizes.

    Attributes:
        parameters: P, all of them. language, vision: the two stacks. projector: entries of its linears.
        image_tokens: positions of a picture in the language model. vocabulary: rows of the head.
        quantised, quantised_rows: entries, and output rows, of the linears that 8 and 4 bits hold.
    """

    parameters: int
    language: Tower
    vision: Tower
    projector: int
    image_tokens: int
    vocabulary: int
    quantised: int
    quantised_rows: int


@dataclass(frozen=True)
class Settings:
    """What of the configuration counts: see `TrainingConfig` and `TunerConfig`.

    Attributes:
        trained: parameters that a task trains. frozen: entries of factors beside them that do not train (A).
        protects: whether the method keeps U. gradients: M8g in place of M8.
        epochs, samples, gradient_samples, feature_samples, tests: one entry per task. probes: samples of all probes.
        free: those of ``trained`` that are the model's own, trained in full and not protected.
        sketch: whether A is taken from sketched gradients. oversampling: p of these, None for 3 r.
    """

    trained: int
    frozen: int
    protects: bool
    gradients: bool
    checkpointing: bool
    micro_batch: int
    eval_batch: int
    epochs: tuple[int, ...]
    samples: tuple[int, ...]
    gradient_samples: tuple[int, ...]
    feature_samples: tuple[int, ...]
    tests: tuple[int, ...]
    probes: int = 0
    free: int = 0
    sketch: bool = False
    oversampling: int | None = None

    def rows(self, target: Linear) -> int:
        """l of a target."""
        return sketch_rows(target.n_out, target.r, self.oversampling) if self.sketch else target.n_out


def element(base: str) -> int:
    """e: bytes of an activation."""
    return 4 if base == "fp32" else 2


def base_bytes(shape: ModelShape, base: str) -> int:
    """The model's weights. fp32: 4 P. bf16: 2 P. With Q entries in R rows quantised: 8bit Q + 4 R + 2 (P − Q), a scale per
    row; 4bit Q/2 + 4 ⌈Q/64⌉ + 2 (P − Q), a scale per 64 entries."""
    P, Q = shape.parameters, shape.quantised
    if base in ("fp32", "bf16"):
        return element(base) * P
    held = Q + 4 * shape.quantised_rows if base == "8bit" else -(-Q // 2) + 4 * -(-Q // BLOCK_4BIT)
    return held + 2 * (P - Q)


def factor_bytes(targets: Sequence[Linear]) -> int:
    """A and B of one task in float32: Σ 4 r' (in + out)."""
    return sum(4 * t.rank * (t.n_in + t.n_out) for t in targets)


def subspace_bytes(targets: Sequence[Linear], share: float) -> int:
    """U in float32 with k = share · in columns, each by its smaller side: Σ 4 in min(k, in − k). The bound is share = 1/2."""
    return sum(held_bytes(t.n_in, round(share * t.n_in)) for t in targets)


def gradient_bytes(targets: Sequence[Linear], s: Settings) -> int:
    """G of all targets, or what stands for it (`exact_bytes`, `sketch_bytes`)."""
    return sketch_bytes(targets, s.oversampling) if s.sketch else exact_bytes(targets)


def exact_bytes(targets: Sequence[Linear]) -> int:
    """G of all targets: Σ 8 out in, float64, and one float32 product 4 out in at a time."""
    return sum(8 * t.n_in * t.n_out for t in targets) + max(4 * t.n_in * t.n_out for t in targets)


def sketch_bytes(targets: Sequence[Linear], oversampling: int | None = None) -> int:
    """Ψ G of all targets: Σ 8 l in, float64, one float32 product 4 l in at a time, and Ψ in float32, 4 l out for every height
    out and l that there is."""
    shapes = [(t.n_in, t.n_out, sketch_rows(t.n_out, t.r, oversampling)) for t in targets]
    sums = [n_in * rows for n_in, _, rows in shapes]
    heights = {(n_out, rows) for _, n_out, rows in shapes}
    return 8 * sum(sums) + 4 * max(sums) + sum(4 * n_out * rows for n_out, rows in heights)


def covariance_bytes(targets: Sequence[Linear]) -> int:
    """C of all inputs: Σ 8 in² over the targets that read a tensor of their own (q, k and v share one, gate and up too),
    float64, and one float32 product 4 in² at a time."""
    return sum(8 * t.n_in**2 for t in targets if not t.shared) + max(4 * t.n_in**2 for t in targets)


def block_token_bytes(tower: Tower, base: str, ranks: int) -> int:
    """What autograd keeps of one token in one block while W and A are frozen (a frozen linear keeps nothing):
    2 · 4 H (the norms' float32 inputs) + e (2 h d + 2 g d) (q, k, v and the attention's output) + 4 h (its log-sums)
    + 3 e I (gate, SiLU(gate), up) + 4 Σ r' (A x of the block's targets, float32).
    For a decoder block with a gated MLP and fused attention."""
    e, t = element(base), tower
    return 8 * t.hidden + 2 * e * t.head_dim * (t.heads + t.kv_heads) + 4 * t.heads + 3 * e * t.intermediate + 4 * ranks


def activation_bytes(
    shape: ModelShape,
    base: str,
    *,
    samples: int,
    answer_tokens: int,
    ranks: int,
    checkpointing: bool,
    statistics: bool = False,
) -> int:
    """Activations of one micro-batch: b T L · block; with checkpointing b T (L e H + block), the blocks' inputs and one block
    computed again. Besides 4 H b T for the last norm and (e + 8) V per answer token (logits, float32, log-softmax).

    Args:
        ranks: Σ r' of one block. statistics: of the gradient pass, which holds the targets' inputs, e (2 H + I) more per token
            and block, and no A x.
    """
    tower, e = shape.language, element(base)
    block = block_token_bytes(tower, base, 0 if statistics else ranks)
    if statistics:
        block += e * (2 * tower.hidden + tower.intermediate)
    blocks = tower.blocks * e * tower.hidden + block if checkpointing else tower.blocks * block
    return samples * (tower.tokens * (blocks + 4 * tower.hidden) + answer_tokens * (e + 8) * shape.vocabulary)


def cache_bytes(shape: ModelShape, base: str, samples: int, new_tokens: int) -> int:
    """Keys and values while answers are generated: 2 e L g d (T + new) per sample."""
    t = shape.language
    return 2 * element(base) * t.blocks * t.kv_heads * t.head_dim * (t.tokens + new_tokens) * samples


@dataclass(frozen=True)
class Memory:
    """Bytes for one way of holding the base; ``device`` is what the accelerator must hold at once, ``host`` the CPU."""

    base: int
    factors: int
    optimiser: int
    """4 B (gradient) + 8 B (AdamW's two moments) per trained parameter."""
    activations: int
    activations_checkpointed: int
    gradients: int
    covariances: int
    cache: int
    past: int
    """A and B of one learned task beside a quantised base, which is never merged."""
    device: int
    """base + past · (tasks − 1) + the largest of: training, the gradient pass, the feature pass, generation."""
    copies: int
    """W₀ of the targets that are merged and of what is free, e per entry, on the host from the first merge on."""
    host: int
    """copies + 2 U (while a task is finished the old basis is kept, to undo) + A, B of every task and once more while one
    trains, what each changed of the free modules + G or C of one layer, float64."""


def memory(shape: ModelShape, targets: Sequence[Linear], settings: Settings, assume: Assumptions, base: str) -> Memory:
    """All of a run's memory with the base held as ``base``."""
    s, tasks = settings, len(settings.epochs)
    merged = [t for t in targets if not (t.quantised and base in ("8bit", "4bit"))]
    beside = [t for t in targets if t.quantised and base in ("8bit", "4bit")]
    ranks = round(sum(t.rank for t in targets if t.quantised) / shape.language.blocks)

    def activations(checkpointing: bool, statistics: bool = False) -> int:
        return activation_bytes(
            shape, base, samples=s.micro_batch, answer_tokens=assume.answer_tokens, ranks=ranks,
            checkpointing=checkpointing, statistics=statistics,
        )  # fmt: skip

    held, past = base_bytes(shape, base), factor_bytes(beside)
    factors, optimiser = 4 * (s.trained - s.free + s.frozen), 12 * s.trained
    G = gradient_bytes(targets, s) if s.protects else 0
    C = covariance_bytes(targets) if s.protects and not s.gradients else 0
    cache = cache_bytes(shape, base, s.eval_batch, assume.answer_tokens)
    peak = max(
        factors + optimiser + activations(s.checkpointing),
        G + activations(s.checkpointing, statistics=True) if s.protects else 0, C, cache,
    )  # fmt: skip
    copies = element(base) * (sum(t.n_in * t.n_out for t in merged) + s.free)
    U = 2 * subspace_bytes(targets, assume.k) if s.protects else 0
    one = max(8 * t.n_in * (t.n_out if s.gradients else max(t.n_in, s.rows(t))) for t in targets) if s.protects else 0
    return Memory(
        held, factors, optimiser, activations(False), activations(True), G, C, cache, past,
        device=held + past * max(0, tasks - 1) + peak, copies=copies,
        host=copies + U + (tasks + 1) * factors + tasks * 4 * s.free + one,
    )  # fmt: skip


def forward_flops(shape: ModelShape) -> int:
    """One sample, without the head: 2 P T per stack of linears and 4 h d T² L for the attention products of each tower."""
    towers = (shape.language, shape.vision)
    linear = sum(2 * t.linear * t.tokens for t in towers) + 2 * shape.projector * shape.image_tokens
    return linear + sum(4 * t.heads * t.head_dim * t.tokens**2 * t.blocks for t in towers)


def backward_flops(shape: ModelShape) -> int:
    """Of the activations alone, through the language model: 2 P T + 8 h d T² L. Frozen weights get no gradient, and nothing
    is learned below the language model but a projector, whose share is left out."""
    t = shape.language
    return 2 * t.linear * t.tokens + 8 * t.heads * t.head_dim * t.tokens**2 * t.blocks


def adapter_flops(targets: Sequence[Linear]) -> int:
    """Of B A x, one sample: forward and backward 2 r' (in + out) T each, the gradient of B 2 r' out T."""
    return sum(t.rank * t.tokens * (4 * (t.n_in + t.n_out) + 2 * t.n_out) for t in targets)


def eigh_flops(n: int) -> int:
    """All eigenvalues and vectors of a symmetric (n, n): 9 n³ (Golub and Van Loan, Matrix Computations, 4th ed., 8.3)."""
    return 9 * n**3


def vectors_flops(t: Linear) -> int:
    """Right singular vectors of (out, in) as `keeplora.math.right_vectors` makes them, m the larger side, n the smaller: the Gram
    matrix 2 m n², its eigh 9 n³, and where out < in the vectors of the longer side from it, 2 m n²."""
    m, n = max(t.n_in, t.n_out), min(t.n_in, t.n_out)
    return (4 if t.n_out < t.n_in else 2) * m * n**2 + eigh_flops(n)


def seconds(
    shape: ModelShape, targets: Sequence[Linear], s: Settings, assume: Assumptions, base: str
) -> dict[str, float]:
    """Estimated seconds per phase of the whole run.

    training: Σ epochs · N · (forward + backward + head 4 H V a + adapter (+ the blocks' forward again, checkpointed)) / tflops.
    statistics: per sample of the gradient pass (forward + backward + head) / tflops + 2 out in T of every target, sketched
    2 l (out + in) T, / fp32_tflops, with M8g once more after the task; with M8 forward / tflops + 2 in² T of every C /
    fp32_tflops.
    decompositions: singular vectors per target once (M1) and per task (M4, of l rows), and an eigh 9 in³ (M8) or singular vectors
    again (M8g), on the host; each of the whole matrix, where M4 and M8 decompose what U leaves of it.
    evaluation: (tasks + 1) · (tests · forward / tflops + batches · answer tokens · base / bandwidth).
    """
    fast, slow, host = 1e12 * assume.tflops, 1e12 * assume.fp32_tflops, 1e9 * assume.host_gflops
    forward, head = forward_flops(shape), 4 * shape.language.hidden * shape.vocabulary * assume.answer_tokens
    language = 2 * shape.language.linear * shape.language.tokens
    step = forward + backward_flops(shape) + head + adapter_flops(targets) + (language if s.checkpointing else 0)
    tests = sum(s.tests) + s.probes
    rounds = (len(s.epochs) + 1) * sum(-(-n // s.eval_batch) for n in (*s.tests, s.probes))
    decoding = rounds * assume.answer_tokens * base_bytes(shape, base) / (1e9 * assume.bandwidth)
    out = {"training": sum(n * e for n, e in zip(s.samples, s.epochs, strict=True)) * step / fast if s.trained else 0.0}
    if s.protects:
        again = language if s.checkpointing else 0
        outer = sum(2 * t.tokens * (s.rows(t) * (t.n_in + t.n_out) if s.sketch else t.n_in * t.n_out) for t in targets)
        gram = sum(2 * t.n_in**2 * t.tokens for t in targets if not t.shared)
        G = (forward + backward_flops(shape) + head + again) / fast + outer / slow
        C = forward / fast + gram / slow
        after = sum(s.gradient_samples) * G if s.gradients else sum(s.feature_samples) * C
        vectors = sum(vectors_flops(t) for t in targets)
        factor = sum(vectors_flops(replace(t, n_out=s.rows(t))) for t in targets)
        protect = vectors if s.gradients else sum(eigh_flops(t.n_in) for t in targets)
        out["statistics"] = sum(s.gradient_samples) * G + after
        out["decompositions"] = (vectors + len(s.epochs) * (factor + protect)) / host
    return out | {"evaluation": (len(s.epochs) + 1) * tests * forward / fast + decoding}
