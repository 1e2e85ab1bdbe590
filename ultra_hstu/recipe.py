"""The pure functions of a run: initial state, loss and update step, from the configuration and the size of the catalogue."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from ultra_hstu import losses, negatives, optim
from ultra_hstu.config import Config
from ultra_hstu.data.batching import Batch
from ultra_hstu.nn.recommender import Recommender

# Rows of logits at one time: what fits the cache of a CPU, what fills a GPU (measured on MovieLens-1M, 128 negatives).
CHUNK_ROWS = {"cpu": 512, "accelerator": 4096}

Params = Any  # nnx.State of nnx.Param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    params: Params
    opt_state: Any
    step: Any  # int32: steps taken, over all epochs


@dataclasses.dataclass(frozen=True)
class Steps:
    """What every recipe shares; a subclass says how its model is built and what is minimised."""

    config: Config

    def build(self, seed: int) -> Any:
        """The model with the initial parameters of a seed."""
        raise NotImplementedError(f"{type(self).__name__} does not build a model")

    def loss(self, params: Params, batch: Any, key: jax.Array) -> Float[Array, ""]:
        """What a step lowers, on one batch; `key` decides all that is random."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The structure of the model, without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.build(0)))[0]

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optim.optimizer(self.config.optim)

    def init(self, seed: int) -> TrainState:
        params = nnx.split(self.build(seed))[1]
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def model(self, params: Params) -> Any:
        return nnx.merge(self.graphdef, params)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update; its key is a function of (seed, step)."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        loss, grads = jax.value_and_grad(self.loss)(state.params, batch, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), {"loss": loss, "grad_norm": optax.tree.norm(grads)}


@dataclasses.dataclass(frozen=True)
class Recipe(Steps):
    """Retrieval: every row predicts the item after it, among sampled or all items."""

    num_items: int

    def build(self, seed: int) -> Recommender:
        return Recommender(self.config.model, self.num_items, self.config.data.max_history, rngs=nnx.Rngs(seed))

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Float[Array, ""]:
        """Mean loss over the supervised rows of a batch; `key` draws dropout and negatives."""
        dropout_key, negative_key = jax.random.split(key)
        model = self.model(params)
        h_TD, cut = model.encode_kept(batch, rngs=dropout_key)
        # Rows that a truncation dropped have no output to train on.
        target_T, weight_T = (x if cut is None else cut.take(x) for x in (batch.target_T, batch.weight_T))
        table_ID = model.item_table[...]
        config = self.config.loss
        chunk_rows = config.chunk_rows or CHUNK_ROWS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
        options: dict[str, Any] = dict(temperature=config.temperature, l2_normalize=config.l2_normalize, chunk_rows=chunk_rows)
        if config.kind == "full":
            return losses.full_softmax(h_TD, table_ID, target_T, weight_T, **options)[0]
        rows, log_q = h_TD.shape[0], None
        if config.kind == "sampled":
            negative_TR = negatives.uniform_negatives(negative_key, rows, config.negatives, self.num_items)
        else:
            pool = negatives.in_batch_pool(batch.target_T, self.num_items)
            negative_TR = negatives.in_batch_negatives(negative_key, pool, rows, config.negatives)
            log_q = pool.log_q_I if config.log_q else None
        return losses.sampled_softmax(h_TD, table_ID, target_T, weight_T, negative_TR, log_q=log_q, **options)[0]
