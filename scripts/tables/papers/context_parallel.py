"""Context parallelism for HSTU: arXiv 2508.04711."""

from scripts.tables.papers.row import Cell, Row, Value, field, less, ratio

STEPS = "context_parallel_steps_h100"
MEASURE = "bench.context_parallel --stages=steps,long,confirm,reshard"


def way(layout: str, how: str, value: str) -> Value:
    return field("reshard", "ways", layout, how, value)


def longest(devices: int) -> Value:
    return field("variants", "causal/none", str(devices), "longest")


def speed_up(mask: str, case: str) -> Value:
    return field("steps", mask, case, "speed_up")


def exchange(record: str) -> Cell:
    """A wide batch, each device with users of its own: all-to-all beside all-gather."""
    rate, memory = (
        [field("batches", "wide, stream", way, value) for way in ("exchanged", "gathered")]
        for value in ("batches_a_second", "temporary_bytes")
    )
    return Cell(record, "{:.2f}x, memory -{:.0%}", (ratio(*rate), less(*memory)))


ROWS = (
    Row(
        "all-to-all of jagged batches",
        "ranks send each chunk to its owner only: memory -60 %, 2.7x requests a second",
        ("ultra_hstu/parallel/reshard.py:reshard",),
        "2.7x, over 60 % less memory",
        (
            Cell(
                STEPS,
                "{:.2f}x, memory -{:.0%}",
                (
                    ratio(
                        way("slices", "all_to_all", "batches_a_second"),
                        way("slices", "all_gather", "batches_a_second"),
                    ),
                    less(
                        way("slices", "all_to_all", "temporary_bytes"),
                        way("slices", "all_gather", "temporary_bytes"),
                    ),
                ),
                MEASURE,
            ),
        ),
        "static capacity in place of all_to_all_v; of the exchange alone",
    ),
    Row(
        "all-gather, then split",
        "the baseline",
        ("ultra_hstu/parallel/reshard.py:gather_then_slice",),
        here="beside it in the same record",
    ),
    Row(
        "balanced pairs of chunks",
        "rank r owns chunks r and 2 C - 1 - r",
        ("ultra_hstu/parallel/layout.py:Layout.striped",),
        here=(
            Cell(
                "context_parallel_balance",
                "busiest over mean {:.2f} in turns, {:.2f} contiguous, lognormal lengths",
                (
                    field("busiest_over_mean", "lognormal/causal", "striped"),
                    field("busiest_over_mean", "lognormal/causal", "contiguous"),
                ),
                "bench.context_parallel --stages=balance",
            ),
        ),
        deviates="blocks of 128 rows of the buffer, not chunks of each sequence",
    ),
    Row(
        "reorder kernels",
        "Triton kernels reorder rows: +37 % requests a second",
        ("ultra_hstu/parallel/reshard.py:Shared",),
        "+37 %",
        "not done: XLA gathers by indices; there is no such kernel to compare with",
    ),
    Row(
        "asynchronous offsets",
        "offsets reach the host late: +2 % requests a second",
        ("ultra_hstu/parallel/layout.py:Layout",),
        "+2 %",
        "not done: nothing waits on the host, for shapes are static",
    ),
    Row(
        "attention over shards",
        "keys and values gathered, or sent round, within the group",
        (
            "ultra_hstu/parallel/gather.py:GatheredKeys",
            "ultra_hstu/parallel/ring.py:Ring",
            "ultra_hstu/parallel/ulysses.py:Ulysses",
            "ultra_hstu/parallel/halo.py:Halo",
        ),
        here=(
            Cell(
                STEPS,
                "2 devices: {:.2f}x `halo`, {:.2f}x `ring`, {:.2f}x `ulysses`, {:.2f}x `gather`",
                (
                    speed_up("semi_local", "halo"),
                    *(speed_up("causal", one) for one in ("ring", "ulysses", "gather")),
                ),
                MEASURE,
            ),
        ),
        deviates="which one the paper uses is unknown; `halo` is ours",
    ),
    Row(
        "partial sums",
        "positions, times and N are global; outputs add",
        ("kernels/hstu_attention/partial.py", "ultra_hstu/parallel/strategy.py:PartialSums"),
        here="every strategy equals one device in tests",
    ),
    Row(
        "longest sequence",
        "3,072 / 4,096 / 7,168 / 16,384 on 1, 2, 4, 8 devices: 5.3x",
        ("scripts/bench/context_parallel_longest.py",),
        "5.3x",
        (
            Cell(
                "context_parallel_longest",
                "{:.2f}x: {:,} on one, {:,} on eight",
                (ratio(longest(8), longest(1)), longest(1), longest(8)),
                "bench.context_parallel --stages=longest",
            ),
        ),
        "by the compiler's count; trained on one and two devices",
    ),
    Row(
        "scaling factor, data parallel",
        "1.6x to 1.7x on two devices",
        ("ultra_hstu/sections.py:ParallelConfig.data",),
        "1.6x to 1.7x",
        (Cell(STEPS, "{:.2f}x", (speed_up("causal", "data"),), MEASURE),),
    ),
    Row(
        "scaling factor, context 2",
        "1.33x, and 1.55x with twice the batch",
        ("ultra_hstu/sections.py:ParallelConfig.context",),
        "1.33x, 1.55x",
        (
            Cell(
                STEPS,
                "{:.2f}x, {:.2f}x causal",
                (speed_up("causal", "ring"), speed_up("causal", "ring, 2 x batch")),
                MEASURE,
            ),
            Cell(
                STEPS,
                "{:.2f}x, {:.2f}x semi-local",
                (speed_up("semi_local", "halo"), speed_up("semi_local", "halo, 2 x batch")),
                MEASURE,
            ),
        ),
        "histories of 32,768 events, where theirs were short",
    ),
    Row(
        "re-layout in training",
        "inputs of a group of ranks, each with its own users, in the training step",
        ("ultra_hstu/parallel/exchange.py", "ultra_hstu/parallel/reshard.py:to_shared"),
        "2.7x, over 60 % less memory",
        (exchange("batches_h200"), exchange("batches_cpu")),
        "a batch, without its training step; replicated where that is less work",
    ),
)
