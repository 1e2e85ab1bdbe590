"""ULTRA-HSTU: arXiv 2602.16986."""

from scripts.tables.papers import scaling
from scripts.tables.papers.row import Cell, Row, Value, field, less, mean_ne, ratio

ENCODER = "encoder_inference_TFLOP_a_sample"
LAYERS = "ultra_hstu/nn/hstu_layer.py"
ABLATION = "ablation_assistments"
ONE_SEED = "ASSISTments; a difference within what seeds do"


def step(variant: str, value: str) -> Value:
    return field("variants", variant, value)


def piece(variant: str, what: str) -> Cell:
    """NE with a piece off, and with all."""
    values = tuple(field("variants", one, "mean", "ne") for one in (variant, "ultra"))
    return Cell(ABLATION, f"NE {{:.4f}} {what}, {{:.4f}} with all pieces", values)


def operations(variant: str) -> Cell:
    """What a piece saves of the operations of a request."""
    names = ("training_gflop", "inference_gflop")
    values = tuple(less(step("ultra", name), step(variant, name)) for name in names)
    return Cell(ABLATION, "operations -{:.0%} in training, -{:.0%} at inference", values)


def layer(mode: str, value: str) -> Value:
    return field("layers", f"8 x 8192 causal, {mode}, training", value)


def fp8(mode: str, kind: str) -> Value:
    return field("layers", f"4 x 16384 window 256, {mode}, {kind}", "ms")


def rate(workload: str, implementation: str, which: str) -> Value:
    found = {"workload": workload, "implementation": implementation, "pass": which}
    return field("records", found, "tflops")


def against_triton(workload: str) -> Cell:
    ratios = tuple(
        ratio(rate(workload, "mosaic", one), rate(workload, "triton", one))
        for one in ("forward", "backward")
    )
    return Cell("attention_h100", f"{{:.1f}}x, {{:.1f}}x backward, `{workload}`", ratios)


def table_ms(kind: str) -> Value:
    return field("tables", kind, "transfer_ms")


def slowest_rank(record: str) -> Cell:
    plain, balanced = (
        field("sets", "ASSISTments 2017", one, "slowest") for one in ("plain", "balanced")
    )
    return Cell(record, "{:.2f}x the speed of the slowest rank", (ratio(plain, balanced),))


