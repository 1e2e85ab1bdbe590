"""Writes the cached scoring of a ranker as one file that runs without this code, and reads the
ranker in it for an online deployment.

The file is a zip: `metadata.json`, `encode.bin` and `score.bin` (`jax.export` programs for one
bucket), `params.npz`, `items.npz`, and `artefact.py`, which reads all of it with JAX and NumPy
alone. What JAX serialises is readable for at least six months of its versions. A deployment leaves
the programs unused: it compiles its own, for the device that is there.
"""

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax
import jax.export
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int, Int32, Shaped

from ultra_hstu.config import Config, Kind, from_config_dict
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.data.codebook import Codebook
from ultra_hstu.data.signals import feature_size
from ultra_hstu.feature_config import Spelled
from ultra_hstu.nn.cached import require_sums
from ultra_hstu.nn.key_values import CacheDtype, require_kind
from ultra_hstu.ranking.form import Form, Sizes
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.ranking.recipe import RankRecipe
from ultra_hstu.serving import artefact
from ultra_hstu.serving.compiled import Channels, Programs
from ultra_hstu.serving.inputs import Bucket, Candidates, UserEvents, UserHistory
from ultra_hstu.serving.score import MICRO_BATCH
from ultra_hstu.serving.tokens import pad_candidates, pad_history
from ultra_hstu.step import Params

Leaves = list[Shaped[Array, "..."]]
# Of the metadata, what an online deployment needs beside artefact.METADATA.
ONLINE = {"kinds": [str], "timestamps": bool, "features": {"*": list}, "contexts": {"*": [str]}}


