"""Tables of the online deployment, from what `scripts.load_serve` recorded."""

import json
from typing import Any

from scripts.tables import NOT_MEASURED, load, markdown

STAGES = {
    "read": "reading the JSON",
    "prepare": "ids, times, hidden items",
    "encode": "the history's vector, in a call of 8",
    "best": "the catalogue and titles, in a call of 8",
    "write": "writing the JSON",
}


def _record() -> dict[str, Any] | None:
    return load("serve_load_cpu")


def serve_example() -> str:
    """A request and its answer, over HTTP."""
    record = _record()
    if not record:
        return NOT_MEASURED
    sent = f"curl -s localhost:8000/recommend -H 'content-type: application/json' -d '{json.dumps(record['example']['request'])}'"
    return f"    {sent}\n\n```json\n{json.dumps(record['example']['answer'], indent=1, ensure_ascii=False)}\n```"


def serve_load_table() -> str:
    """The rate over connections, the mixed load and the killed replica."""
    record = _record()
    if not record:
        return NOT_MEASURED
    rows = [
        [str(row["connections"]), row["histories"], *(f"{row[name]:.0f}" for name in ("per_second", "p50_ms", "p99_ms", "max_ms"))]
        for row in record["rates"]
    ]
    mixed, kill = record["mixed"], record["kill"]
    bad = ", ".join(f"{count} x {status}" for status, count in mixed["statuses"].items() if status != "200")
    before, after = (load_average[0] for load_average in (record["load_average_before"], record["load_average_after"]))
    return "\n\n".join(
        [
            markdown(["connections", "histories", "requests/s", "p50 ms", "p99 ms", "slowest ms"], rows),
            f"{record['config']}, history {record['history']}, top 10 of {record['items']:,} items, one replica and the client on "
            f"{record['host_cores']} CPU cores; load average {before:.1f} before and {after:.1f} after"
            f"{'; ' + record['note'] if 'note' in record else ''}.",
            f"Mixed: {mixed['requests']:,} requests, {mixed['bad']:,} of them bad, over {mixed['connections']} connections: "
            f"{mixed['per_second']:.0f} a second, p99 {mixed['p99_ms']:.0f} ms. {mixed['wrong_answers']} wrong answers, {mixed['hung']} hung, "
            f"refused: {bad}. Memory of the replica after the first fifth of the requests: largest over smallest "
            f"{mixed['rss_after_warm_up_largest_over_smallest']:.3f}.",
            f"One of {kill['replicas']} replicas killed (SIGKILL) under load: {kill['lost']} of {kill['requests']:,} requests lost, "
            f"{kill['hung']} hung, slowest answer {kill['slowest_answered_s']:.2f} s.",
        ]
    )


def serve_stages_table() -> str:
    """Where the time of a request goes, outside HTTP."""
    record = _record()
    if not record:
        return NOT_MEASURED
    rows = [[words, f"{record['stages_ms'][name]:.2f}"] for name, words in STAGES.items()]
    return markdown(["part of a request", "ms"], rows)
