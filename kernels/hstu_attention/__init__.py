"""HSTU attention over flat jagged buffers."""

from kernels.hstu_attention.api import (
    AttentionPlan,
    AttentionSpec,
    RelativeBias,
    hstu_attention,
    implementations,
    make_plan,
    plan_of_intervals,
    prepare_plan,
)

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
