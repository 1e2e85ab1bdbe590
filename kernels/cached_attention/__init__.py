"""HSTU attention of new rows to the keys and values of a cache."""

from kernels.cached_attention.api import cached_attention, implementations

__all__ = ["cached_attention", "implementations"]
