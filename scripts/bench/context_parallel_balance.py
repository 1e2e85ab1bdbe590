"""How evenly attention lies on the shards of a context group, by lengths and layout of rows."""

from collections.abc import Callable

import numpy as np

from experiments.record import Json
from kernels.jagged import Rows
from kernels.mask import AttentionMask
from scripts.bench.context_parallel_case import SEMI_LOCAL
from ultra_hstu.parallel.layout import Layout


def draw_lengths(rng: np.random.Generator, kind: str, rows: int, longest: int) -> list[int]:
    """Lengths of sequences that fill a buffer."""
    draw: dict[str, Callable[[], float]] = {
        "zipf": lambda: 200 * rng.zipf(1.3),
        "lognormal": lambda: rng.lognormal(np.log(longest / 32), 1.5),
        "one long, many short": lambda: longest if not lengths else 64,
        "equal": lambda: longest / 8,
    }
    lengths: list[int] = []
    while (left := rows - sum(lengths)) > 0:
        lengths.append(max(1, min(int(min(draw[kind](), longest)), left)))
    return lengths


def balance(rows: int = 65536, shards: int = 8) -> Json:
    """Attention FLOPs of the busiest shard over the mean, the worst of several draws.

    FLOPs go with (row, key) pairs. `ring` and `gather` compute a pair where its row is, `halo`
    where its key is, for the rows that visit other shards; it lies in slices.
    """
    causal, semi_local = AttentionMask(), AttentionMask(window=SEMI_LOCAL, full_rows=SEMI_LOCAL)
    found: dict[str, dict[str, float]] = {}
    for kind in ("equal", "lognormal", "zipf", "one long, many short"):
        for seed in range(5):
            lengths = draw_lengths(np.random.default_rng(seed), kind, rows, rows // 2)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            seen = semi_local.rows_of(Rows.of(offsets, rows))
            by_key_T = (
                sum(
                    np.asarray(hi) - np.asarray(lo)
                    for lo, hi in zip(seen[::2], seen[1::2], strict=True)
                )
                + 1
            )
            by_row_T = causal.row_pairs(lengths, rows)
            loads = {
                "causal": {
                    "contiguous": _busiest(by_row_T, Layout.contiguous(rows, shards)),
                    "striped": _busiest(by_row_T, Layout.striped(rows, shards)),
                    "balanced": _busiest(by_row_T, Layout.balanced(lengths, causal, rows, shards)),
                },
                "semi_local": {"contiguous": _busiest(by_key_T, Layout.contiguous(rows, shards))},
            }
            for mask, layouts in loads.items():
                worst = found.setdefault(f"{kind}/{mask}", {})
                for name, load in layouts.items():
                    worst[name] = max(worst.get(name, 0.0), load)
    return {"rows": rows, "shards": shards, "block": 128, "draws": 5, "busiest_over_mean": found}


def _busiest(pairs_T: np.ndarray, layout: Layout) -> float:
    pairs_C = pairs_T[np.asarray(layout.permutation())].reshape(layout.shards, -1).sum(1)
    return float(pairs_C.max() / pairs_C.mean())
