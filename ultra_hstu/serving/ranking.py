"""M-FALCON (HSTU, arXiv 2402.17152, section 3.4): a user's history is encoded once, and any number of candidates are scored against it.

Scores are those of one full forward pass with all candidates as its targets, to rounding, in whatever batches they are worked off. Every function takes a
`Ranker`, or a `FrozenRanker` made of one beforehand; `History`, `Candidates` and `Cache` hold NumPy arrays or anything like it, and results are NumPy.
Arguments are annotated as `Any` because they are checked here, with errors that name the value and the remedy.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

from ultra_hstu.nn.key_values import KINDS
from ultra_hstu.serving.cache import Cache, check_cache, growth
from ultra_hstu.serving.capacity import LEAST_ROWS, Room, capacity, padded, padded_offsets
from ultra_hstu.serving.frozen import Channel, FrozenRanker, frozen
from ultra_hstu.serving.inputs import (
    Candidates,
    History,
    check_candidates,
    check_history,
    joined,
    newest,
)
from ultra_hstu.serving.tokens import pad_candidates, pad_history

MICRO_BATCH = 2048


class Best(NamedTuple):
    place_BK: Int32[
        np.ndarray, "B k"
    ]  # among the user's candidates, best first; -1 where a user has fewer
    score_BK: Float32[np.ndarray, "B k"]


def encode_history(
    model: Any, history: Any, *, kind: Any = "same", room: Room | None = None
) -> Cache:
    """Keys and values of the histories of B users in every layer.

    An empty history is a legal one: candidates then see the user's contextual tokens and themselves. Of a longer one than the model takes, the newest
    events count, as in training.

    Args:
      kind: how keys and values are kept: in the model's dtype ("same", exact), or rounded to "bfloat16", "int8" or "fp8".
      room: sizes to compile for; None, those of the histories' capacity class.

    Raises:
      ValueError: what `inputs.check_history` refuses; another kind; a room that is too small.
    """
    model = frozen(model)
    if kind not in KINDS:
        raise ValueError(f"{kind=} must be one of {', '.join(KINDS)}")
    history = check_history(history, model.form, model.sizes)
    request, rows, table = _request(model, history, room)
    channels = {
        name: model.programs.encode(
            model.params, request, table, name=name, rows=rows[name], kind=kind
        )
        for name in model.encoders
    }
    return Cache(channels, history, model.mark, model.signature, kind)


def append(model: Any, cache: Any, new_events: Any, *, implementation: Any = None) -> Cache:
    """The cache after more events of its users; equal, to rounding, to that of the longer histories.

    Only rows that can have changed are computed, see `cache.growth`; where all have, the histories are encoded anew. Under a rounded `kind` new rows work
    on rounded keys and values of the old ones, which a new encoding would not.

    Args:
      new_events: of each user the events since, none for some; when the next request is made; contextual features count if the model has such.
      implementation: of `kernels.cached_attention`.

    Raises:
      ValueError: a cache of another model or of other users' number, or one from `join`; what `inputs.check_history` refuses.
    """
    model = frozen(model)
    check_cache(cache, model)
    if not cache.history.channels:
        raise ValueError(
            "a cache that was joined from encoded users cannot grow, since their events are gone: encode the longer histories"
        )
    added = check_history(new_events, model.form, model.sizes, what="new_events")
    if added.users != cache.users:
        raise ValueError(
            f"new_events has {added.users} users, the cache {cache.users}: give an entry for each, without events too"
        )
    longest = dict(model.form.max_history)
    events = {
        name: newest(joined(cache.history.channels[name], added.channels[name]), longest[name])
        for name in longest
    }
    history = History(events, added.context_BC, added.now_B)
    context_stays = np.array_equal(added.context_BC, cache.history.context_BC)
    request, rows, table = _request(model, history)
    users = len(request.used_B)
    channels: dict[str, Channel] = {}
    for name, encoder in model.encoders.items():
        grown = growth(
            encoder, model.form, cache.history.channels[name], events[name], added.channels[name]
        )
        if not context_stays or (grown.nothing_stays and not grown.all_stays):
            channels[name] = model.programs.encode(
                model.params, request, table, name=name, rows=rows[name], kind=cache.kind
            )
        elif grown.all_stays:
            channels[name] = cache.channels[name]
        else:
            channels[name] = model.programs.extend(
                model.params,
                cache.channels[name],
                request,
                padded(grown.keep_B, users),
                padded(grown.keep_kept_B, users),
                table,
                name=name,
                rows=rows[name],
                new_rows=capacity(grown.new_rows, LEAST_ROWS),
                kept_rows=capacity(grown.kept_rows, LEAST_ROWS),
                kind=cache.kind,
                implementation=implementation,
            )
    return Cache(channels, history, model.mark, model.signature, cache.kind)


def score(
    model: Any,
    cache: Any,
    candidates: Any,
    *,
    micro_batch: Any = MICRO_BATCH,
    implementation: Any = None,
    room: int | None = None,
) -> Float32[np.ndarray, "C K"]:
    """Logits (values, in regressions) of every candidate for each task, in the order of the candidates.

    Args:
      micro_batch: candidates, of all users together, that are worked on at one time: memory grows with it, results do not depend on it. With fewer
        candidates than that, all.
      implementation: of `kernels.cached_attention`; None, that of the platform.
      room: candidates to compile for, which costs memory and no time; None, those of their capacity class.

    Raises:
      ValueError: a cache of another model, candidates that `inputs.check_candidates` refuses, micro_batch below 1, a room that is too small.
    """
    model = frozen(model)
    candidates, logit_CK = _logits(model, cache, candidates, micro_batch, implementation, room)
    return np.asarray(logit_CK)[: len(candidates.item_C)]


def top_k(
    model: Any,
    cache: Any,
    candidates: Any,
    *,
    k: Any,
    weights: Any = None,
    micro_batch: Any = MICRO_BATCH,
    implementation: Any = None,
) -> Best:
    """The k candidates of each user with the highest weighted sum of logits; of equal ones the first.

    Args:
      weights: one a task; None: 1 for the first task and 0 for others.

    Raises:
      ValueError: as `score`; k below 1, weights of another number.
    """
    model = frozen(model)
    tasks = len(model.sizes.kinds)
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"{k=} must be an integer of at least 1")
    weight_K = (
        np.eye(1, tasks, dtype=np.float32)[0]
        if weights is None
        else np.asarray(weights, np.float32)
    )
    if weight_K.shape != (tasks,) or not np.isfinite(weight_K).all():
        raise ValueError(f"weights must be {tasks} finite numbers, one a task, got {weights!r}")
    candidates, logit_CK = _logits(model, cache, candidates, micro_batch, implementation)
    offsets = padded_offsets(candidates.offsets, cache.places)
    place_BK, score_BK = model.programs.best(
        logit_CK, weight_K, offsets, k=min(int(k), logit_CK.shape[0])
    )
    return Best(np.asarray(place_BK)[: cache.users], np.asarray(score_BK)[: cache.users])


def _logits(
    model: FrozenRanker,
    cache: Any,
    candidates: Any,
    micro_batch: Any,
    implementation: Any,
    room: int | None = None,
) -> tuple[Candidates, jax.Array]:
    """The checked candidates, and their logits at the size of their class."""
    check_cache(cache, model)
    if (
        isinstance(micro_batch, bool)
        or not isinstance(micro_batch, int | np.integer)
        or micro_batch < 1
    ):
        raise ValueError(f"{micro_batch=} must be an integer of at least 1")
    candidates = check_candidates(candidates, cache.users, model.sizes)
    table = None
    wide, step = pad_candidates(candidates, cache.places, int(micro_batch), room)
    if model.table is not None:
        table, (numbers,) = model.table.request(candidates.item_C)
        wide = dataclasses.replace(wide, item_C=padded(numbers, len(wide.item_C)))
    return candidates, model.programs.score(
        model.params, cache.channels, wide, table, step=step, implementation=implementation
    )


def _request(
    model: FrozenRanker, history: History, room: Room | None = None
) -> tuple[Any, dict[str, int], Any]:
    """The history at the sizes of its class or of `room`, its rows there, and its item rows from host memory, if that is where they are."""
    table = None
    if model.table is not None:
        names = list(history.channels)
        table, numbers = model.table.request(*(history.channels[name].item_E for name in names))
        channels = {
            name: dataclasses.replace(history.channels[name], item_E=number)
            for name, number in zip(names, numbers, strict=True)
        }
        history = dataclasses.replace(history, channels=channels)
    return *pad_history(history, model.form, room), table