def save(
    path: str | os.PathLike,
    model: Ranker,
    *,
    config: Config,
    catalog: Catalog,
    vocabulary: Codebook | None = None,
    candidates: int,
    users: int = 1,
    events: int | None = None,
    micro_batch: int = MICRO_BATCH,
    kind: CacheDtype = "same",
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes `path`, whole or not at all. Attention is computed by `xla`, whatever the model names:
    its kernels are no part of what JAX can keep.

    Args:
      config, catalog: of the run.
      vocabulary: of the run, too, if `experiments.serve` shall serve the file.
      candidates, users, events: the largest call: of all users together, `events` for each channel;
        None: users x the longest history.
      micro_batch, kind: as in `score` and `encode_history`.
      platforms: "cpu", "cuda", ...; None: the platform of this process.

    Raises:
      ValueError: a size or micro_batch below 1, a catalogue of another number of items, a kind that
        is none.
    """
    for name, value in (
        ("candidates", candidates),
        ("users", users),
        ("events", events),
        ("micro_batch", micro_batch),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    require_kind(kind)
    form, sizes = model.form, model.sizes
    if catalog.num_items != sizes.items:
        raise ValueError(
            f"the catalogue has {catalog.num_items} items, the model {sizes.items}: "
            "give the catalogue of this run"
        )
    step = min(micro_batch, candidates)
    candidates = -(-candidates // step) * step
    bucket = Bucket(users, {name: events or users * longest for name, longest in form.max_history})
    programs, params = _portable(model)
    leaves, tree = jax.tree.flatten(params)

    def channels(params: Params, history: UserHistory, used_B: Int[Array, " B"]) -> Channels:
        return {
            name: programs.encode(
                params,
                history,
                used_B,
                None,
                name=name,
                kind=kind,
            )
            for name in bucket.events
        }

    # Dicts and lists alone: what reads the file does not know the classes of this package.
    def encode(params: Leaves, request: artefact.Arrays) -> Leaves:
        history = UserHistory(
            {name: UserEvents(**events) for name, events in request["channels"].items()},
            request["context_BC"],
            request["now_B"],
        )
        encoded = channels(jax.tree.unflatten(tree, params), history, request["used_B"])
        return jax.tree.leaves(encoded)

    def score(params: Leaves, cache: Leaves, request: artefact.Arrays) -> Float32[Array, "C K"]:
        state, encoded = jax.tree.unflatten(tree, params), jax.tree.unflatten(cache_tree, cache)
        return programs.score(
            state, encoded, Candidates(**request), None, step=step, implementation="xla"
        )

    history, used_B, wide = _examples(bucket, candidates, form, sizes)
    cache, cache_tree = jax.tree.flatten(jax.eval_shape(channels, params, history, used_B))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    request = {
        "channels": {name: vars(events) for name, events in history.channels.items()},
        "context_BC": history.context_BC,
        "now_B": history.now_B,
        "used_B": used_B,
    }
    export_encode = jax.export.export(jax.jit(encode), platforms=platforms)(shapes, request)
    export_score = jax.export.export(jax.jit(score), platforms=platforms)(shapes, cache, vars(wide))
    metadata = {
        "format": artefact.FORMAT,
        "version": artefact.VERSION,
        "jax": jax.__version__,
        "platforms": list(platforms or [artefact._platform()]),
        "capacity": {"users": users, "candidates": candidates, "events": bucket.events},
        "micro_batch": step,
        "kind": kind,
        "channels": dict(form.max_history),
        "tasks": config.rank.tasks,
        "signals": config.rank.signals,
        "features": config.rank.features,
        "contextual": config.rank.contextual,
        "sizes": {
            name: getattr(sizes, name) for name in ("items", "signals", "features", "contextual")
        },
        "config": dataclasses.asdict(config),
        "online": None
        if vocabulary is None
        else {
            "kinds": sizes.kinds,
            "timestamps": sizes.timestamps,
            "features": {name: values.tolist() for name, values in vocabulary.features.items()},
            "contexts": vocabulary.contexts,
        },
    }
    items = {"raw_ids": np.array(catalog.raw_ids.tolist())}  # of fixed width, as the reader takes
    if catalog.titles is not None:
        items["titles"] = np.array(catalog.titles)
    parts = {
        "metadata.json": json.dumps(metadata, indent=1).encode(),
        "artefact.py": Path(artefact.__file__).read_bytes(),
        "items.npz": _npz(items),
        "params.npz": _npz({str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}),
        "encode.bin": bytes(export_encode.serialize()),
        "score.bin": bytes(export_score.serialize()),
    }
    part = f"{os.fspath(path)}.part"
    with zipfile.ZipFile(part, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    os.replace(part, path)


def load(path: str | os.PathLike) -> tuple[Ranker, Config, Codebook, dict[str, Kind]]:
    """The ranker in a file, its configuration, what its values mean, and the kind of each task.
    Nothing of the code in the file is run.

    Raises:
      ValueError: a file that is damaged, or was written without a vocabulary.
    """
    whole = f"{os.fspath(path)} is no scorer that can be served (experiments.export writes one)"
    with artefact.naming(whole), zipfile.ZipFile(path) as file:
        metadata, items, params = artefact.read(file)
        with artefact.naming("metadata.json"):
            return _ranker(metadata, items, params)


def _ranker(
    metadata: artefact.Arrays, items: artefact.Arrays, params: list[Shaped[np.ndarray, "..."]]
) -> tuple[Ranker, Config, Codebook, dict[str, Kind]]:
    """What `load` returns. Raises ValueError for parts that do not fit together."""
    codes, online = metadata["sizes"], metadata.get("online")
    if online is None:
        raise ValueError(
            "it does not say what the values of its source mean: write it with "
            "experiments.export, or with a vocabulary"
        )
    artefact.require_form(online, ONLINE, "online")
    titles = tuple(items["titles"].tolist()) if "titles" in items else None
    features = {name: np.array(values) for name, values in online["features"].items()}
    contexts = {name: tuple(words) for name, words in online["contexts"].items()}
    config = from_config_dict(metadata["config"])
    rank, model = config.rank, config.model
    for name, values in features.items():
        ascend = values.dtype.kind in "iuf" and (values[1:] > values[:-1]).all()
        needed = not Spelled.of(name).size
        if values.ndim != 1 or bool(len(values)) != needed or not ascend:
            raise ValueError(f"online.features.{name} must be numbers that ascend")
    known = {
        "features": {name: feature_size(name, values) for name, values in features.items()},
        "contextual": {name: len(words) for name, words in contexts.items()},
    }
    for field, counts in known.items():
        if [*counts.items()] != [*zip(getattr(rank, field), codes[field], strict=True)]:
            raise ValueError(f"online has the {field} {counts}, and sizes {codes[field]}")
    if unknown := set(online["kinds"]) - set(get_args(Kind)):
        raise ValueError(f"online.kinds has {sorted(unknown)}, which no task is")
    layers = [model.layers, *(channel.layers for channel in model.channels.values())]
    sizes = Sizes(
        items=codes["items"],
        signals=tuple(codes["signals"]),
        features=tuple(codes["features"]),
        contextual=tuple(codes["contextual"]),
        kinds=tuple(online["kinds"]),
        timestamps=online["timestamps"],
    )
    recipe = RankRecipe(config, sizes)
    if max(layers) <= len(params):  # before a model of a billion layers is built
        leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: recipe.init(0)).params)
        if [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in params]:
            vocabulary = Codebook(Catalog(items["raw_ids"], titles), features, contexts)
            ranker = recipe.model(jax.tree.unflatten(tree, jax.device_put(params)))
            return ranker, config, vocabulary, recipe.tasks
    raise ValueError(
        "params.npz holds parameters of another model than this version builds from config: "
        "export the run again"
    )


def _examples(
    bucket: Bucket, candidates: int, form: Form, sizes: Sizes
) -> tuple[UserHistory, Int32[np.ndarray, " B"], Candidates]:
    """A history of the right sizes, the mark of its real users, and candidates."""

    def ints(*shape: int) -> Int32[np.ndarray, "..."]:
        return np.zeros(shape, np.int32)

    signals, features = ints(0, len(sizes.signals)), ints(0, len(sizes.features))
    none = UserEvents.of([()], signals=[signals], features=[features])
    history = UserHistory(dict.fromkeys(bucket.events, none), ints(1, form.contextual), ints(1))
    asked = Candidates(none.item_E, none.feature_EF, none.time_E, none.offsets, none.item_E)
    wide, _ = pad_candidates(asked, bucket.users, candidates, candidates)
    return *pad_history(history, bucket), wide


def _portable(model: Ranker) -> tuple[Programs, Params]:
    """The functions of the model in plain XLA, and its parameters."""
    copy: Ranker = nnx.merge(*nnx.split(model))
    for one in copy.encoders.values():
        encoder = require_sums(one)
        encoder.implementation = "xla"
        for layer in encoder.layers:
            layer.implementation = "xla"
            if layer.feed_forward is not None:
                layer.feed_forward.implementation = "xla"
    graphdef, params = nnx.split(copy)
    return Programs(graphdef), params


def _npz(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
