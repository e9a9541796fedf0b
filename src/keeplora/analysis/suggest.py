"""From figures to settings: the rules by which ε_w, ε_f, γ and the rank are read off what was measured.

Each rule is one function of plain numbers and gives a value or None, with the sentence that says why. None is an answer: the
figures do not tell, and whoever asked keeps what they had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keeplora.analysis.intervals import ends

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


class Kept(NamedTuple):
    """A point of the intra curve: share of Σσ² kept, and the change of the general score, paired by sample, with its interval."""

    energy: float
    change: float
    low: float
    high: float

    @property
    def lost(self) -> bool:
        """Whether a loss is seen: the interval of the change lies below 0."""
        return self.high < 0


def energy_weights(curve: Sequence[Kept]) -> Suggestion:
    """ε_w of a tower: the least share of ‖W‖² from which on no loss of the general score can be seen.

    The interval is that of the *change*, sample by sample, as everywhere in the analysis: the score's own interval also holds how
    much harder one sample is than another, and hides losses that the pairs show.

    Args:
        curve: the tower's weights rebuilt from leading components, 0 (nothing kept) among them.

    >>> curve = [Kept(0.0, -58, -70, -50), Kept(0.5, -40, -49, -31), Kept(0.8, -2, -5, 1), Kept(1.0, 0, 0, 0)]
    >>> energy_weights(curve).value
    0.8
    """
    points = sorted(curve)
    if points and points[-1].energy < 1 - 1e-6:
        return Suggestion(
            None, f"the curve ends at {points[-1].energy:.2f} of Σσ²: the whole model stands for nothing yet"
        )
    if not points or points[-1].lost:
        return Suggestion(None, "no share that was tried keeps the general score")
    first = len(points)
    while first > 0 and not points[first - 1].lost:
        first -= 1
    if first == 0:
        return Suggestion(
            None, f"even at the least share tried ({points[0].energy:.2f} of Σσ²: {_change(points[0])}) no loss of the general "
            "score can be seen: these samples do not show what the tower's weights hold"
        )  # fmt: skip
    if first == len(points) - 1:
        least = points[first - 1]
        return Suggestion(
            None, f"every truncation that was tried costs the general score something, the mildest ({least.energy:.2f} of Σσ²) "
            f"{_change(least)}, and to protect everything would leave nothing to learn in"
        )  # fmt: skip
    found, before = points[first], points[first - 1]
    return Suggestion(
        round(found.energy, 3),
        f"from {found.energy:.2f} of Σσ² on no loss of the general score can be seen ({_change(found)} there); at "
        f"{before.energy:.2f} it is {_change(before)}. At the suggested share a loss of up to {max(0.0, -found.low):.1f} points "
        "cannot be ruled out",
    )


def _change(point: Kept) -> str:
    return f"{point.change:+.1f} [{point.low:+.1f}, {point.high:+.1f}] points".replace("-", "−")


class Window(NamedTuple):
    """Adapting one window of layers: gain on the new task and loss on the general sets, points, with bootstrap draws."""

    name: str
    gain: float
    loss: float
    gain_draws: NDArray[np.float64]
    loss_draws: NDArray[np.float64]


def gamma_of(ratio: float) -> float:
    """γ (M6) whose layer scales at the middles of the first and last third stand in ``ratio`` = s_shallow / s_deep.

    The linear schedule gives γ + (1 − γ)/6 and γ + 5 (1 − γ)/6 there; cut to [`LEAST_GAMMA`, 1].

    >>> gamma_of(1.0), round(gamma_of(0.5), 3), gamma_of(0.0)
    (1.0, 0.333, 0.1)
    """
    return 1.0 if ratio >= 1 else max(LEAST_GAMMA, (5 * ratio - 1) / (5 - ratio))


def gamma(windows: Sequence[Window]) -> Suggestion:
    """γ from what the shallowest and the deepest window cost the general sets per point gained on the task.

    To first order the gain grows with a window's scale s, and around a pretrained optimum the loss with s². What
    Σ gain_w s_w − λ Σ loss_w s_w² is largest for is s_w ∝ gain_w / loss_w, so the scales of the two windows stand in the inverse
    ratio of their prices loss / gain; γ is the linear schedule with that ratio at their middles (`gamma_of`).

    None where a window has not visibly gained, or where the interval of the difference of the prices holds 0.
    """
    if len(windows) < 2:
        return Suggestion(None, "there is but one window of layers")
    shallow, deep = windows[0], windows[-1]
    for one in (shallow, deep):
        if ends(one.gain_draws)[0] <= 0:
            return Suggestion(
                None,
                f"adapting {one.name} alone gains {one.gain:+.1f} points, which is not told from 0: no price can be set",
            )
    prices = [one.loss / one.gain for one in (shallow, deep)]
    gains = [np.maximum(one.gain_draws, 1e-9) for one in (shallow, deep)]
    apart = shallow.loss_draws / gains[0] - deep.loss_draws / gains[1]
    low, high = ends(apart)
    told = (
        f"a point gained costs the general sets {prices[0]:.2f} points where {shallow.name} alone is adapted and "
        f"{prices[1]:.2f} where {deep.name} alone is (difference [{low:.2f}, {high:.2f}])"
    )
    if low <= 0 <= high:
        return Suggestion(None, f"{told}: no difference can be seen")
    if prices[0] <= 0:
        return Suggestion(1.0, f"{told}: the shallow layers cost nothing")
    ratio = max(0.0, prices[1]) / prices[0]
    return Suggestion(
        round(gamma_of(ratio), 2), f"{told}, so their scales should stand about as {min(ratio, 1.0):.2f} to 1"
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


def energy_features(tried: Sequence[Protected], r: int, tasks: int = 2) -> Suggestion:
    """ε_f: the largest at which the tasks still fit.

    The bound on what later tasks may change falls with 1 − ε_f (METHOD.md, backward stability), so larger is better for
    keeping, until there is no room to learn in: when the last task begins, `ROOM_LAYERS` of the layers must have ``r`` free
    dimensions. How much of its gradient is left there is told and not judged: gradients lie in the span of the features, so
    most of their energy is inside by construction, and the optimiser does not go by their size.

    >>> tried = [Protected(0.9, [50, 40], [0.5, 0.4], [0.6, 0.6]), Protected(0.99, [20, 9], [0.2, 0.1], [0.6, 0.6])]
    >>> energy_features(tried, 8).value, energy_features(tried, 16).value
    (0.99, 0.9)
    """
    if tasks < 2:
        return Suggestion(None, "one task alone: nothing shows how the features of tasks add up")
    told = []
    best: Protected | None = None
    for one in sorted(tried, key=lambda t: t.energy):
        roomy = sum(room >= r for room in one.room) / max(1, len(one.room))
        left = median(one.left or [0.0])
        told.append(
            f"{one.energy:g}: {roomy:.0%} of the layers with room for rank {r}, {left:.0%} of the last task's gradient left"
        )
        if roomy >= ROOM_LAYERS:
            best = one
    if not told:
        return Suggestion(None, "no features were measured")
    start = median(tried[0].start or [0.0])
    detail = f"{'; '.join(told)} (outside U₀ alone {start:.0%})"
    if best is None:
        return Suggestion(None, f"no ε_f that was tried leaves room enough: {detail}")
    return Suggestion(best.energy, detail)
