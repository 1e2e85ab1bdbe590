"""Writes the tables and figures of the README and the docs from experiments/results.

The fields of a configuration come from its dataclasses.

python -m scripts.tables.make [--check]

No number is typed by hand. A table stands in its page between `<!-- table NAME -->` and
`<!-- end NAME -->`. `--check` changes nothing and fails if a table is not current.
"""

import functools
from collections.abc import Callable

from absl import flags

from experiments import command
from scripts.tables import (
    attention,
    configuration,
    context_parallel,
    data,
    features,
    layer,
    long,
    loss,
    mini_sequences,
    mixture,
    movielens,
    overview,
    ranking,
    retrieval,
    runs,
    sampling,
    scaling,
    speed,
    step,
    windows,
)
from scripts.tables import serve as serve_tables
from scripts.tables import serving as serving_tables
from scripts.tables.papers import PAPERS, row
from scripts.tables.records import NOT_MEASURED, ROOT, noting

PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "overview": overview.overview_table,
        "walkthrough": overview.walkthrough,
    },
    "docs/results.md": {
        **movielens.tables(),
        "ml1m_picture": movielens.seconds_picture,
        "compared": movielens.compared_table,
        "exact_times": movielens.exact_times_table,
        "search": movielens.search_table,
        "runs": runs.runs_table,
        "speed": retrieval.speed_table,
        "small_sets": retrieval.sets_table,
        "published_sets": runs.published_sets_table,
        "ranking": ranking.ranking_table,
        "ablation": ranking.ablation_table,
        "attention": attention.attention_table,
        "attention_picture": attention.attention_picture,
        "test_gpu": attention.gpu_tests_table,
    },
    "docs/configuration.md": {"fields": configuration.field_tables},
    "docs/evaluation.md": {
        "evaluation": retrieval.evaluation_table,
        "evaluation_ranking": ranking.evaluation_table,
    },
    "docs/ultra_hstu.md": {
        "long_ultra": long.long_ultra_table,
        "long_operations": long.long_operations_table,
        "layer_memory": long.layer_memory_table,
    },
    "docs/fused_layer.md": {
        "layer": layer.layer_table,
        "layer_precision": layer.layer_precision_table,
        "layer_kernels": layer.layer_kernels_table,
    },
    "docs/context_parallel.md": {
        "context_steps": context_parallel.steps_table,
        "context_longest": context_parallel.longest_table,
        "context_balance": context_parallel.balance_table,
    },
    "docs/exchanged_batches.md": {
        "context_batches": context_parallel.batches_table,
        "context_reshard": context_parallel.reshard_table,
    },
    "docs/losses.md": {
        "loss_gpu": loss.gpu_table,
        "loss_cpu": loss.cpu_table,
        "negatives": loss.negatives_table,
    },
    "docs/mixture_of_logits.md": {"mol_top_k": mixture.top_k_table},
    "docs/http_service.md": {
        "serve_example": serve_tables.RECOMMEND.example,
        "score_example": serve_tables.SCORE.example,
    },
    "docs/deployment.md": {
        "serve_load": serve_tables.RECOMMEND.load_table,
        "serve_stages": serve_tables.RECOMMEND.stages_table,
        "score_load": serve_tables.SCORE.load_table,
        "score_stages": serve_tables.SCORE.stages_table,
        "host_table_load": serve_tables.host_table_load,
    },
    "docs/mini_sequences.md": {
        "mini_longest": mini_sequences.longest_table,
        "mini_held": mini_sequences.held_table,
        "mini_state": mini_sequences.state_table,
        "mini_head": mini_sequences.head_table,
        "mini_confirmed": mini_sequences.confirmed_table,
        "long_mst": long.long_mst_table,
    },
    "docs/sampling_and_precision.md": {
        "stochastic_length": sampling.stochastic_length_table,
        "sparsity": sampling.sparsity_table,
        "sampled_ranking": sampling.sampled_ranking_table,
        "load_balance": sampling.load_balance_table,
        "load_balance_ranks": sampling.load_balance_ranks_table,
        "int4": sampling.int4_table,
        "host_requests": serving_tables.host_requests_table,
    },
    "docs/tables_and_rows.md": {
        "last_layer": step.last_layer_table,
        "table_sizes": step.sizes_table,
        "ranking_step": step.ranking_step_table,
        "repeated_ids": step.repeated_table,
    },
    "docs/ranking.md": {
        "signal_effects": ranking.signal_effects_table,
        "generative": ranking.generative_table,
        "softmax": ranking.softmax_table,
    },
    "docs/features.md": {"item_features": features.item_features_table},
    "docs/scaling.md": {
        "floor": scaling.floor_table,
        "pieces": scaling.pieces_table,
        "scaling_picture": scaling.scaling_picture,
        "scaling_runs": scaling.runs_table,
        "scaling_fits": scaling.fits_table,
        "power_laws": scaling.power_law_table,
        "stream": scaling.stream_table,
        "generated": scaling.generated_table,
    },
    "docs/windows.md": {
        "swap": windows.swap_table,
        "windows": windows.compared_table,
        "windows_ml1m": windows.windows_table,
    },
    "docs/papers.md": {
        f"papers_{name}": functools.partial(row.table, rows) for name, rows in PAPERS.items()
    },
    "docs/your_data.md": {"prepare": data.prepare_table},
    "docs/short_sequences.md": {"short": attention.short_table},
    "docs/speed.md": {"step_by_kernel": speed.step_table, "start": speed.start_table},
    "docs/large_data.md": {"streaming": speed.streaming_table},
    "docs/datasets.md": {
        "sets": data.sets_table,
        "categories": data.categories,
        "lengths": data.lengths_table,
    },
    "docs/cached_scoring.md": {
        "serving_operations": serving_tables.operations_table,
        "serving": serving_tables.serving_table,
        "serving_micro_batches": serving_tables.micro_batches_table,
        "cache_precision": serving_tables.cache_precision_table,
        "rank_positions": ranking.positions_table,
        "one_event": serving_tables.one_event_table,
        "drop_blocks": serving_tables.drop_blocks_table,
        "host_tables": serving_tables.host_tables_table,
    },
}
FIGURES = (
    movielens.seconds_figure,
    sampling.load_balance_figure,
    attention.attention_figure,
    serving_tables.serving_figure,
    serve_tables.serve_figure,
    context_parallel.context_parallel_figure,
    windows.draw,
    scaling.scaling_figure,
)


