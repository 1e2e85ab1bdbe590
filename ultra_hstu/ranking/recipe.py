"""The pure functions of a ranking run: `step.Steps` for requests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from ultra_hstu.config import Kind
from ultra_hstu.entry_updates import CODES, ITEM_TABLE, Path
from ultra_hstu.feature_config import FeatureConfig
from ultra_hstu.nn.item_features import ItemCodes, folded, with_ids, without_ids
from ultra_hstu.parallel.parameters import ShardedLayers
from ultra_hstu.ranking.batch import RankBatch
from ultra_hstu.ranking.form import Sizes
from ultra_hstu.ranking.loss import multitask_loss
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.step import Params, Steps


@dataclasses.dataclass(frozen=True)
class RankRecipe(Steps[Ranker]):
    """Ranking: what a user does with each target.

    Attributes:
      item_features, trained_I: as of `retrieval.recipe.Recipe`.
    """

    sizes: Sizes
    item_features: ItemCodes | None = None
    trained_I: Bool[np.ndarray, " I1"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    @property
    def holds_data(self) -> bool:
        return self.item_features is not None

    @property
    def tasks(self) -> dict[str, Kind]:
        """Kind of each task, in the order of the logits."""
        return dict(zip(self.config.rank.tasks, self.sizes.kinds, strict=True))

    def build(self, seed: int) -> Ranker:
        model = Ranker(self.config, self.sizes, self.item_features, rngs=nnx.Rngs(seed))
        without_ids(model.embedding.item_table, self.item_features, self.trained_I)
        if self.shards.devices > 1:
            for encoder in model.encoders.values():
                encoder.run_layer = ShardedLayers(self.shards)
        return model

    @property
    def tables(self) -> tuple[Path, ...]:
        codes = {name: ("embedding", name, "table") for name in CODES}
        return ITEM_TABLE, *(path for name, path in codes.items() if getattr(self.sizes, name))

    def reads(self, model: Ranker, batch: RankBatch, key: jax.Array) -> dict[Path, Array]:
        channels = [
            self.shards.whole((one.item_T, one.signal_TS, one.feature_TF, one.context_T))
            for one in batch.channels.values()
        ]
        items_T, signals_TS, features_TF, contexts_T = zip(*channels, strict=True)
        codes = {
            "signals": signals_TS,
            "features": features_TF,
            "contextual": [context_T[:, None] for context_T in contexts_T],
        }
        found = {ITEM_TABLE: [jnp.where(item_T > 0, item_T, -1) for item_T in items_T]}
        for name in CODES:
            if (embed := getattr(model.embedding, name)) is not None:
                found["embedding", name, "table"] = [
                    embed.reads(x).reshape(-1) for x in codes[name]
                ]
        return {
            path: self.shards.of_groups(jnp.concatenate(numbers)) for path, numbers in found.items()
        }

    def logits(
        self, params: Params, batch: RankBatch, key: jax.Array | None = None
    ) -> Float[Array, "P K"]:
        """float32; `key` draws dropout, None leaves it out.

        Empty places (weight 0) hold anything. In a mesh: this device's part of the P.
        """
        model, with_id_I = self.model(params), None
        if key is not None:
            dropout = self.config.features.id_dropout
            with_id_I = with_ids(self.item_features, self.trained_I, dropout, key)
        return model.head(model.encode(batch, shards=self.shards, key=key, with_id_I=with_id_I))

    def folded(self, params: Params) -> tuple["RankRecipe", Params]:
        """The same model for answers: one with ids alone, whose embeddings have features added."""
        if self.item_features is None:
            return self, params
        config, embedding = self.config, self.model(params).embedding
        assert embedding.item_features is not None
        plain = dataclasses.replace(config, features=FeatureConfig())
        table_ID = embedding.item_table[...] + embedding.item_features.all()
        recipe = dataclasses.replace(self, config=plain, item_features=None)
        return recipe, folded(params, table_ID)

    def loss(self, params: Params, batch: RankBatch, key: jax.Array) -> Float[Array, ""]:
        label_pK, weight_pK = self.shards.part((batch.label_PK, batch.weight_PK))
        total_K = self.shards.total(weight_pK.sum(0))
        return multitask_loss(
            self.logits(params, batch, key), label_pK, weight_pK, self.sizes.kinds, total_K
        )
