"""The method as pure functions of tensors; imports torch and nothing of ours."""

from keeplora.math.budget import Candidates, keep_most_valuable
from keeplora.math.complement import (
    Subspace,
    complement,
    held_bytes,
    row_shares,
    shares,
)
from keeplora.math.factor import layer_alpha, lora_delta, residual_factor
from keeplora.math.frequent_directions import (
    CovarianceSketch,
    FrequentDirections,
    new_sketched_directions,
    sketched_growth,
)
from keeplora.math.growth import (
    Growth,
    extend_basis,
    extend_basis_with_gradient,
    feature_growth,
    gradient_growth,
    new_directions,
    new_gradient_directions,
)
from keeplora.math.leak import (
    backward_bound,
    backward_harm,
    factor_leak,
    factor_leaks,
    forward_change,
    product_norm,
    rounding_floor,
    spectral_norm,
    weight_leak,
)
from keeplora.math.scales import SCHEDULES, layer_scales
from keeplora.math.sketch import sketch, sketch_matrix, sketch_rows
from keeplora.math.subspace import (
    append_directions,
    explained_share,
    orthonormality_error,
    project_out,
    weight_basis,
)

__all__ = [
    "SCHEDULES",
    "Candidates",
    "CovarianceSketch",
    "FrequentDirections",
    "Growth",
    "Subspace",
    "append_directions",
    "backward_bound",
    "backward_harm",
    "complement",
    "explained_share",
    "extend_basis",
    "extend_basis_with_gradient",
    "factor_leak",
    "factor_leaks",
    "feature_growth",
    "forward_change",
    "gradient_growth",
    "held_bytes",
    "keep_most_valuable",
    "layer_alpha",
    "layer_scales",
    "lora_delta",
    "new_directions",
    "new_gradient_directions",
    "new_sketched_directions",
    "orthonormality_error",
    "product_norm",
    "project_out",
    "residual_factor",
    "rounding_floor",
    "row_shares",
    "spectral_norm",
    "shares",
    "sketch",
    "sketch_matrix",
    "sketch_rows",
    "sketched_growth",
    "weight_basis",
    "weight_leak",
]
