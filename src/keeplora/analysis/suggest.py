"""From figures to settings: the rules by which ε_w, ε_f, γ and the rank are read off what was measured.

Each rule is one function of plain numbers and gives a value or None, with the sentence that says why. None is an answer: the
figures do not tell, and whoever asked keeps what they had.

A value other than the configured one is given only where the figures show the configured one to fall short: a loss at its own
ε_w that the suggested one visibly avoids, prices that its γ visibly does not follow, a gradient that its rank misses, features
that leave no room at its ε_f. That no loss is seen at a smaller value is no reason for it: an interval that holds 0 may hide
one, and what the smaller value would win is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keeplora.analysis.intervals import ends
from keeplora.math import layer_scales

RANK_SHARE = 0.9
"""Share of the residual gradient's energy that the suggested rank takes, at the median layer."""
ROOM_LAYERS = 0.9
"""Share of layers that must have room for the rank when the last task begins."""
LEAST_GAMMA = 0.1
"""γ is not suggested below this: at 0 the shallowest block would be frozen, which no measurement of thirds can tell."""


NOT_MEASURED = "not measured"
MEASURED_BY = {
    "energy_weights": "`keeplora analyze intra`", "energy_features": "`keeplora analyze inter` (spectra)",
    "gamma": "`keeplora analyze inter` (windows)", "r": "`keeplora analyze inter` (spectra)",
}  # fmt: skip
"""Which command tells of a setting."""


class Suggestion(NamedTuple):
    """A setting and why; ``value`` None: the figures do not tell."""

    value: Any
    why: str


class Change(NamedTuple):
    """A change of the general score, paired by sample, in points, with its interval."""

    mean: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        """Whether a loss is seen: the interval lies below 0."""
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}] points".replace("-", "−")


class Kept(NamedTuple):
    """A point of the intra curve.

    Attributes:
        energy: share of Σσ² kept. change: against the whole weights. over: against the same weights cut to the configured ε_w;
            None at that share and below it, and where it was not measured.
    """

    energy: float
    change: Change
    over: Change | None = None


def energy_weights(curve: Sequence[Kept], configured: float) -> Suggestion:
    """ε_w of a tower: the least share of ‖W‖² from which on no loss of the general score can be seen, where that is more than the
    configured one and visibly keeps more.

    The intervals are those of *changes*, sample by sample, as everywhere in the analysis: the score's own interval also holds how
    much harder one sample is than another, and hides losses that the pairs show.

    Args:
        curve: the tower's weights rebuilt from leading components, 0 (nothing kept) among them. configured: ε_w.

    >>> lost, unlike = Change(-40, -49, -31), Change(38, 29, 46)
    >>> ends = Kept(0.0, Change(-58, -70, -50)), Kept(1.0, Change(0, 0, 0))
    >>> curve = [ends[0], Kept(0.5, lost), Kept(0.8, Change(-2, -5, 1), unlike), ends[1]]
    >>> energy_weights(curve, 0.5).value, energy_weights(curve, 0.8).value
    (0.8, None)
    """
    points = sorted(curve, key=lambda point: point.energy)
    if points and points[-1].energy < 1 - 1e-6:
        return Suggestion(
            None, f"the curve ends at {points[-1].energy:.2f} of Σσ²: the whole model stands for nothing yet"
        )
    if not points or points[-1].change.lost:
        return Suggestion(None, "no share that was tried keeps the general score")
    first = len(points)
    while first > 0 and not points[first - 1].change.lost:
        first -= 1
    if first == 0:
        return Suggestion(
            None, f"even at the least share tried ({points[0].energy:.2f} of Σσ²: {points[0].change}) no loss of the general "
            "score can be seen: these samples do not show what the tower's weights hold"
        )  # fmt: skip
    if first == len(points) - 1:
        least = points[first - 1]
        return Suggestion(
            None, f"every truncation that was tried costs the general score something, the mildest ({least.energy:.2f} of Σσ²) "
            f"{least.change}, and to protect everything would leave nothing to learn in"
        )  # fmt: skip
    found, before = points[first], points[first - 1]
    told = (
        f"from {found.energy:.2f} of Σσ² on no loss of the general score can be seen ({found.change} there); at "
        f"{before.energy:.2f} it is {before.change}"
    )
    hidden = f"a loss of up to {max(0.0, -found.change.low):.1f} points at {found.energy:.2f} cannot be ruled out"
    if found.energy <= configured + 1e-6:
        return Suggestion(
            None, f"{told}. So the configured {configured:g} is enough as far as can be seen; a smaller one is not suggested: "
            f"{hidden}"
        )  # fmt: skip
    if found.over is None:
        return Suggestion(
            None, f"{told}. The configured {configured:g} itself was not measured, so nothing speaks against it"
        )
    if found.over.low <= 0:
        return Suggestion(
            None, f"{told}. That {found.energy:.2f} keeps more than the configured {configured:g} does cannot be told: the "
            f"difference between the two is {found.over}"
        )  # fmt: skip
    return Suggestion(
        round(found.energy, 3),
        f"{told}. Against the configured {configured:g} it keeps {found.over} more; {hidden}",
    )


