"""Mixture of logits: a score is a weighted mean of products of components (arXiv 2407.15462).

A user has P_u components f, an item P_x components g, all of one width. The weights of their
L = P_u P_x products are a softmax over what three small nets make of the user, of the item and of
the products themselves:

    score(u, x) = sum_l weight_l(u, x) logit_l(u, x),  logit_pq = f_p(u) . g_q(x) / temperature
    weight = softmax(silu(user_gate(u) * item_gate(x) + cross_gate(logits)))

The parts of a user and of an item are made once each (`UserPart`, `ItemPart`); only the cross gate
and what follows it meet every pair. So a catalogue is scored from parts of its items.

The formula is written once, for two ways to compute it (`Arithmetic`). Training takes products as
they are fastest. Answers take sums without rounding (`scores`), so that two items with equal
vectors have equal scores and tie, in chunks of any size.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from ultra_hstu.nn.dropout import KeysOrNone, apply_dropout, dropout
from ultra_hstu.nn.initializers import normal_002, param, table, xavier_normal, xavier_uniform
from ultra_hstu.nn.norms import l2_normalize as unit_rows
from ultra_hstu.parallel.embedding_sharding import lookup
from ultra_hstu.parallel.shards import ONE, Shards
from ultra_hstu.retrieval import scores
from ultra_hstu.sections import MolConfig

EPS = 1e-6  # of the norm of a user's vector, and of weights that dropout left
Pairs = Float[Array, "*pairs L"]


class UserPart(NamedTuple):
    """What is made of users, or of rows: component products with it are logits."""

    component_UPW: Float[Array, "U P W"]  # over the temperature
    gate_UL: Float[Array, "U L"]


class ItemPart(NamedTuple):
    """What is made of items, in the order of their table."""

    component_IQW: Float[Array, "I Q W"]
    gate_IL: Float[Array, "I L"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a table of them: how many there are comes first."""
        return self.gate_IL.shape


class Net(NamedTuple):
    """`silu(x @ hidden + hidden_bias) @ output + output_bias`."""

    hidden_DH: Float[Array, "D H"]
    hidden_bias_H: Float[Array, " H"]
    output_HL: Float[Array, "H L"]
    output_bias_L: Float[Array, " L"] | None


class Arithmetic(NamedTuple):
    """How products and sums are computed."""

    linear: Callable[[Float[Array, "X D"], Float[Array, "D Y"]], Float[Array, "X Y"]]
    unit: Callable[[Float[Array, "X D"]], Float[Array, "X D"]]
    # Keeps what was computed apart from what follows: whether a product is rounded before a sum is
    # then no choice of the compiler.
    apart: Callable[[Array], Array]
    total: Callable[[Pairs], Float[Array, "*pairs"]]  # over the last axis

    def net(self, net: Net, x_XD: Float[Array, "*pairs D"]) -> Pairs:
        flat_XD = x_XD.reshape(-1, x_XD.shape[-1])
        hidden_XH = self.linear(flat_XD, net.hidden_DH) + net.hidden_bias_H[None]
        out_XL = self.linear(jax.nn.silu(hidden_XH), net.output_HL)
        if net.output_bias_L is not None:
            out_XL = out_XL + net.output_bias_L[None]
        return out_XL.reshape(*x_XD.shape[:-1], out_XL.shape[1])


def fast(dtype: DTypeLike) -> Arithmetic:
    """Products in a dtype with sums in float32: differentiable."""

    def linear(x_XD: Float[Array, "X D"], w_DY: Float[Array, "D Y"]) -> Float[Array, "X Y"]:
        return jnp.matmul(x_XD.astype(dtype), w_DY.astype(dtype), preferred_element_type=FLOAT)

    return Arithmetic(linear, unit_rows, lambda x: x, functools.partial(jnp.sum, axis=-1))


def _in_order(x: Pairs) -> Float[Array, "*pairs"]:
    return functools.reduce(operator.add, (x[..., i] for i in range(x.shape[-1])))


FLOAT = jnp.float32
EXACT = Arithmetic(scores.linear, scores.unit, jax.lax.optimization_barrier, _in_order)


class Dropped(NamedTuple):
    """What decides which weights of a pair are dropped: its row's word and its item's number.

    So they are the same in chunks of any size, among sampled items or all, on every mesh.
    """

    word: UInt32[Array, "*#pairs"]
    number: Int[Array, "*#pairs"]
    rate: float


