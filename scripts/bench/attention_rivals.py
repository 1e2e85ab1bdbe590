"""Times attention of others on the workloads of `scripts.bench.attention`.

That starts this file as a process of its own: PyTorch and JAX in one process would share the GPU's
memory badly, and jax-triton empties the cache that Triton compiles into.

    python scripts/bench/attention_rivals.py < request.json

The request: {"checkout": a folder with the public generative-recommenders repository, "workloads":
[{name, lengths, heads, k_width, v_width, window, max_length}]}. Lines that begin with RECORD go to
stdout as they come: {versions, cudnn}, then {workload, implementation, pass, ms, peak_mib, error,
note}, or {workload, implementation, reason}.

`meta_triton`: HSTU attention of that repository, causal or windowed. It tunes itself; the key of
its choice is made to hold the length, and a change of mask empties its choices. Its forward reads
by TMA, which is not its default and is faster, where lengths are equal: on uneven ones, and in its
backward, that variant ended in an illegal memory access. One such access is the end of the process,
so workloads of uneven lengths come last.
`meta_triton_default`: its forward without TMA, for windows.
`cudnn_sdpa`: softmax attention of cuDNN through PyTorch, causal, on equal lengths: another
function, with the same two products.
"""

import concurrent.futures
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime._async_compile import AsyncCompileMode

RECORD = "RECORD"
Json = dict[str, Any]
Outputs = dict[str, torch.Tensor]
# Name, function, whether a CUDA graph can hold it, note. Softmax is another function: its outputs
# are not compared.
Pass = tuple[str, Callable[[], Outputs | None], bool, str]


def timed(
    run: Callable[[], Outputs | None], graph: bool, samples: int = 7, sample_ms: float = 20.0
) -> float:
    """Milliseconds of a call: the median over samples of calls back to back.

    graph: replay the calls from a CUDA graph, so that launching them costs nothing.
    """
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(body: Callable[[], Outputs | None]) -> float:
        begin.record()
        body()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    calls = max(1, min(200, round(sample_ms / max(once(run), 1e-3))))

    def several() -> None:
        for _ in range(calls):
            run()

    body = several
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            several()
        body = recorded.replay
    body()
    return statistics.median(once(body) / calls for _ in range(samples))


class Arrays:
    """Random q, k, v, g of a workload, flat and jagged; offsets."""

    def __init__(self, w: Json) -> None:
        torch.manual_seed(0)
        rows = sum(w["lengths"])
        widths = (w["k_width"], w["k_width"], w["v_width"], w["v_width"])
        self.q, self.k, self.v, self.g = (
            torch.randn(rows, w["heads"], n, device="cuda", dtype=torch.bfloat16) for n in widths
        )
        self.offsets = torch.tensor([0, *w["lengths"]], device="cuda").cumsum(0)
        self.alpha = w["k_width"] ** -0.5


