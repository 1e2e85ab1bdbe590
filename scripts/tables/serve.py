"""Tables of the online deployment, from what `scripts.load.serve` recorded."""

import json

import matplotlib.pyplot as plt

from scripts.tables.tables import FIGURES, NOT_MEASURED, load, markdown

RECOMMEND, SCORE = (
    "serve_load_cpu",
    "serve_scores_cpu",
)  # records of a retrieval and of a ranking run
STAGES = {
    RECOMMEND: {
        "read": "reading the JSON",
        "prepare": "ids, times, hidden items",
        "encode": "the history's vector, in a call of 8",
        "best": "the catalogue and titles, in a call of 8",
        "write": "writing the JSON",
    },
    SCORE: {
        "read": "reading the JSON",
        "prepare": "ids, times, codes",
        "encode": "the history's keys and values, in a call of 8",
        "score": "the candidates, in a call of 8",
        "write": "titles, writing the JSON",
    },
}


def example(name: str) -> str:
    """A request and its answer, over HTTP."""
    record = load(name)
    if not record:
        return NOT_MEASURED
    path = {RECOMMEND: "recommend", SCORE: "score"}[name]
    sent = f"curl -s localhost:8000/{path} -H 'content-type: application/json' -d '{json.dumps(record['example']['request'])}'"
    return f"    {sent}\n\n```json\n{json.dumps(record['example']['answer'], indent=1, ensure_ascii=False)}\n```"


def load_table(name: str) -> str:
    """The rate over connections, the mixed load and the killed replica."""
    record = load(name)
    if not record:
        return NOT_MEASURED
    rows = [
        [
            str(row["connections"]),
            row["histories"],
            *(f"{row[key]:.0f}" for key in ("per_second", "p50_ms", "p99_ms", "max_ms")),
        ]
        for row in record["rates"]
    ]
    mixed, kill = record["mixed"], record["kill"]
    bad = ", ".join(
        f"{count} x {status}" for status, count in mixed["statuses"].items() if status != "200"
    )
    before, after = (
        load_average[0]
        for load_average in (record["load_average_before"], record["load_average_after"])
    )
    what = (
        f"{record['candidates']} candidates"
        if name == SCORE
        else f"top 10 of {record['items']:,} items"
    )
    return "\n\n".join(
        [
            markdown(
                ["connections", "histories", "requests/s", "p50 ms", "p99 ms", "slowest ms"], rows
            ),
            f"{record['config']}, history {record['history']}, {what}, one replica{' with ' + record['serve'] if record['serve'] else ''} and the client "
            f"on {record['host_cores']} CPU cores; load average {before:.1f} before and {after:.1f} after"
            f"{'; ' + record['note'] if 'note' in record else ''}.",
            f"Mixed: {mixed['requests']:,} requests, {mixed['bad']:,} of them bad, over {mixed['connections']} connections: "
            f"{mixed['per_second']:.0f} a second, p99 {mixed['p99_ms']:.0f} ms. {mixed['wrong_answers']} wrong answers, {mixed['hung']} hung, "
            f"refused: {bad}. Memory of the replica after the first fifth of the requests: largest over smallest "
            f"{mixed['rss_after_warm_up_largest_over_smallest']:.3f}.",
            f"One of {kill['replicas']} replicas killed (SIGKILL) under load: {kill['lost']} of {kill['requests']:,} requests lost, "
            f"{kill['hung']} hung, slowest answer {kill['slowest_answered_s']:.2f} s.",
        ]
    )


def stages_table(name: str) -> str:
    """Where the time of a request goes, outside HTTP."""
    record = load(name)
    if not record:
        return NOT_MEASURED
    rows = [[words, f"{record['stages_ms'][stage]:.2f}"] for stage, words in STAGES[name].items()]
    return markdown(["part of a request", "ms"], rows)


def serve_figure() -> None:
    """Requests a second against latency, and the memory of a replica under the mixed load."""
    record = load(RECOMMEND)
    if not record:
        return
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for histories, colour in (("new", "tab:red"), ("known", "tab:blue")):
        rows = [row for row in record["rates"] if row["histories"] == histories]
        for quantile, line in (("p50_ms", ":"), ("p99_ms", "-")):
            x, y = [row["per_second"] for row in rows], [row[quantile] for row in rows]
            speed.plot(
                x,
                y,
                line,
                marker="o",
                markersize=4,
                color=colour,
                label=f"{histories} histories, {quantile[:3]}",
            )
        for row in rows:
            speed.annotate(
                str(row["connections"]),
                (row["per_second"], row["p99_ms"]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    speed.set(
        xlabel="requests/s",
        ylabel="latency, ms",
        title="closed loop, number of connections beside p99",
        ylim=(0, None),
        xlim=(0, None),
    )
    speed.legend(frameon=False, fontsize=8)
    memory.plot(*zip(*record["mixed"]["rss_mib"], strict=True), color="tab:grey")
    memory.set(
        xlabel="good and bad requests answered",
        ylabel="MiB",
        title="memory of the replica",
        ylim=(0, 1.2 * record["mixed"]["rss_mib"][-1][1]),
    )
    for axis in (speed, memory):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / "serve_load.png", dpi=130)
    plt.close(figure)
