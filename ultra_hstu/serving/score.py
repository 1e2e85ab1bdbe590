"""M-FALCON (HSTU, arXiv 2402.17152, section 3.4): a user's history is encoded once, and any number
of candidates are scored against it.

Scores are those of one full forward pass with all candidates as its targets, to rounding, in
whatever batches they are in. Every function takes a `Ranker`, or a `CompiledRanker` made of
one beforehand. Arguments hold NumPy arrays or anything like it, and results are NumPy. Everything
is checked here, with errors that name the value and the remedy.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from ultra_hstu.nn.cached import Implementation
from ultra_hstu.nn.hstu import HSTU
from ultra_hstu.nn.key_values import CacheDtype, require_kind
from ultra_hstu.ranking.form import Form
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.serving.artefact import padded, padded_offsets
from ultra_hstu.serving.compiled import Channels, CompiledRanker, compiled
from ultra_hstu.serving.inputs import (
    ROW_SIZES,
    Bucket,
    Candidates,
    UserHistory,
    bucket_size,
    check_candidates,
    check_history,
    require,
    require_count,
)
from ultra_hstu.serving.kv_cache import Cache, check_cache, part_rows
from ultra_hstu.serving.tokens import pad_candidates, pad_history

MICRO_BATCH = 2048
Model = Ranker | CompiledRanker


class Best(NamedTuple):
    # Positions among the user's candidates, best first; -1 where a user has fewer.
    place_BK: Int32[np.ndarray, "B k"]
    score_BK: Float32[np.ndarray, "B k"]


@dataclasses.dataclass(frozen=True)
class Growth:
    """Which rows of a channel stay when its histories grow.

    The first `keep_B` rows of each user do; above a truncation, the first `keep_kept_B` of the rows
    that it keeps.
    """

    keep_B: Int32[np.ndarray, " B"]
    keep_kept_B: Int32[np.ndarray, " B"]
    new_rows: int  # computed anew
    kept_rows: int  # computed anew above a truncation

    @property
    def nothing_stays(self) -> bool:
        return not self.keep_B.any()

    @property
    def all_stays(self) -> bool:
        return self.new_rows == 0 and self.kept_rows == 0


def growth(
    encoder: HSTU,
    form: Form,
    before_B: Int[np.ndarray, " B"],
    after_B: Int[np.ndarray, " B"],
    added_B: Int[np.ndarray, " B"],
    *,
    context_stays: bool = True,
) -> Growth:
    """What stays of a cache of `before_B` events a user when `added_B` are added and `after_B` are
    left, the oldest ones gone where they are fewer.

    A row stays if neither its own input nor anything that it sees has changed. Attention is causal:
    without contextual tokens all rows before the first changed one stay, in every layer. Nothing of
    a growing history stays if positions count from the targets, if attention is divided by the
    length of the sequence, if there are contextual tokens (they see the whole history, and all of
    it sees them), or if its oldest events are gone. Otherwise the first changed row is

    - the first new one;
    - with full rows under a window, the first of those that were the newest: they lose the far keys
      that they saw;
    - with a relative bias, the last old one: it asked at the time of the request, and now does at
      the time of the event after it. This one changes without new events too.

    Rows above a truncation lose keys and move as soon as one of them is dropped: then none stays.
    """
    old_B, new_B = (form.contextual + form.per_event * count_B for count_B in (before_B, after_B))
    grows_B = added_B > 0
    biased = int(encoder.layers[0].bias is not None)
    moves_B = np.full_like(grows_B, form.backwards or encoder.divisor.of_sequence)
    moves_B |= after_B < before_B + added_B
    changed_B = np.where(grows_B, np.where(moves_B, old_B, changed_rows(encoder)), biased)
    if form.contextual and (grows_B.any() or biased or not context_stays):
        changed_B = old_B
    stay_B = np.maximum(old_B - changed_B, 0)
    if encoder.truncation is None:
        left_B = kept_B = np.zeros_like(stay_B)
    else:
        longest = encoder.truncation.length + form.contextual
        left_B = np.minimum(new_B, longest)
        kept_B = np.where(grows_B & (new_B > longest), 0, np.maximum(left_B - (new_B - stay_B), 0))
    return Growth(
        stay_B.astype(np.int32),
        kept_B.astype(np.int32),
        int((new_B - stay_B).sum()),
        int((left_B - kept_B).sum()),
    )


def changed_rows(encoder: HSTU) -> int:
    """How many of a user's newest rows change when an event is added."""
    biased = int(encoder.layers[0].bias is not None)
    return max(biased, *(mask.wider_rows for mask in encoder.layer_masks))


