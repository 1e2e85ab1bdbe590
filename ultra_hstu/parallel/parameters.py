"""Where parameters live, and how a stack of layers runs on them.

Tables are divided among all devices by rows, matrices of layers by rows over `data` if asked
(FSDP). The rest is on every device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import Array, Float, PyTree

from ultra_hstu.parallel.embedding_sharding import EmbeddingTable
from ultra_hstu.parallel.mesh import CONTEXT, DATA, EVERYWHERE
from ultra_hstu.parallel.shards import Shards

TABLE, MATRIX = PartitionSpec((DATA, CONTEXT)), PartitionSpec(DATA)

CallLayer = Callable[[nnx.Module, Array], Array]
Policy = Callable[..., Any]  # as `jax.checkpoint` takes it


@dataclasses.dataclass(frozen=True)
class ShardedLayers:
    """Runs layers of a stack inside `shard_map`: put it in the place of `run_layer` of an encoder.

    Matrices are put together (FSDP), once more in the backward. Gradients of a layer are complete
    before the backward goes on.
    """

    shards: Shards

    def __call__(
        self,
        call: CallLayer,
        layer: nnx.Module,
        x_TD: Float[Array, "T D"],
        policy: Policy | None,
    ) -> Float[Array, "P D"]:
        graphdef, params = nnx.split(layer)
        x_TD, params = _in_order(x_TD, params)
        gathers = self.shards.fsdp and self.shards.data > 1

        def run(x_TD: Array) -> Array:
            def whole(x: Array) -> Array:
                return _gathered(x_TD.dtype, x) if gathers and x.ndim == 2 else x

            return call(nnx.merge(graphdef, jax.tree.map(whole, params)), x_TD)

        if policy is None and self.shards.fsdp:
            policy = _keep_no_matrix
        return run(x_TD) if policy is None else jax.checkpoint(run, policy=policy)(x_TD)


def specs(tree: PyTree, shards: Shards) -> PyTree:
    """The PartitionSpec of every array of a pytree.

    It holds parameters, or whatever is made like them (an optimizer's state).

    Raises:
      ValueError: a matrix that `fsdp` cannot divide.
    """

    def spec(path: KeyPath, leaf: PyTree) -> PartitionSpec:
        if isinstance(leaf, EmbeddingTable):
            return TABLE
        if not (shards.fsdp and is_matrix_of_layer(path, leaf)):
            return EVERYWHERE
        if leaf.shape[0] % shards.data:
            raise ValueError(
                "parallel.fsdp=True divides the matrices of layers by their rows over "
                f"parallel.data={shards.data}, but {jax.tree_util.keystr(path)} has "
                f"{leaf.shape[0]}: choose widths that it divides, or fsdp=False"
            )
        return MATRIX

    return jax.tree_util.tree_map_with_path(
        spec, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def is_matrix_of_layer(path: KeyPath, leaf: PyTree) -> bool:
    """Whether an entry of a pytree of parameters is a matrix that a layer multiplies with."""
    of_a_layer = any(
        getattr(entry, "key", getattr(entry, "name", None)) == "layers" for entry in path
    )
    return of_a_layer and isinstance(leaf, nnx.Variable) and leaf.ndim == 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(dtype: jnp.dtype, x: Array) -> Array:
    """All of a matrix. Rounded before it travels; its gradients are added up in float32."""
    return jax.lax.all_gather(x.astype(dtype), DATA, tiled=True)


def _gathered_backward(dtype: jnp.dtype, _: None, g: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(g.astype(jnp.float32), DATA, tiled=True),)


_gathered.defvjp(lambda dtype, x: (_gathered(dtype, x), None), _gathered_backward)


@jax.custom_vjp
def _in_order(x: Array, params: PyTree) -> tuple[Array, PyTree]:
    """What it is given.

    In the backward, the gradients of `params` are complete before that of `x` goes on. Where there
    are collectives to hide, XLA puts off the products that give a layer's parameters their
    gradients and holds the operands of all layers' until then: more than all activations.
    """
    return x, params


_in_order.defvjp(
    lambda x, params: ((x, params), None), lambda _, g: jax.lax.optimization_barrier(g)
)


def _keep_no_matrix(primitive: Any, *_: Any, **settings: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward puts matrices together again, keeps the rest."""
    if primitive.name != "custom_vjp_call":
        return True
    primitives = {eqn.primitive.name for eqn in settings["call_jaxpr"].eqns}
    return not primitives <= {"convert_element_type", "all_gather"}  # those of `_gathered`


def summed(grads: PyTree, specs: PyTree) -> PyTree:
    """Gradients of the sum of all devices' losses, from those of each. Inside `shard_map`."""

    def add(spec: PartitionSpec, leaf: PyTree) -> PyTree:
        # The transposes of a lookup and of an all-gather have added up over the axes that they use.
        axes = {TABLE: (), MATRIX: (CONTEXT,), EVERYWHERE: (DATA, CONTEXT)}[spec]
        return jax.tree.map(lambda g: jax.lax.psum(g, axes), leaf) if axes else leaf

    return jax.tree.map(add, specs, grads, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
