"""HSTU attention over flat jagged buffers."""

from kernels.hstu_attention.api import hstu_attention, implementations, prepare_plan
from kernels.hstu_attention.plan import (
    AttentionPlan,
    AttentionSpec,
    make_plan,
    plan_of_intervals,
)
from kernels.hstu_attention.relative_bias import RelativeBias

__all__ = [
    "AttentionPlan",
    "AttentionSpec",
    "RelativeBias",
    "hstu_attention",
    "implementations",
    "make_plan",
    "plan_of_intervals",
    "prepare_plan",
]