def growths(
    model: CompiledRanker,
    before: UserHistory,
    after: UserHistory,
    added_B: dict[str, Int[np.ndarray, " B"]],
) -> dict[str, Growth]:
    """The growth of every channel from one history to another."""
    context_stays = np.array_equal(before.context_BC, after.context_BC)
    return {
        name: growth(
            encoder,
            model.form,
            before.channels[name].lengths,
            after.channels[name].lengths,
            added_B[name],
            context_stays=context_stays,
        )
        for name, encoder in model.encoders.items()
    }


def grows(model: CompiledRanker) -> bool:
    """Whether rows of a growing history can stay at all."""
    moves = any(encoder.divisor.of_sequence for encoder in model.encoders.values())
    return not (moves or model.form.backwards or model.form.contextual)


def encode_history(
    model: Model,
    history: UserHistory,
    *,
    kind: CacheDtype = "same",
    bucket: Bucket | None = None,
    room: Bucket | None = None,
) -> Cache:
    """Keys and values of the histories of B users in every layer.

    An empty history is a legal one: candidates then see the user's contextual tokens and
    themselves. Of a longer one than the model takes, the newest events count, as in training.

    Args:
      kind: dtype of the cache: the model's ("same", exact), or rounded to "bfloat16", "int8",
        "fp8".
      bucket: sizes to compile for; None: the smallest that hold the histories. `room` is its
        older name.

    Raises:
      ValueError: what `inputs.check_history` refuses; another kind; a bucket that is too small.
    """
    model = compiled(model)
    require_kind(kind)
    history = check_history(require("history", history, UserHistory), model.form, model.sizes)
    wide, used_B, table_RD = _padded(model, history, bucket or room)
    channels = {
        name: model.programs.encode(model.params, wide, used_B, table_RD, name=name, kind=kind)
        for name in model.encoders
    }
    return Cache(channels, history, model.mark, model.signature, kind)


def append(
    model: Model, cache: Cache, new_events: UserHistory, *, implementation: Implementation = None
) -> Cache:
    """The cache after more events of its users; equal, to rounding, to a cache of the longer
    histories.

    Only rows that can have changed are computed, see `growth`; where all have, the histories are
    encoded anew. Under a rounded `kind` new rows work on rounded keys and values of the old ones,
    which a new encoding would not.

    Args:
      new_events: of each user the events since, none for some; when the next request is made;
        contextual features count if the model has such.
      implementation: of `kernels.cached_attention`.

    Raises:
      ValueError: a cache of another model or of another number of users; what
        `inputs.check_history` refuses.
    """
    model = compiled(model)
    check_cache(require("cache", cache, Cache), model)
    new_events = require("new_events", new_events, UserHistory)
    added = check_history(new_events, model.form, model.sizes, what="new_events")
    if added.users != cache.users:
        raise ValueError(
            f"new_events has {added.users} users, the cache {cache.users}: "
            "give an entry for each, without events too"
        )
    channels = {
        name: cache.history.channels[name].then(added.channels[name]).newest(longest)
        for name, longest in model.form.max_history
    }
    history = UserHistory(channels, added.context_BC, added.now_B)
    added_B = {name: events.lengths for name, events in added.channels.items()}
    grown = growths(model, cache.history, history, added_B)
    return grow(model, cache, history, grown, implementation=implementation)


def grow(
    model: CompiledRanker,
    cache: Cache,
    history: UserHistory,
    grown: dict[str, Growth],
    *,
    bucket: Bucket | None = None,
    new_rows: dict[str, int] | None = None,
    implementation: Implementation = None,
) -> Cache:
    """The cache of longer histories: what stays is copied, the other rows are computed.

    Args:
      history: checked.
      bucket, new_rows: sizes to compile for: of the histories, and of the rows of each channel that
        are computed anew; None: the smallest that hold them.
    """
    wide, used_B, table_RD = _padded(model, history, bucket)
    users = len(used_B)
    channels: Channels = {}
    for name, rows in grown.items():
        if rows.nothing_stays and not rows.all_stays:
            channels[name] = model.programs.encode(
                model.params, wide, used_B, table_RD, name=name, kind=cache.kind
            )
        elif rows.all_stays:
            channels[name] = cache.channels[name]
        else:
            kept_rows = bucket_size(rows.kept_rows, ROW_SIZES)
            channels[name] = model.programs.extend(
                model.params,
                cache.channels[name],
                wide,
                used_B,
                padded(rows.keep_B, users),
                padded(rows.keep_kept_B, users),
                table_RD,
                name=name,
                new_rows=new_rows[name] if new_rows else bucket_size(rows.new_rows, ROW_SIZES),
                kept_rows=kept_rows if bucket is None else part_rows(model, bucket)[name][-1],
                kind=cache.kind,
                implementation=implementation,
            )
    return Cache(channels, history, model.mark, model.signature, cache.kind)


