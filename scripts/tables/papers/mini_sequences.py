"""Mini-sequence Transformer: arXiv 2407.15892."""

from scripts.tables.papers.row import Cell, Row, Value, field, less, ratio

CHUNK_ROWS = "ultra_hstu/model_config.py:ModelConfig.chunk_rows"
LONGEST = "bench.mini_sequences --stages=head,state,longest"
CONFIRM = "bench.mini_sequences --stages=confirm --contexts=1"


def longest(mode: str, mesh: str = "1") -> Value:
    return field("longest", f"hstu_ffn_full/{mode}/{mesh}", "longest")


def confirmed(mode: str) -> Value:
    return field("confirmed", f"hstu_ffn_full/{mode}/1", "rows_a_second")


def state(options: str) -> Value:
    return field("state", options, "optimizer")


def loss(kind: str, value: str) -> Value:
    return field("steps", kind, value)


ROWS = (
    Row(
        "blocks of the MLP",
        "token-wise parts in M pieces, computed again in the backward",
        ("ultra_hstu/nn/mini_sequence.py", CHUNK_ROWS),
        here="equal to one piece for any M, with a tail, in tests",
        deviates="norm, projections, gate and head too; only `model.feed_forward` is an MLP",
    ),
    Row(
        "vocabulary head",
        "logits and loss in M pieces: S V -> S V / M",
        (
            "kernels/full_softmax/api.py:full_softmax",
            "ultra_hstu/sections.py:LossConfig.chunk_rows",
        ),
        here=(
            Cell(
                "loss_h200",
                "full softmax of 262,144 rows over 20,000 items: {:,.0f} MiB",
                (loss("full xla", "temporary_MiB"),),
            ),
        ),
        deviates="gradients are made in the forward, summed in float32",
    ),
    Row(
        "tail and mean",
        "one division by the number of valid tokens",
        ("kernels/softmax_rows.py:by_chunks",),
        here="the public code drops the tail of S that 64 does not divide; here none is lost",
    ),
    Row(
        "with rematerialisation",
        "4x longer than activation recomputation alone",
        ("ultra_hstu/nn/remat.py", "ultra_hstu/nn/mini_sequence.py"),
        "4x",
        (
            Cell(
                "mini_sequences",
                "{:.1f}x, HSTU with feed-forward blocks, full softmax over 1M items",
                (ratio(longest("both"), longest("selective")),),
                LONGEST,
            ),
        ),
    ),
    Row(
        "longest sequence",
        "12x of the standard implementation (60K tokens of Llama3-8B on 80 GB), 12x to 24x others",
        ("experiments/configs/long.py", CHUNK_ROWS),
        "12x to 24x",
        (
            Cell(
                "mini_sequences",
                "{:.1f}x, HSTU with feed-forward blocks, full softmax over 1M items",
                (ratio(longest("both"), longest("nothing")),),
                LONGEST,
            ),
        ),
        "Llama3-8B is not done; other recommenders: mini_sequences.md",
    ),
    Row(
        "equal throughput",
        "the same tokens a second",
        ("experiments/configs/long.py",),
        "1.0x",
        (
            Cell(
                "mini_sequences_h200",
                "{:.2f}x the events a second of no saving",
                (ratio(confirmed("both"), confirmed("nothing")),),
                CONFIRM,
            ),
        ),
    ),
    Row(
        "MsT with Ulysses",
        "sequence over P devices: the longest grows with P",
        ("ultra_hstu/parallel/ulysses.py:Ulysses", "experiments/configs/long.py"),
        "linear in P",
        (
            Cell(
                "mini_sequences",
                "{:.1f}x on 8 devices, {:.1f}x by `ring`",
                tuple(
                    ratio(longest("both", f"8/{strategy}"), longest("both"))
                    for strategy in ("ulysses", "ring")
                ),
                LONGEST,
            ),
        ),
    ),
    Row(
        "peak memory",
        "67 GB -> 48 GB, Llama3-8B",
        published="-30 %",
        here="not done: the sequence length is not published",
    ),
    Row(
        "gradients and optimizer state",
        "bytes that no chunk changes",
        ("ultra_hstu/optim.py", "ultra_hstu/entry_updates.py:RowwiseAdagrad"),
        here=(
            Cell(
                "mini_sequences_state",
                "optimizer -{:.0%} with `state_dtype=bfloat16`",
                (less(state("full, state_dtype=bfloat16"), state("full")),),
                LONGEST,
            ),
        ),
    ),
    Row(
        "fine-tuning",
        "LongAlpaca, 8k against 30k: equal or better perplexity",
        here="not done: a language model's data; losses equal those of one piece",
    ),
    Row(
        "tables of images",
        "quantisation, TFLOPS, M of 2 to 32, 2 to 8 devices: numbers that could not be read",
        here="not done: nothing to compare with",
    ),
    Row(
        "chunk size",
        "4,096 tokens of the MLP, 64 pieces of the head; or the hidden size",
        (
            "ultra_hstu/model_config.py:ModelConfig.chunk_rows",
            "ultra_hstu/sections.py:LossConfig.chunk_rows",
        ),
        here="`long_mst` has 4,096 rows",
    ),
)