class Window(NamedTuple):
    """Adapting one window of layers: gain on the new tasks and loss on the general sets, points, with bootstrap draws over tasks
    and samples, which pair the windows. tasks: how many were learned.
    """

    name: str
    gain: float
    loss: float
    gain_draws: NDArray[np.float64]
    loss_draws: NDArray[np.float64]
    tasks: int


def ratio_of(gamma: float, count: int = 3) -> float:
    """s_shallow / s_deep of γ's linear schedule (M6) at the middles of the first and the last of ``count`` windows of depth.

    They lie at x = 1/(2 count) and 1 − x of the depth, where it gives γ + (1 − γ) x and γ + (1 − γ)(1 − x).

    >>> ratio_of(1.0), round(ratio_of(0.2), 3), round(ratio_of(0.2, 12), 3)
    (1.0, 0.385, 0.241)
    """
    k = 2 * count - 1
    return (k * gamma + 1) / (gamma + k)


def gamma_of(ratio: float, count: int = 3) -> float:
    """The γ whose `ratio_of` is ``ratio``; cut to [`LEAST_GAMMA`, 1].

    >>> gamma_of(1.0), round(gamma_of(0.5), 3), gamma_of(0.0), round(gamma_of(ratio_of(0.4, 12), 12), 3)
    (1.0, 0.333, 0.1, 0.4)
    """
    k = 2 * count - 1
    return 1.0 if ratio >= 1 else max(LEAST_GAMMA, (k * ratio - 1) / (k - ratio))


def gamma(windows: Sequence[Window], configured: Sequence[float], count: int = 3) -> Suggestion:
    """γ from what the shallowest and the deepest window cost the general sets per point gained on the task.

    To first order the gain grows with a window's scale s, and around a pretrained optimum the loss with s². What
    Σ gain_w s_w − λ Σ loss_w s_w² is largest for is s_w ∝ gain_w / loss_w, so the scales of the two windows stand in the inverse
    ratio of their prices loss / gain; γ is the linear schedule with that ratio at their middles (`gamma_of`).

    None where a window has not visibly gained, after one task, and where the prices may stand as a configured γ has them: where
    the interval of price_deep − `ratio_of` (γ) · price_shallow holds 0.

    Args:
        configured: the γ of each tower. count: into how many windows the depth was divided.
    """
    if len(windows) < 2:
        return Suggestion(None, "there is but one window of layers")
    shallow, deep = windows[0], windows[-1]
    if shallow.tasks < 2:
        return Suggestion(None, "one task alone was learned: what a point costs in others is not told")
    for one in (shallow, deep):
        if ends(one.gain_draws)[0] <= 0:
            return Suggestion(
                None,
                f"adapting {one.name} alone gains {one.gain:+.1f} points, which is not told from 0: no price can be set",
            )
    prices = [one.loss / one.gain for one in (shallow, deep)]
    draws = [one.loss_draws / np.maximum(one.gain_draws, 1e-9) for one in (shallow, deep)]
    told = (
        f"a point gained costs the general sets {prices[0]:.2f} points where {shallow.name} alone is adapted and "
        f"{prices[1]:.2f} where {deep.name} alone is"
    )
    ratio = max(0.0, prices[1]) / prices[0] if prices[0] > 0 else 1.0
    value = round(gamma_of(ratio, count), 2)
    for now in sorted(set(configured)):
        scale = ratio_of(now, count)
        low, high = ends(draws[1] - scale * draws[0])
        apart = f"[{low:+.2f}, {high:+.2f}]".replace("-", "−")
        fits = (
            f"the configured γ = {now:g} fits a deep price of {scale:.2f} times the shallow one; the measured one lies "
            f"{apart} off"
        )
        if low <= 0 <= high:
            return Suggestion(None, f"{told}. {fits}, so a difference cannot be told")
        if low < 0 and prices[0] <= 0:  # deep layers gain in the general sets as well, and more than shallow ones
            return Suggestion(None, f"{told}. {fits}: no γ stands in such a ratio")
        if value == now or (value > now) != (low > 0):
            return Suggestion(None, f"{told}, for which the configured γ = {now:g} is the best of the linear schedules")
        told += f". {fits}"
    why = (
        "the shallow layers cost nothing"
        if prices[0] <= 0
        else f"their scales should stand as {min(ratio, 1.0):.2f} to 1"
    )
    return Suggestion(value, f"{told}: {why}")


def same_step(towers: Sequence[tuple[int, int, float]], new: float) -> tuple[float, str]:
    """By what the learning rate is multiplied when γ becomes ``new``, and why.

    Prices tell how layers should move beside one another, not how far they should move in all. AdamW moves B by the learning rate
    η in every layer, so that ΔW = s B A moves by s η; kept is Σ (s η)² over the targets, with s of M6.

    Args:
        towers: per tower, its blocks, its targets in blocks, its configured γ.

    >>> factor, why = same_step([(12, 48, 0.2), (6, 24, 0.2)], 1.0)
    >>> round(factor, 3)
    0.653
    """
    squares = [
        sum(n * sum(s * s for s in layer_scales(blocks, g)) / blocks for blocks, n, g in rows)
        for rows in (towers, [(blocks, n, new) for blocks, n, _ in towers])
    ]
    factor = (squares[0] / squares[1]) ** 0.5
    return factor, (
        f"with γ = {new:g} the layers together move {1 / factor:.2f} times as far at the same rate, and the prices say nothing "
        f"of how far they should: the rate times {factor:.2f} leaves that as it was"
    )


