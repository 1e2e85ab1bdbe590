"""The ranker in a file that `export.save` wrote, for an online deployment without the run's folder and data. Its compiled programs, of one capacity, stay
unused: those of a deployment are made anew, for the device that is there."""

import io
import json
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

from ultra_hstu.config import from_config_dict
from ultra_hstu.data.catalog import Catalog
from ultra_hstu.ranking.form import Sizes
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.ranking.recipe import RankRecipe
from ultra_hstu.serving.scoring import ScoringModel
from ultra_hstu.serving.vocabulary import Vocabulary


def about(model: Ranker, vocabulary: Vocabulary) -> dict[str, Any]:
    """What the file has to say, as JSON, besides its parameters, configuration and items."""
    return {
        "kinds": model.sizes.kinds,
        "timestamps": model.sizes.timestamps,
        "features": {name: values.tolist() for name, values in vocabulary.features.items()},
        "contexts": vocabulary.contexts,
    }


def scoring_model(path: str, **options: Any) -> ScoringModel:
    """The model in a file; `options` as for `ScoringModel`.

    Raises:
      ValueError: a file that is damaged, or was written without a vocabulary.
    """
    try:
        with zipfile.ZipFile(path) as file:
            metadata: dict[str, Any] = json.loads(file.read("metadata.json"))
            items, params = (
                np.load(io.BytesIO(file.read(name)), allow_pickle=False)
                for name in ("items.npz", "params.npz")
            )
            catalog = Catalog(
                items["raw_ids"], tuple(items["titles"].tolist()) if "titles" in items else None
            )
            leaves = [params[str(i)] for i in range(len(params.files))]
            online, sizes = (
                metadata["online"],
                {
                    name: tuple(codes)
                    for name, codes in metadata["sizes"].items()
                    if name != "items"
                },
            )
            config = from_config_dict(metadata["config"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is no scorer that can be served: {error!r}. Write it with experiments.export"
        ) from error
    if online is None:
        raise ValueError(
            f"{path} does not say what the values of its source mean: write it with experiments.export, or with a vocabulary"
        )
    whole = Sizes(
        items=catalog.num_items,
        kinds=tuple(online["kinds"]),
        timestamps=online["timestamps"],
        **sizes,
    )
    recipe = RankRecipe(config, whole)
    shapes = jax.eval_shape(lambda: recipe.init(0)).params
    if [leaf.shape for leaf in jax.tree.leaves(shapes)] != [leaf.shape for leaf in leaves]:
        raise ValueError(
            f"{path} holds parameters of another model than this version builds from its configuration: export the run again"
        )
    ranker = recipe.model(
        jax.tree.unflatten(jax.tree.structure(shapes), [jax.device_put(leaf) for leaf in leaves])
    )
    features = {name: np.array(values) for name, values in online["features"].items()}
    contexts = {name: tuple(words) for name, words in online["contexts"].items()}
    return ScoringModel(
        ranker, config, Vocabulary(catalog, features, contexts), recipe.tasks, **options
    )
