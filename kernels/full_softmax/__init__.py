"""Cross entropy of a positive among all items, a row."""

from kernels.full_softmax.api import full_softmax, implementations

__all__ = ["full_softmax", "implementations"]
