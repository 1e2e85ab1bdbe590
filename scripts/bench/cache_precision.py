"""What a smaller cache costs: test metrics of a ranking run, by how keys and values are kept.

python -m scripts.bench.cache_precision --workdir=runs/assistments_rank_ultra/seed_42
    [--record=experiments/results/cache_precision.json] [--top_k=10 --requests=256] [--drop_blocks]

Every test event is predicted as a candidate behind its encoded history. With --top_k, the first
--requests of them are also answered with the best of all items, without features, as the exact
cache and as the smaller one rank them: the share of answers that stay, and the hit rate of the
requests' own items with a positive label.

--drop_blocks adds what it costs that full histories drop their oldest events an eighth of
`max_history` at a time (`experiments.serve --drop_blocks`): the same metrics, differences to the
exact scores, and hit rates.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import command
from experiments.record import Json, Record
from ultra_hstu import report, serving
from ultra_hstu.data.interactions import load_interactions
from ultra_hstu.nn.key_values import KINDS, CacheDtype
from ultra_hstu.ranking.evaluate import RequestEvaluator
from ultra_hstu.ranking.task import RankingTask
from ultra_hstu.serving.tokens import kept_in_blocks
from ultra_hstu.workdir import Workdir

FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    folder = Workdir(FLAGS.workdir)
    config = folder.read_for_one_device(FLAGS.raw_dir)
    task = RankingTask.of(config, load_interactions(config.data))
    folder.check_data(task.interactions)
    step, params = serving.load_params(folder, task.recipe)
    record = Record(
        FLAGS.record,
        config=config.name,
        model=dataclasses.asdict(config.model),
        eval=config.evaluation,
        step=step,
    )
    console = report.make_console()
    with jax.default_matmul_precision(config.train.matmul_precision):
        evaluator = task.evaluator("test")
        record.values["full_pass"] = evaluator(params)
        model = serving.CompiledRanker(task.recipe.model(params))
        requests = list(request_batches(task, model))
        kinds: dict[str, Json] = {}
        exact: Answers | None = None
        for kind in KINDS:
            kinds[kind], answers = measure(task, model, evaluator, requests, kind, exact)
            exact = exact or answers
            console.print(kind, kinds[kind])
            record.add(kinds=kinds)
        if FLAGS.drop_blocks:
            requests = list(request_batches(task, model, drop_blocks=True))
            in_blocks = measure(task, model, evaluator, requests, "same", exact)[0]
            console.print("full histories in blocks", in_blocks)
            record.add(drop_blocks=in_blocks)


class Answers(NamedTuple):
    """Logits of all test events, and the best items of some requests, [B, K] a batch."""

    logit_PK: np.ndarray
    best: list[np.ndarray]


RequestBatch = tuple[serving.UserHistory, serving.Candidates, np.ndarray]


def request_batches(
    task: RankingTask, model: serving.CompiledRanker, *, drop_blocks: bool = False
) -> Iterator[RequestBatch]:
    """(history, candidates, labels) of `train.eval_users` test requests at a time.

    They come in the order of `RequestEvaluator.event_P`.

    Args:
      drop_blocks: full histories have dropped their oldest events in blocks, as a server drops
        them.
    """
    loader = task.loader("test", batch_users=task.config.train.eval_users, steps_per_call=1)
    plan = loader.plan(shuffle=False)
    for step in range(len(plan)):
        columns = {name: column[0] for name, column in plan.columns(np.array([step])).items()}
        for name, longest in model.form.max_history if drop_blocks else ():
            first = task.parts.first[columns["user"]]
            if name in task.events.index:
                first = np.searchsorted(task.events.index[name], first)
            stop = columns[f"stop/{name}"]
            kept = [kept_in_blocks(max(0, int(count)), longest) for count in stop - first]
            columns[f"start/{name}"] = stop - np.array(kept)
        history, candidates = serving.from_source(task.events, columns, model.form)
        first = np.asarray(columns["target"], np.int64)
        event_C = np.concatenate(
            [first[b] + np.arange(count) for b, count in enumerate(columns["count"])]
        ).astype(np.int64)
        yield history, candidates, np.asarray(task.events.label_EK)[event_C, 0]


def measure(
    task: RankingTask,
    model: serving.CompiledRanker,
    evaluator: RequestEvaluator,
    requests: list[RequestBatch],
    kind: CacheDtype,
    exact: Answers | None,
) -> tuple[Json, Answers]:
    """Metrics under one kind of cache, beside the answers of the exact one; and its answers."""
    logits: list[np.ndarray] = []
    best: list[np.ndarray] = []
    hits = liked_items = size = rows = 0
    items = np.arange(1, task.interactions.num_items + 1)
    for history, candidates, label_C in requests:
        cache = serving.encode_history(model, history, kind=kind)
        logits.append(serving.score(model, cache, candidates))
        layers = [layer for part in cache.parts for layer in part.layers]
        size += sum(layer.nbytes for layer in layers)
        rows += sum(layer.k_SHK.shape[0] for layer in layers)
        if len(best) < -(-FLAGS.requests // task.config.train.eval_users) and FLAGS.top_k:
            some = len(np.atleast_1d(history.now_B))
            features = [np.zeros((len(items), candidates.feature_CF.shape[1]), np.int32)] * some
            everything = serving.Candidates.of([items] * some, np.asarray(history.now_B), features)
            top = items[serving.top_k(model, cache, everything, k=FLAGS.top_k).place_BK]
            best.append(top)
            for user, (start, stop) in enumerate(
                zip(candidates.offsets, candidates.offsets[1:], strict=False)
            ):
                liked = candidates.item_C[start:stop][label_C[start:stop] > 0]
                hits += int(np.isin(liked, top[user]).sum())
                liked_items += len(liked)
    logit_PK = np.concatenate(logits)
    found: Json = {
        "metrics": evaluator.metrics(logit_PK),
        "bytes_a_row_and_layer": size / rows,
    }
    if exact is not None:
        error = logit_PK - exact.logit_PK
        found |= {
            "rms_logit_error": float(np.sqrt((error**2).mean())),
            "largest_logit_error": float(np.abs(error).max()),
        }
    if FLAGS.top_k:
        found[f"hr@{FLAGS.top_k}"] = hits / max(liked_items, 1)
        if exact is not None:
            same = [
                np.isin(a, b).mean()
                for mine, theirs in zip(best, exact.best, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            ]
            found["answers_that_stay"] = float(np.mean(same))
    return found, Answers(logit_PK, best)


if __name__ == "__main__":
    command.define_run("folder of a trained ranking run")
    flags.DEFINE_integer(
        "top_k", 0, "also rank all items for every request, and look at so many; 0: not"
    )
    flags.DEFINE_integer(
        "requests", 256, "requests to answer from all items; rounded up to whole batches"
    )
    flags.DEFINE_bool(
        "drop_blocks", False, "also with the oldest events of full histories dropped in blocks"
    )
    command.define_record()
    command.run(main)