def rank(shares: Mapping[int, Sequence[float]], configured: int = 1) -> Suggestion:
    """The smallest rank that takes `RANK_SHARE` of the residual gradient's energy at the median layer, where that is more than r.

    A lower rank than the configured one is never suggested: the gradient before the first step says what r misses, not what a
    trained B makes of the directions that it holds little in. On the embedded model rank 8 held 93 % of it, and learned less
    than rank 16 (docs/results.md).

    Args:
        shares: per rank, the share that the leading directions hold in each layer for each task. configured: r.

    >>> rank({4: [0.5, 0.7, 0.8], 8: [0.8, 0.95, 0.97]}, 4).value
    8
    >>> rank({4: [0.5, 0.7, 0.8], 8: [0.8, 0.95, 0.97]}, 16).why
    'rank 8 takes 95% of the residual gradient at the median layer, so the configured 16 is enough; a lower rank is not suggested'
    """
    if not shares or not any(shares.values()):
        return Suggestion(None, "no gradient was measured")
    medians = {r: median(values) for r, values in sorted(shares.items()) if values}
    for r, share in medians.items():
        if share >= RANK_SHARE:
            if r <= configured:
                return Suggestion(
                    None, f"rank {r} takes {share:.0%} of the residual gradient at the median layer, so the configured "
                    f"{configured} is enough; a lower rank is not suggested"
                )  # fmt: skip
            low, high = np.quantile(shares[r], [0.25, 0.75])
            return Suggestion(
                r, f"the leading {r} directions take {share:.0%} of the residual gradient's energy at the median layer (half of "
                f"the layers between {low:.0%} and {high:.0%}); {RANK_SHARE:.0%} were asked for"
            )  # fmt: skip
    most = max(medians)
    return Suggestion(
        None,
        f"even rank {most} takes only {medians[most]:.0%} of the residual gradient's energy at the median layer",
    )


class Protected(NamedTuple):
    """What protecting every task's features at one ε_f leaves.

    Attributes:
        energy: ε_f. room: free input dimensions per layer when the last task begins. left: per layer, the share of the last
            task's gradient energy outside U before it. start: the same outside U₀.
    """

    energy: float
    room: Sequence[int]
    left: Sequence[float]
    start: Sequence[float]


def energy_features(tried: Sequence[Protected], r: int, configured: float, tasks: int = 2) -> Suggestion:
    """ε_f: where the tasks do not fit at the configured one, the largest at which they do.

    The bound on what later tasks may change falls with 1 − ε_f (METHOD.md, backward stability), so larger is better for
    keeping, until there is no room to learn in: when the last task begins, `ROOM_LAYERS` of the layers must have ``r`` free
    dimensions. How much of its gradient is left there is told and not judged: gradients lie in the span of the features, so
    most of their energy is inside by construction, and the optimiser does not go by their size. A larger ε_f than the configured
    one is not suggested: that it would fit does not say that the tasks would learn as much.

    >>> tried = [Protected(0.9, [50, 40], [0.5, 0.4], [0.6, 0.6]), Protected(0.99, [20, 9], [0.2, 0.1], [0.6, 0.6])]
    >>> energy_features(tried, 16, 0.99).value, energy_features(tried, 8, 0.99).value
    (0.9, None)
    """
    if tasks < 2:
        return Suggestion(None, "one task alone: nothing shows how the features of tasks add up")
    told = []
    fits: dict[float, bool] = {}
    for one in sorted(tried, key=lambda t: t.energy):
        roomy = sum(room >= r for room in one.room) / max(1, len(one.room))
        left = median(one.left or [0.0])
        told.append(
            f"{one.energy:g}: {roomy:.0%} of the layers with room for rank {r}, {left:.0%} of the last task's gradient left"
        )
        fits[one.energy] = roomy >= ROOM_LAYERS
    if not told:
        return Suggestion(None, "what the tasks leave free was not measured")
    start = median(tried[0].start or [0.0])
    detail = f"{'; '.join(told)} (outside U₀ alone {start:.0%})"
    best = max((energy for energy, there in fits.items() if there), default=None)
    if best is None:
        return Suggestion(None, f"no ε_f that was tried leaves room enough: {detail}")
    # The more is protected the less is free: what fits at a larger ε_f fits at the configured one.
    if best >= configured:
        return Suggestion(
            None, f"the configured {configured:g} leaves room enough; a larger one is not suggested: {detail}"
        )
    if configured not in fits:
        return Suggestion(None, f"the configured {configured:g} was not tried, so nothing speaks against it: {detail}")
    return Suggestion(best, f"the configured {configured:g} does not leave room enough: {detail}")