def with_records(table: Callable[[], str]) -> str:
    """A table, and links to the records that it does not name itself; of one without any record,
    the command that writes it."""
    with noting() as loaded:
        text = table()
    if text == NOT_MEASURED:
        commands = dict.fromkeys(filter(None, map(row.command, loaded)))
        return ": ".join([text, *(f"`{one}`" for one in [*commands][:1])])
    links = [
        f"[`{name}`](../experiments/results/{name}.json)"
        for name, there in loaded.items()
        if there and f"`{name}`" not in text
    ]
    if text.startswith("```") or not links:
        return text
    return f"{text}\n\nRecord{'s' * (len(links) > 1)}: {', '.join(links)}."


def with_tables(text: str, page: str) -> str:
    """Raises ValueError where the page has no place for one of its tables."""
    for name, table in PAGES[page].items():
        start, end = f"<!-- table {name} -->\n", f"\n<!-- end {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page} has no '{start.strip()}' ... '{end.strip()}'")
        made = table() if page == "README.md" else with_records(table)
        text = before + start + made + end + after
    return text


def main(_: list[str]) -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        current = with_tables(text, page)
        if not flags.FLAGS.check:
            path.write_text(current)
        elif current != text:
            raise ValueError(f"{page}: tables are not current; run make tables")
    if not flags.FLAGS.check:
        for draw in FIGURES:
            draw()


if __name__ == "__main__":
    flags.DEFINE_bool("check", False, "change nothing; fail if a table is not current")
    command.run(main)