class GateNet(nnx.Module):
    """The parameters of a `Net`."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs
    ):
        self.hidden = param(xavier_uniform, rngs, inputs, width)
        self.hidden_bias = _zeros(width)
        self.output = param(xavier_uniform, rngs, width, outputs)
        self.output_bias = _zeros(outputs) if bias else None

    @property
    def net(self) -> Net:
        bias = None if self.output_bias is None else self.output_bias[...]
        return Net(self.hidden[...], self.hidden_bias[...], self.output[...], bias)


class MixtureOfLogits(nnx.Module):
    """The parameters of a mixture, and the parts that it makes of users and items."""

    def __init__(
        self,
        config: MolConfig,
        width: int,
        *,
        temperature: float,
        l2_normalize: bool,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          width: D, of a user's vector and of an item's.
          temperature, l2_normalize: of the products of components.
        """
        self.config, self.temperature, self.l2_normalize = config, temperature, l2_normalize
        users = config.user_components - bool(config.user_ids)
        of_users, of_items = (n * config.component_width for n in (users, config.item_components))
        logits, gate = config.user_components * config.item_components, config.gate_width
        hidden = config.hidden_width
        self.user_hidden = param(normal_002, rngs, width, 2 * hidden)
        self.user_hidden_bias = _zeros(2 * hidden)
        self.user_output = param(xavier_uniform, rngs, hidden, of_users)
        self.user_output_bias = _zeros(of_users)
        self.item_output = param(xavier_uniform, rngs, width, of_items)
        self.item_output_bias = _zeros(of_items)
        self.user_gate = GateNet(width, gate, logits, rngs=rngs)
        self.item_gate = GateNet(width, gate, logits, rngs=rngs)
        self.cross_gate = GateNet(logits, gate, logits, bias=True, rngs=rngs)
        ids = config.user_ids
        self.user_table = table(xavier_normal, rngs, ids, config.component_width) if ids else None

    @property
    def cross(self) -> Net:
        """The gate's net of the products."""
        return self.cross_gate.net

    def of_ids(self, code_t: Int[Array, " t"], shards: Shards = ONE) -> Float[Array, "t W"]:
        """The component of users by their ids' codes, zeros for code 0, of a mixture with such."""
        assert self.user_table is not None
        return lookup(self.user_table[...], code_t - 1, shards)

    def users(
        self,
        h_UD: Float[Array, "U D"],
        of_id_UW: Float[Array, "U W"] | None,
        arithmetic: Arithmetic,
        *,
        key: KeysOrNone = None,
    ) -> UserPart:
        """The parts of users by the encoder's outputs and the components of their ids.

        Args:
          key: drops entries of the latter; None: nothing.
        """
        x_UD = h_UD.astype(FLOAT)
        x_UD = x_UD - jnp.mean(x_UD, axis=1, keepdims=True)
        x_UD = x_UD * jax.lax.rsqrt(jnp.mean(x_UD * x_UD, axis=1, keepdims=True) + EPS)
        hidden_UH = (
            arithmetic.linear(x_UD, self.user_hidden[...]) + self.user_hidden_bias[...][None]
        )
        gate_UH, value_UH = jnp.split(hidden_UH, 2, axis=1)
        out_UX = arithmetic.linear(jax.nn.silu(gate_UH) * value_UH, self.user_output[...])
        out_UX = out_UX + self.user_output_bias[...][None]
        if of_id_UW is not None:
            of_id_UW = dropout(of_id_UW, self.config.user_dropout, key)
            out_UX = jnp.concatenate([out_UX, of_id_UW], axis=1)
        component_UPW = self._components(out_UX, arithmetic) / self.temperature
        return UserPart(component_UPW, arithmetic.net(self.user_gate.net, x_UD))

    def items(
        self, e_ID: Float[Array, "I D"], arithmetic: Arithmetic, dropped: Dropped | None = None
    ) -> ItemPart:
        """The parts of items by their vectors."""
        e_ID = e_ID.astype(FLOAT)
        x_ID = e_ID
        if dropped is not None and dropped.rate:
            x_ID = apply_dropout(e_ID, kept(dropped, e_ID.shape[1]), dropped.rate)
        out_IX = arithmetic.linear(x_ID, self.item_output[...]) + self.item_output_bias[...][None]
        return ItemPart(
            self._components(out_IX, arithmetic), arithmetic.net(self.item_gate.net, e_ID)
        )

    def _components(self, out_XY: Float[Array, "X Y"], arithmetic: Arithmetic) -> Array:
        width = self.config.component_width
        if self.l2_normalize:
            out_XY = arithmetic.unit(out_XY.reshape(-1, width)).reshape(out_XY.shape)
        return out_XY.reshape(len(out_XY), -1, width)


def mixed(
    logit: Pairs,
    user_gate: Float[Array, "*#pairs L"],
    item_gate: Float[Array, "*#pairs L"],
    cross: Net,
    arithmetic: Arithmetic,
    dropped: Dropped | None = None,
) -> tuple[Float[Array, "*pairs"], Pairs]:
    """The score of pairs, and the weights of their logits."""
    apart = arithmetic.apart
    gate = apart(user_gate * item_gate) + arithmetic.net(cross, logit)
    gate = apart(gate * jax.nn.sigmoid(gate))
    if dropped is not None and dropped.rate:
        keep = kept(dropped, logit.shape[-1])
        keep |= ~jnp.any(keep, axis=-1, keepdims=True)  # a pair keeps some weight
        gate = jnp.where(keep, gate, -jnp.inf)
    gate = apart(gate - jax.lax.stop_gradient(jnp.max(gate, axis=-1, keepdims=True)))
    share = apart(jnp.exp(gate))
    of_all = arithmetic.total(share)
    score = arithmetic.total(apart(share * logit)) / of_all
    return score, share / of_all[..., None]


def kept(dropped: Dropped, count: int) -> Bool[Array, "*pairs {count}"]:
    """Which of `count` numbers of every pair stay: True with probability 1 - rate."""
    word = _scrambled(dropped.word ^ (dropped.number.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)))
    lane = jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x85EBCA77)
    lane = lane.reshape((1,) * word.ndim + (count,))
    return _scrambled(word[..., None] + lane) >= jnp.uint32(round(dropped.rate * 2**32))


def _scrambled(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A mix of the bits in which each one changes half of all (MurmurHash3's last step)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _zeros(size: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(size, FLOAT))