def sampled_error(w: Json, x: Arrays, got: Outputs, samples: int = 8) -> float:
    """Largest relative error of some rows of the output, or of keys for gradients; float64."""
    window = w["window"] if w["window"] is not None else w["max_length"]
    offsets, worst = x.offsets.tolist(), 0.0
    rows = torch.arange(offsets[-1], device="cuda")
    for sample in range(samples):
        at, head = (offsets[-1] - 1) * sample // (samples - 1), sample % w["heads"]
        sequence = max(b for b in range(len(offsets) - 1) if offsets[b] <= at)
        low, high = offsets[sequence], offsets[sequence + 1]
        keys, seers = rows[max(low, at - window) : at + 1], rows[at : min(high, at + window + 1)]

        def of(name: str, chosen: torch.Tensor | int, head: int = head) -> torch.Tensor:
            return getattr(x, name)[chosen, head].double()

        def silu_and_slope(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate = torch.sigmoid(score)
            return score * gate, gate * (1 + score * (1 - gate))

        weight, slope = silu_and_slope(x.alpha * of("k", keys) @ of("q", at))
        back, back_slope = silu_and_slope(x.alpha * of("q", seers) @ of("k", at))
        want = {
            "out": weight @ of("v", keys),
            "dq": x.alpha * (slope * (of("v", keys) @ of("g", at))) @ of("k", keys),
            "dk": x.alpha * (back_slope * (of("g", seers) @ of("v", at))) @ of("q", seers),
            "dv": back @ of("g", seers),
        }
        for name, value in got.items():
            expected = want[name] / w["max_length"]
            worst = max(
                worst, float((value[at, head].double() - expected).norm() / expected.norm())
            )
    return worst


class Meta:
    """The kernel of a checkout, imported once."""

    def __init__(self, checkout: str) -> None:
        sys.path.insert(0, checkout)
        from generative_recommenders import common
        from generative_recommenders.ops.triton import triton_hstu_attention as module

        common.set_use_runtime_max_seq_len(True)
        self.module = module
        self.mask: int | None = None
        self.tuners = [module._hstu_attn_fwd, module._hstu_attn_bwd]
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        for tuner in self.tuners:
            self._tune_in_parallel(tuner)

    def _tune_in_parallel(self, tuner: Any) -> None:
        """All candidates are compiled at a time.

        One that cannot be compiled, which the tuner would not survive, costs infinitely much.
        """
        prune, bench = tuner.prune_configs, tuner._bench

        def compiled(options: Json) -> Any:
            configs = prune(options)
            with AsyncCompileMode(self.pool, ignore_errors=True):
                for config in configs:
                    arguments = {
                        name: x for name, x in options.items() if name != "warmup"
                    } | config.all_kwargs()
                    config.pre_hook({**tuner.nargs, **arguments})
                    tuner.fn.warmup(**arguments)
            return configs

        def cost(*args: Any, **options: Any) -> Any:
            try:
                return bench(*args, **options)
            except Exception:  # whatever a compiler raises
                return [float("inf")] * 3

        tuner.prune_configs, tuner._bench = compiled, cost
        tuner.do_bench = lambda run, quantiles: [timed(run, False, samples=3, sample_ms=0.0)] * 3

    def _options(self, w: Json, x: Arrays) -> Json:
        window = w["window"] or 0
        if self.mask != window:
            for tuner in self.tuners:
                tuner.cache.clear()
            self.mask = window
        return {
            "q": x.q,
            "k": x.k,
            "v": x.v,
            "N": w["max_length"],
            "alpha": x.alpha,
            "seq_offsets": x.offsets,
            "num_targets": None,
            "max_attn_len": window,
            "contextual_seq_len": 0,
            "num_softmax_heads": 0,
        }

    def without_tma(self, w: Json, x: Arrays) -> list[Pass]:
        if w["window"] is None:
            raise NotImplementedError("timed for windows only")
        self.mask = None  # choices are made anew, before and after
        options = self._options(w, x)
        self.mask = None

        def forward() -> Outputs:
            return self._forward(None, False, options)

        return [("forward", forward, True, "without TMA")]

    def _forward(self, order: torch.Tensor | None, tma: bool, options: Json) -> Outputs:
        run = self.module.triton_hstu_attention_fwd
        return {"out": run(sort_by_length_indices=order, enable_tma=tma, **options)}

    def passes(self, w: Json, x: Arrays) -> list[Pass]:
        uneven, options = len(set(w["lengths"])) > 1, self._options(w, x)

        def order() -> torch.Tensor | None:
            lengths = x.offsets[1:] - x.offsets[:-1]
            return torch.sort(lengths, descending=True)[1] if uneven else None

        gradients = {f"d{name}": torch.empty_like(getattr(x, name)) for name in "qkv"}
        kept = order()

        def forward() -> Outputs:
            return self._forward(order(), not uneven, options)

        def backward() -> Outputs:
            run = self.module.triton_hstu_attention_bwd
            run(dout=x.g, **gradients, sort_by_length_indices=kept, enable_tma=False, **options)
            return gradients

        return [
            ("forward", forward, True, "without TMA" if uneven else "TMA"),
            ("backward", backward, True, "without TMA"),
        ]


def cudnn_passes(w: Json, x: Arrays) -> list[Pass]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if len(set(w["lengths"])) > 1 or w["window"] is not None:
        raise NotImplementedError("equal lengths and no window only")

    def dense(y: torch.Tensor) -> torch.Tensor:
        return (
            y.reshape(len(w["lengths"]), -1, *y.shape[1:])
            .transpose(1, 2)
            .contiguous()
            .requires_grad_()
        )

    q, k, v, g = (dense(y) for y in (x.q, x.k, x.v, x.g))

    def attend() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    out = attend()

    def forward() -> None:
        attend()

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

    return [("forward", forward, False, "softmax"), ("backward", backward, False, "softmax")]


def measure(
    w: Json, implementation: str, make: Callable[[Json, "Arrays"], list[Pass]]
) -> list[Json]:
    label = {"workload": w["name"], "implementation": implementation}
    try:
        x, records = Arrays(w), []
        for name, run, graph, note in make(w, x):
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            got = run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
            error = None if got is None else sampled_error(w, x, got)
            found = {"pass": name, "ms": timed(run, graph), "peak_mib": peak, "error": error}
            records.append(label | found | {"note": note})
        return records
    except (NotImplementedError, RuntimeError) as error:
        return [label | {"reason": str(error).splitlines()[0]}]


def say(record: Json) -> None:
    print(RECORD, json.dumps(record), flush=True)


def main() -> None:
    request = json.load(sys.stdin)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions["cuda"] = torch.version.cuda
    say({"versions": versions, "cudnn": torch.backends.cudnn.version()})
    meta = Meta(request["checkout"])
    for w in sorted(request["workloads"], key=lambda w: len(set(w["lengths"]))):
        for name, make in {
            "cudnn_sdpa": cudnn_passes,
            "meta_triton_default": meta.without_tma,
            "meta_triton": meta.passes,
        }.items():
            for record in measure(w, name, make):
                say(record)


if __name__ == "__main__":
    main()
