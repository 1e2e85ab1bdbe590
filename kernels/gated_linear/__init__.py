"""The gate of an HSTU layer, the projection behind it, and the residual."""

from kernels.gated_linear.api import gated_linear, implementations

__all__ = ["gated_linear", "implementations"]
