"""Many devices: a mesh of `data` and `context`, attention over sequences whose rows lie on several devices, token-wise work in chunks."""

from ultra_hstu.parallel.context_attention import context_parallel_attention
from ultra_hstu.parallel.mesh import make_mesh

__all__ = ["context_parallel_attention", "make_mesh"]
