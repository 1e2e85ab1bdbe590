"""HSTU attention over flat jagged buffers."""

from kernels.hstu_attention.api import (
    AttentionPlan,
    RelativeBias,
    hstu_attention,
    implementations,
    make_plan,
)

__all__ = ["AttentionPlan", "RelativeBias", "hstu_attention", "implementations", "make_plan"]
