"""Accuracy matrices, their metrics, and intervals over seeds."""

from keeplora.evaluation.metrics import (
    average,
    bwt,
    forgetting,
    last,
    maa,
    mfn,
    mft,
    per_task_forgetting,
    probe,
    summary,
    transfer,
)
from keeplora.evaluation.stats import Interval, mean_interval, paired_difference, student_t_cdf, student_t_quantile

__all__ = [
    "Interval",
    "average",
    "bwt",
    "forgetting",
    "last",
    "maa",
    "mean_interval",
    "mfn",
    "mft",
    "paired_difference",
    "per_task_forgetting",
    "probe",
    "student_t_cdf",
    "student_t_quantile",
    "summary",
    "transfer",
]
