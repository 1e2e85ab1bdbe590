"""The pure functions of a run: initial state, loss and update step, from the configuration and the size of the catalogue."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ultra_hstu import optim
from ultra_hstu.config import Config
from ultra_hstu.data import signals
from ultra_hstu.data.feed import Feed, Fixed, feed_specs
from ultra_hstu.nn.dropout import row_keys
from ultra_hstu.parallel import parameters
from ultra_hstu.parallel.embedding_sharding import with_room
from ultra_hstu.parallel.mesh import make_mesh
from ultra_hstu.parallel.shards import Shards
from ultra_hstu.retrieval import loss as losses
from ultra_hstu.retrieval import negatives
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.model import Recommender

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
    """What every recipe shares; a subclass says how its model is built and what is minimised.

    `config.parallel` names a mesh, in which the same functions run on every device (`over_devices`): parameters and rows are then this device's.
    """

    config: Config
    devices: Sequence[jax.Device] | None = dataclasses.field(
        default=None, kw_only=True
    )  # of the mesh; None: all of all processes

    def build(self, seed: int) -> Any:
        """The model with the initial parameters of a seed."""
        raise NotImplementedError(f"{type(self).__name__} does not build a model")

    def loss(self, params: Params, batch: Any, key: jax.Array) -> Float[Array, ""]:
        """What a step lowers, on one batch; `key` decides all that is random. In a mesh: this device's share, the shares add up."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The structure of the model, without its parameters."""
        return nnx.split(nnx.eval_shape(lambda: self.build(0)))[0]

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optim.optimizer(self.config.optim)

    @functools.cached_property
    def shards(self) -> Shards:
        return Shards.of(self.config)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """None on one device. Raises ValueError if `config.parallel` is not the number of devices."""
        parallel = self.config.parallel
        return (
            None
            if self.shards.devices == 1
            else make_mesh(parallel.data, parallel.context, devices=self.devices)
        )

    @functools.cached_property
    def specs(self) -> TrainState:
        """Where every array of a state lives, as PartitionSpecs."""
        return parameters.specs(jax.eval_shape(lambda: self.init(0)), self.shards)

    @functools.cached_property
    def shardings(self) -> Any:
        """The same as shardings; None on one device."""
        if self.mesh is None:
            return None
        is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
        return jax.tree.map(
            functools.partial(NamedSharding, self.mesh), self.specs, is_leaf=is_spec
        )

    def init(self, seed: int) -> TrainState:
        params = with_room(nnx.split(self.build(seed))[1], self.shards)
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def start(self, seed: int) -> TrainState:
        """`init`, compiled, every array where it lives."""
        return jax.jit(self.init, static_argnums=0, out_shardings=self.shardings)(seed)

    def model(self, params: Params) -> Any:
        return nnx.merge(self.graphdef, params)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update on a batch; in a mesh, on one whose arrays hold the groups' batches one after another."""
        return self.feed_step(state, Fixed(batch), 0)

    def feed_step(
        self, state: TrainState, feed: Feed, number: Any
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """One update on a batch of a feed; its key is a function of (seed, step)."""
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), state.step)
        specs = self.specs.params if self.mesh is not None else None

        def loss_and_grads(
            params: Params, feed: Feed, number: Any, key: jax.Array
        ) -> tuple[Array, Any]:
            loss, grads = jax.value_and_grad(self.loss)(params, feed.batch(number), key)
            return self.shards.total(loss), grads if specs is None else parameters.summed(
                grads, specs
            )

        everywhere = PartitionSpec()
        run = self.over_devices(
            loss_and_grads, (specs, feed_specs(feed), everywhere, everywhere), (everywhere, specs)
        )
        loss, grads = run(state.params, feed, number, key)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        if self.mesh is not None:
            new = jax.lax.with_sharding_constraint(new, self.shardings)
        return new, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    def over_devices(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`function` as every device of the mesh runs it; as it is on one device."""
        if self.mesh is None:
            return function
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


@dataclasses.dataclass(frozen=True)
class Recipe(Steps):
    """Retrieval: every row predicts the item after it, among sampled or all items."""

    num_items: int

    def build(self, seed: int) -> Recommender:
        sizes = signals.sizes(self.config.rank.signals)
        return Recommender(
            self.config.model,
            self.num_items,
            self.config.data.max_history,
            signals=sizes,
            shards=self.shards,
            rngs=nnx.Rngs(seed),
        )

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Float[Array, ""]:
        """Mean loss over the supervised rows of a batch; `key` draws dropout and negatives."""
        dropout_key, negative_key = jax.random.split(key)
        model = self.model(params)
        h_TD, cut = model.encode_kept(batch, rngs=dropout_key)
        # Rows that a truncation dropped have no output to train on.
        labels = (x if cut is None else cut.take(x) for x in (batch.target_T, batch.weight_T))
        target_T, weight_T = self.shards.local(tuple(labels))
        table_ID = model.all_items()
        config, shards = self.config.loss, self.shards
        chunk_rows = (
            config.chunk_rows
            or CHUNK_ROWS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
        )
        options: dict[str, Any] = dict(
            temperature=config.temperature, l2_normalize=config.l2_normalize, chunk_rows=chunk_rows
        )
        options["total"] = shards.total(jnp.sum(weight_T))
        if config.kind == "full":
            return losses.full_softmax(h_TD, table_ID, target_T, weight_T, **options)[0]
        rows, log_q = h_TD.shape[0], None
        sequences = batch.sequences if cut is None else cut.sequences
        first = shards.first_sequence(sequences.offsets.shape[0] - 1)
        keys_T = row_keys(negative_key, sequences.offsets, shards.rows(sequences.num_rows), first)
        if config.kind == "sampled":
            negative_TR = negatives.uniform_negatives(
                keys_T, rows, config.negatives, self.num_items
            )
        else:
            pool = negatives.in_batch_pool(shards.of_groups(batch.target_T), self.num_items)
            negative_TR = negatives.in_batch_negatives(keys_T, pool, rows, config.negatives)
            log_q = pool.log_q_I if config.log_q else None
        return losses.sampled_softmax(
            h_TD, table_ID, target_T, weight_T, negative_TR, log_q=log_q, **options
        )[0]
