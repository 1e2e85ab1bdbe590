"""Tables of the online deployment, from what `scripts.load.serve` recorded."""

import dataclasses
import json

from scripts.tables.records import NOT_MEASURED, figure, load, markdown


@dataclasses.dataclass(frozen=True)
class Deployment:
    """The record of a retrieval or a ranking run under load."""

    record: str
    path: str
    stages: dict[str, str]

    def example(self) -> str:
        """A request and its answer, over HTTP."""
        if not (record := load(self.record)):
            return NOT_MEASURED
        example = record["example"]
        address = f"curl -s localhost:8000/{self.path} -H 'content-type: application/json'"
        response = json.dumps(example["answer"], indent=1, ensure_ascii=False)
        request = json.dumps(example["request"])
        return f"    {address} -d '{request}'\n\n```json\n{response}\n```"

    def load_table(self) -> str:
        """The rate over connections, the mixed load and the killed replica."""
        if not (record := load(self.record)):
            return NOT_MEASURED
        columns = ("per_second", "p50_ms", "p99_ms", "max_ms")
        rows = [
            [str(row["connections"]), row["histories"], *(f"{row[key]:.0f}" for key in columns)]
            for row in record["rates"]
        ]
        mixed, kill = record["mixed"], record["kill"]
        refused = ", ".join(
            f"{count} x {status}" for status, count in mixed["statuses"].items() if status != "200"
        )
        what = f"top 10 of {record['items']:,} items"
        if "candidates" in record:
            what = f"{record['candidates']} candidates"
        arguments = f" with {record['serve']}" if record["serve"] else ""
        note = f"; {record['note']}" if "note" in record else ""
        return markdown(
            ["connections", "histories", "requests/s", "p50 ms", "p99 ms", "slowest ms"],
            rows,
            f"{record['config']}, history {record['history']}, {what}, one replica{arguments} and "
            f"the client on {record['host_cores']} CPU cores; load average "
            f"{record['load_average_before'][0]:.1f} before and "
            f"{record['load_average_after'][0]:.1f} after{note}.",
            f"Mixed: {mixed['requests']:,} requests, {mixed['bad']:,} of them bad, over "
            f"{mixed['connections']} connections: {mixed['per_second']:.0f} a second, p99 "
            f"{mixed['p99_ms']:.0f} ms. {mixed['wrong_answers']} wrong answers, {mixed['hung']} "
            f"hung, refused: {refused}. Memory of the replica after the first fifth of the "
            "requests: largest over smallest "
            f"{mixed['rss_after_warm_up_largest_over_smallest']:.3f}.",
            f"One of {kill['replicas']} replicas killed (SIGKILL) under load: {kill['lost']} of "
            f"{kill['requests']:,} requests lost, {kill['hung']} hung, slowest answer "
            f"{kill['slowest_answered_s']:.2f} s.",
        )

    def stages_table(self) -> str:
        """Where the time of a request goes, outside HTTP."""
        if not (record := load(self.record)):
            return NOT_MEASURED
        times = record["stages_ms"]
        rows = [[words, f"{times[stage]:.2f}"] for stage, words in self.stages.items()]
        return markdown(["part of a request", "ms"], rows)


RECOMMEND = Deployment(
    "serve_load_cpu",
    "recommend",
    {
        "read": "reading the JSON",
        "prepare": "ids, times, hidden items",
        "encode": "the history's vector, in a call of 8",
        "best": "the catalogue and titles, in a call of 8",
        "write": "writing the JSON",
    },
)
SCORE = Deployment(
    "serve_scores_cpu",
    "score",
    {
        "read": "reading the JSON",
        "prepare": "ids, times, codes",
        "encode": "the history's keys and values, in a call of 8",
        "score": "the candidates, in a call of 8",
        "write": "titles, writing the JSON",
    },
)


def serve_figure() -> None:
    """Requests a second against latency, and the memory of a replica under the mixed load."""
    record = load(RECOMMEND.record)
    if not record:
        return
    with figure("serve_load", 9, 3.4) as drawn:
        speed, memory = drawn.subplots(1, 2)
        for histories, colour in (("new", "tab:red"), ("known", "tab:blue")):
            rows = [row for row in record["rates"] if row["histories"] == histories]
            rates = [row["per_second"] for row in rows]
            for quantile, line in (("p50_ms", ":"), ("p99_ms", "-")):
                speed.plot(
                    rates,
                    [row[quantile] for row in rows],
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
        speed.set(xlabel="requests/s", ylabel="latency, ms", xlim=(0, None), ylim=(0, None))
        speed.set_title("closed loop, number of connections beside p99")
        speed.legend(frameon=False, fontsize=8)
        sizes = record["mixed"]["rss_mib"]
        memory.plot(*zip(*sizes, strict=True), color="tab:grey")
        memory.set(xlabel="good and bad requests answered", ylabel="MiB")
        memory.set(title="memory of the replica", ylim=(0, 1.2 * sizes[-1][1]))
        for axis in (speed, memory):
            axis.grid(alpha=0.3)