ROWS = (
    Row(
        "equations 1-5",
        "the layer: norm, SiLU projections, masked SiLU attention, gate, residual",
        (
            "ultra_hstu/nn/hstu_layer.py:ProductionLayer",
            "ultra_hstu/nn/hstu_layer.py:ResearchLayer",
        ),
        here=(
            Cell(
                "long_operations",
                "a forward pass of 16,384 events: {:.3f} TFLOP by the equations, {:.3f} production",
                (step("paper_layer", ENCODER), step("ultra", ENCODER)),
            ),
        ),
        deviates="the open code has the production layer; equation 4 is `preset='research'`",
    ),
    Row(
        "semi-local attention",
        "a local and a global window: cost O((K1 + K2) L)",
        ("kernels/mask.py:AttentionMask",),
        "C-NE +0.35 % without the global window, +0.03 % without the local one",
        (piece("full_attention", "under full attention"),),
        "the global window has two readings, `full_rows` and `prefix`; " + ONE_SEED,
    ),
    Row(
        "semi-local attention, efficiency",
        "2.7x training, 5.1x inference; exponents 1.39x, 1.69x",
        ("kernels/mask.py:AttentionMask.num_pairs",),
        "2.7x, 5.1x",
        (scaling.operations("semi_local"), *scaling.ratios("semi_local", which=0)),
    ),
    Row(
        "merged input",
        "item and action in one token: operations -32.5 % in training, -63.5 % at inference",
        ("ultra_hstu/ranking/tokens.py:TokenEmbedding", "ultra_hstu/sections.py:RankConfig.input"),
        "-32.5 %, -63.5 % at 3,072",
        (operations("interleaved_input"), piece("interleaved_input", "interleaved")),
        "histories of ASSISTments, mean 553",
    ),
    Row(
        "heterogeneous actions",
        "embeddings of implicit and explicit signals, summed: C-NE +0.45 %",
        ("ultra_hstu/data/signals.py:signals", "ultra_hstu/sections.py:RankConfig.signals"),
        "+0.45 %",
        (
            Cell(
                "signal_effects",
                "NE {:.4f} with all, {:.4f} without any, at best {:.4f}",
                (
                    field("variants", "ultra", "mean", "ne"),
                    field("variants", "without_any", "mean", "ne"),
                    field("known", "whole"),
                ),
            ),
            piece("fewer_signals", "without signals"),
        ),
        "which fields the paper embeds could not be found",
    ),
    Row(
        "algorithm 1",
        "load-balanced stochastic length: +15 % training throughput at 512 devices",
        ("ultra_hstu/sampling.py:LoadBalancer",),
        "+15 %",
        (
            Cell(
                "load_balance_cpu",
                "slowest of 8 over the mean: {:.2f} -> {:.2f}",
                tuple(
                    field("sets", "ASSISTments 2017", "load", "8", one, "max_over_mean")
                    for one in ("plain", "balanced")
                ),
            ),
            *map(slowest_rank, ("load_balance_ranks_h200", "load_balance_ranks_cpu")),
        ),
        "known from descriptions; here it keeps the law of equation 4; 512 devices are not done",
    ),
    Row(
        "stochastic length",
        "mean training length 1,110 of 3,072",
        ("ultra_hstu/config.py:DataConfig.stochastic_length",),
        "36 % of events kept",
        (
            Cell(
                "load_balance_cpu",
                "{:.0%} kept, alpha 1.6",
                (field("sets", "ASSISTments 2017", "kept_share_of_events", "plain"),),
            ),
            piece("whole_histories", "on whole histories"),
        ),
        "shorter histories than the paper's, so that fewer are cut",
    ),
    Row(
        "attention truncation",
        "upper layers on the newest L' events",
        ("ultra_hstu/nn/truncation.py:Truncation",),
        "3.4x inference efficiency; exponent 1.8x with semi-local attention",
        (
            Cell(
                "long_ultra_h200",
                "{:.1f}x the speed of a training step",
                (ratio(step("no_truncation", "step_ms"), step("ultra", "step_ms")),),
            ),
        ),
        "N1, N2 and L' are not published; divided by N, as the public code with `divide_by='kept'`",
    ),
    Row(
        "table 9",
        "3 + 6 truncated layers against 6: C-NE -0.25, -0.29 %; operations -3 %, -38 %",
        ("ultra_hstu/model_config.py:ModelConfig.truncate_after",),
        "-3 % training, -38 % inference",
        (
            scaling.operations("truncation"),
            Cell(
                "ablation_assistments_small",
                "NE {:.4f} whole, {:.4f} truncated",
                tuple(field("variants", one, "mean", "ne") for one in ("no_truncation", "ultra")),
            ),
        ),
        "a small model on a CPU; equal depth, not equal quality",
    ),
    Row(
        "mixture of transducers",
        "a sequence and a stack for each kind of signal, joined at the head",
        ("ultra_hstu/ranking/model.py:Ranker",),
        here="each channel has its own history, length and depth",
    ),
    Row(
        "table 8",
        "2k + 1k against 3k mixed: E-NE -1.0 %, inference -53 %; 10k + 3k against 16k: -69 %",
        ("ultra_hstu/model_config.py:ModelConfig.channels",),
        "-53 %, -69 %",
        (
            scaling.operations("mixture"),
            Cell(
                "ablation_assistments_small",
                "NE {:.4f} one, {:.4f} mixture",
                tuple(field("variants", one, "mean", "ne") for one in ("one_transducer", "ultra")),
            ),
        ),
        "operations of 2/3 and 1/3 of the events; for NE the second is added to a whole history",
    ),
    Row(
        "BF16",
        "activations and products in bfloat16; sums, norms and losses in float32",
        ("ultra_hstu/model_config.py:ModelConfig.dtype",),
        here="`model.dtype`",
    ),
    Row(
        "FP8 GEMM",
        "e4m3 with a scale a row: 1.99x of bfloat16 with bias",
        ("kernels/fp8.py:linear", "ultra_hstu/model_config.py:ModelConfig.projection"),
        "1.99x",
        (
            Cell(
                "layer_h200",
                "a layer {:.2f}x in training, {:.2f}x at inference",
                tuple(
                    ratio(fp8("none", one), fp8("fp8", one)) for one in ("training", "inference")
                ),
            ),
        ),
        "the whole layer, attention included; the shape of the paper is not published",
    ),
    Row(
        "FP8 and INT4 together",
        "+10 % training, +40 % serving throughput",
        ("kernels/norm_linear", "ultra_hstu/quantization.py:quantize_int4"),
        "+10 %, +40 %",
        (
            Cell(
                "long_ultra_h200",
                "{:.2f}x a training step with FP8",
                (ratio(step("ultra", "step_ms"), step("fp8", "step_ms")),),
            ),
        ),
        "from before the fused products",
    ),
    Row(
        "fusion 1",
        "norm and quantisation in one kernel",
        ("kernels/norm_linear/api.py:norm_linear",),
        here="rows are rounded by the kernel of the norm",
    ),
    Row(
        "fusion 2",
        "norm, gate, concatenation, dropout and quantisation in one kernel",
        ("kernels/gated_linear/api.py:gated_linear",),
        here="rows are rounded by the kernel of the gate",
    ),
    Row(
        "fusion 3",
        "the residual as 2-D bias of the FP8 product, persistent, TMA, warp specialised",
        ("kernels/norm_linear/mosaic", "kernels/gated_linear/mosaic"),
        here="Pallas Mosaic GPU in place of Triton",
    ),
    Row(
        "table 11",
        "INT4 tables: 13 -> 7.9 ms host to device, 3.6K -> 4.4K requests a second",
        ("ultra_hstu/quantization.py:Int4Table",),
        "-40 % of INT8; +22 %",
        (
            Cell(
                "host_tables_h100",
                "transfer {:.2f} -> {:.2f} ms, -{:.0%}",
                (table_ms("int8"), table_ms("int4"), less(table_ms("int4"), table_ms("int8"))),
            ),
            Cell(
                "host_requests_h200",
                "{:.1f} -> {:.1f} requests a second",
                tuple(field("tables", one, "requests_per_s") for one in ("int8", "int4")),
            ),
        ),
        "a transfer of 16,384 rows of width 512",
    ),
    Row(
        "attention kernel, H100",
        "about 2x of the Triton kernel, full and semi-local",
        ("kernels/hstu_attention/mosaic",),
        "2x",
        (against_triton("causal_d128_8x8192"), against_triton("semi_local_d128_2x16384")),
        "theirs is compared with FlashAttention2 in Triton, ours with our Triton kernel",
    ),
    Row(
        "attention kernel, MI300x",
        "about 2x by scheduling over chiplets, LDS layout, interleaved VMEM and MFMA",
        published="2x",
        here="not done: no such device to measure on; `xla` runs there",
    ),
    Row(
        "selective rematerialisation",
        "six tensors computed again: 7 -> 2.3 GB a layer, -67 %, +5 % time",
        ("ultra_hstu/nn/remat.py", "ultra_hstu/model_config.py:ModelConfig.remat"),
        "-67 %, +5 %",
        (
            Cell(
                "layer_h200",
                "-{:.0%} bytes, {:.2f}x the time",
                (
                    less(layer("selective", "bytes_a_token"), layer("none", "bytes_a_token")),
                    ratio(layer("selective", "ms"), layer("none", "ms")),
                ),
            ),
        ),
    ),
    Row(
        "fully jagged",
        "flat buffers end to end; lengths reach the scheduler of tiles",
        ("kernels/jagged.py:Rows", "kernels/hstu_attention/plan.py"),
        here="one compiled step for all lengths; tile bounds come from offsets",
    ),
    Row(
        "headline",
        "scaling efficiency 5.3x training, 21.4x inference; exponents 2.08x, 4.59x",
        ("experiments/configs/ranking.py", "ultra_hstu/flops.py:count"),
        "5.3x, 21.4x",
        (scaling.operations("ultra"), *scaling.ratios("ultra", which=0)),
        "slopes of NE over operations, on public and synthetic data",
    ),
    Row(
        "systems",
        "+70 % training, +50 % inference throughput, 67 % less memory a layer",
        ("experiments/configs/long.py",),
        "+70 %, +50 %",
        (
            Cell(
                "long_ultra_h200",
                "{:.1f}x of plain causal attention without truncation",
                (ratio(step("plain_causal", "step_ms"), step("ultra", "step_ms")),),
            ),
        ),
        "against our own HSTU; their baseline's kernels are older",
    ),
    Row(
        "table 1",
        "NE beside HSTU, STCA, Transformer, DIN, SASRec: +0.43 to +1.41 %",
        ("experiments/configs/ranking.py", "scripts/ablation.py"),
        "HSTU +0.43 % C-NE, DIN +1.41 %",
        (
            mean_ne("assistments_rank_ultra", "ULTRA-HSTU NE {:.4f}"),
            mean_ne("assistments_rank_hstu", "HSTU {:.4f}"),
            mean_ne("assistments_rank_din", "DIN {:.4f}"),
        ),
        "6B samples are the company's; STCA is not done: its text could not be had",
    ),
    Row(
        "table 2",
        "TFLOP a sample, 18 layers: .119 / .070 (3,072), .414 / .337 (8,192), .639 / .436 (16,384)",
        ("ultra_hstu/flops.py:count", "experiments/configs/long.py"),
        ".639 training, .436 inference",
        (
            Cell(
                "long_ultra_h200",
                "{:.2f} and {:.3f} of the encoder at 16,384",
                (
                    step("ultra", "training_TFLOP_a_sample"),
                    step("ultra", ENCODER),
                ),
            ),
        ),
        "what they count in training is unknown: theirs is below 3 x inference",
    ),
    Row(
        "table 3",
        "KuaiRand, 256 events: NE .8626",
        ("experiments/configs/ranking.py", "ultra_hstu/data/kuaishou.py"),
        ".8626",
        tuple(
            Cell(
                name,
                "NE {:.4f}",
                (field("mean", "ne"),),
                f"train --config={name} --workdir=runs/{name} --seeds=42,43,44"
                f" --record=experiments/results/{name}.json",
            )
            for name in ("kuairand_rank_ultra", "kuairand_rank_hstu")
        ),
        "the data could not be had where this was written",
    ),
    Row(
        "table 5",
        "depth 3 to 12: self-attention -0.46 % C-NE, cross-attention -0.14 %",
        ("ultra_hstu/nn/hstu.py:HSTU",),
        "-0.46 %",
        scaling.over_depth("ultra"),
        "cross-attention is not done: it scales worse in the paper",
    ),
    Row(
        "deployment",
        "18 layers, 16k events, hundreds of H100; 30 days online: +4.11 %, +2.27 %",
        published="+4.11 %, +2.27 %, +8.2 %, +4.34 %, +0.217 %, +0.037 %",
        here="not done: an online test",
    ),
    Row("tables 4, 6, 7, 10", "their content could not be had", here="not done: it is unknown"),
)
