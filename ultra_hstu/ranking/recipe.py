"""The pure functions of a ranking run: `step.Steps` for requests."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu.config import Kind
from ultra_hstu.entry_updates import ITEM_TABLE, Path
from ultra_hstu.parallel.parameters import ShardedLayers
from ultra_hstu.ranking.batch import RankBatch
from ultra_hstu.ranking.form import Sizes
from ultra_hstu.ranking.loss import multitask_loss
from ultra_hstu.ranking.model import Ranker
from ultra_hstu.step import Params, Steps


@dataclasses.dataclass(frozen=True)
class RankRecipe(Steps[Ranker]):
    sizes: Sizes

    @property
    def tasks(self) -> dict[str, Kind]:
        """Kind of each task, in the order of the logits."""
        return dict(zip(self.config.rank.tasks, self.sizes.kinds, strict=True))

    def build(self, seed: int) -> Ranker:
        model = Ranker(self.config, self.sizes, rngs=nnx.Rngs(seed))
        if self.shards.devices > 1:
            for encoder in model.encoders.values():
                encoder.run_layer = ShardedLayers(self.shards)
        return model

    @property
    def tables(self) -> tuple[Path, ...]:
        codes = {"signals": self.sizes.signals, "features": self.sizes.features}
        named = [("embedding", name, "table") for name, sizes in codes.items() if sizes]
        return ITEM_TABLE, *named

    def reads(self, model: Ranker, batch: RankBatch, key: jax.Array) -> dict[Path, Array]:
        embedding, channels = model.embedding, batch.channels.values()
        found = {ITEM_TABLE: [jnp.where(one.item_T > 0, one.item_T, -1) for one in channels]}
        for name, codes in (
            ("signals", [one.signal_TS for one in channels]),
            ("features", [one.feature_TF for one in channels]),
        ):
            if (embed := getattr(embedding, name)) is not None:
                found["embedding", name, "table"] = [embed.reads(x).reshape(-1) for x in codes]
        return {
            path: self.shards.of_groups(jnp.concatenate(numbers)) for path, numbers in found.items()
        }

    def logits(
        self, params: Params, batch: RankBatch, key: jax.Array | None = None
    ) -> Float[Array, "P K"]:
        """float32; `key` draws dropout, None leaves it out.

        Empty places (weight 0) hold anything. In a mesh: this device's part of the P.
        """
        model = self.model(params)
        return model.head(model.encode(batch, shards=self.shards, key=key))

    def loss(self, params: Params, batch: RankBatch, key: jax.Array) -> Float[Array, ""]:
        label_pK, weight_pK = self.shards.part((batch.label_PK, batch.weight_PK))
        total_K = self.shards.total(weight_pK.sum(0))
        return multitask_loss(
            self.logits(params, batch, key), label_pK, weight_pK, self.sizes.kinds, total_K
        )
