"""Cross entropy of a positive among itself and sampled negatives, a row."""

from kernels.sampled_softmax.api import implementations, sampled_softmax
from kernels.sampled_softmax.spec import Negatives

__all__ = ["Negatives", "implementations", "sampled_softmax"]
