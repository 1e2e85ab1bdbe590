"""The gate of an HSTU layer."""

from kernels.gate.api import gate, implementations

__all__ = ["gate", "implementations"]
