"""A norm and the projection behind it, whose result is cut into parts."""

from kernels.norm_linear.api import implementations, norm_linear

__all__ = ["implementations", "norm_linear"]
