"""HSTU attention, its mask and its jagged batches; imports JAX and nothing above it."""

DISTRIBUTION = "ultra-hstu"  # whose package this is: other distributions use the name, too