def score(
    model: Model,
    cache: Cache,
    candidates: Candidates,
    *,
    micro_batch: int = MICRO_BATCH,
    implementation: Implementation = None,
    bucket: int | None = None,
    room: int | None = None,
) -> Float32[np.ndarray, "C K"]:
    """Logits (values, in regressions) of every candidate for each task, in the order of the
    candidates.

    Args:
      micro_batch: candidates, of all users together, that are worked on at one time: memory grows
        with it, results do not depend on it. With fewer candidates than that, all.
      implementation: of `kernels.cached_attention`; None: the platform's.
      bucket: candidates to compile for, which costs memory and no time; None: the smallest size
        that holds them. `room` is its older name.

    Raises:
      ValueError: a cache of another model, candidates that `inputs.check_candidates` refuses,
        micro_batch below 1, a bucket that is too small.
    """
    model = compiled(model)
    size = room if bucket is None else bucket
    candidates, logit_CK = _logits(model, cache, candidates, micro_batch, implementation, size)
    return np.asarray(logit_CK)[: len(candidates.item_C)]


def top_k(
    model: Model,
    cache: Cache,
    candidates: Candidates,
    *,
    k: int,
    weights: Sequence[float] | Float[np.ndarray, " K"] | None = None,
    micro_batch: int = MICRO_BATCH,
    implementation: Implementation = None,
) -> Best:
    """The k candidates of each user with the highest weighted sum of logits; of equal ones the
    first.

    Args:
      weights: one a task; None: 1 for the first task and 0 for others.

    Raises:
      ValueError: as `score`; k below 1, weights of another number.
    """
    model = compiled(model)
    tasks = len(model.sizes.kinds)
    k = require_count("k", k)
    weight_K = np.asarray(np.eye(1, tasks)[0] if weights is None else weights, np.float32)
    if weight_K.shape != (tasks,) or not np.isfinite(weight_K).all():
        raise ValueError(f"weights must be {tasks} finite numbers, one a task, got {weights!r}")
    candidates, logit_CK = _logits(model, cache, candidates, micro_batch, implementation)
    offsets = padded_offsets(candidates.offsets, cache.bucket_users)
    place_BK, score_BK = model.programs.best(
        logit_CK, weight_K, offsets, k=min(k, logit_CK.shape[0])
    )
    return Best(np.asarray(place_BK)[: cache.users], np.asarray(score_BK)[: cache.users])


def _logits(
    model: CompiledRanker,
    cache: Cache,
    candidates: Candidates,
    micro_batch: int,
    implementation: Implementation,
    bucket: int | None = None,
) -> tuple[Candidates, Float32[Array, "wide K"]]:
    """The checked candidates, and their logits at the size of their bucket."""
    check_cache(require("cache", cache, Cache), model)
    micro_batch = require_count("micro_batch", micro_batch)
    candidates = require("candidates", candidates, Candidates)
    candidates = check_candidates(candidates, cache.users, model.sizes)
    table_RD, (number_C,) = model.take_items(candidates.item_C)
    numbered = dataclasses.replace(candidates, item_C=number_C)
    wide, step = pad_candidates(numbered, cache.bucket_users, micro_batch, bucket)
    return candidates, model.programs.score(
        model.params, cache.channels, wide, table_RD, step=step, implementation=implementation
    )


def _padded(
    model: CompiledRanker, history: UserHistory, bucket: Bucket | None
) -> tuple[UserHistory, Int32[np.ndarray, " B"], Float32[Array, "R D"] | None]:
    """The history at the sizes of a bucket, 1 for each real user, and the history's item rows if
    these come from host memory."""
    names = list(history.channels)
    table_RD, numbers = model.take_items(*(history.channels[name].item_E for name in names))
    channels = {
        name: dataclasses.replace(history.channels[name], item_E=number)
        for name, number in zip(names, numbers, strict=True)
    }
    numbered = dataclasses.replace(history, channels=channels)
    return *pad_history(numbered, bucket), table_RD
