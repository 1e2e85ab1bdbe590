"""Tables of the online deployment, from what `scripts.load.serve` recorded."""

import dataclasses
import json

from experiments import configs
from scripts.tables.records import NOT_MEASURED, cells, figure, load, markdown


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
        return f"```sh\n{address} -d '{request}'\n```\n\n```json\n{response}\n```"

    def load_table(self) -> str:
        """The rate over connections, the mixed load and the killed replica."""
        if not (record := load(self.record)):
            return NOT_MEASURED
        rates = ("{per_second:.0f}", "{p50_ms:.0f}", "{p99_ms:.0f}", "{max_ms:.0f}")
        rows = [cells(row, "{connections}", "{histories}", *rates) for row in record["rates"]]
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
            "{config}, history {history}, {what}, one replica{arguments} and the client on "
            "{host_cores} CPU cores; load average {load_average_before[0]:.1f} before and "
            "{load_average_after[0]:.1f} after{remark}.".format(
                what=what, arguments=arguments, remark=note, **record
            ),
            "Mixed: {requests:,} requests, {bad:,} of them bad, over {connections} connections: "
            "{per_second:.0f} a second, p99 {p99_ms:.0f} ms. {wrong_answers} wrong answers, {hung} "
            "hung, refused: {refused}. Memory of the replica after the first fifth of the "
            "requests: largest over smallest "
            "{rss_after_warm_up_largest_over_smallest:.3f}.".format(refused=refused, **mixed),
            "One of {replicas} replicas killed (SIGKILL) under load: {lost} of {requests:,} "
            "requests lost, {hung} hung, slowest answer {slowest_answered_s:.2f} s.".format(**kill),
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


def host_table_load() -> str:
    """The rate with the item table in host memory, beside that with the table on the device."""
    device, host = load(SCORE.record), load("serve_scores_int4_cpu")
    if not (device and host):
        return NOT_MEASURED
    rows = [
        [*cells(on_device, "{connections}", "{histories}", "{per_second:.0f}", "{p99_ms:.0f}")]
        + [*cells(on_host, "{per_second:.0f}", "{p99_ms:.0f}")]
        for on_device, on_host in zip(device["rates"], host["rates"], strict=True)
    ]
    header = ["connections", "histories", "requests/s", "p99 ms"]
    return markdown(
        [*header, "with --host_table=int4, requests/s", "p99 ms"],
        rows,
        "{config}, history {history}, {candidates} candidates, {items:,} items of width {width}, "
        "{host_cores} CPU cores, where a copy to the device saves nothing.".format(
            width=configs.named(host["config"]).model.width, **host
        ),
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
