"""Many devices: a mesh of `data` and `context`, attention over rows that several devices hold."""

from ultra_hstu.parallel.context_attention import context_parallel_attention
from ultra_hstu.parallel.mesh import make_mesh

__all__ = ["context_parallel_attention", "make_mesh"]
