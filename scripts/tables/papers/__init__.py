"""The claims and algorithms of the four papers, a module a paper: what docs/papers.md shows."""

from scripts.tables.papers import context_parallel, hstu, mini_sequences, ultra_hstu

PAPERS = {
    "hstu": hstu.ROWS,
    "ultra_hstu": ultra_hstu.ROWS,
    "context_parallel": context_parallel.ROWS,
    "mini_sequences": mini_sequences.ROWS,
}
