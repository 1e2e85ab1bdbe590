"""Layer normalisation of rows."""

from kernels.layer_norm.api import implementations, layer_norm, norm_and_residual

__all__ = ["implementations", "layer_norm", "norm_and_residual"]
