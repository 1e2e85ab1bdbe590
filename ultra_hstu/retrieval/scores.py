"""Scores that have one value: a dot product is decided by its two vectors alone, to the bit.

A matrix product adds up in an order that depends on its shape, on where a row stands in it and on
the device, so that two equal embeddings may score differently in the last bits, and rounding would
decide their tie. Here every vector is cut into digits, whole numbers so small that the products of
two vectors' digits add up in float32 without any rounding, in whatever order (error-free splitting:
Ozaki, Ogita, Oishi and Rump, Numerical Algorithms 59, 2012). What is rounded, the sum over pairs of
digits, is computed item by item in one order. Norms need a root and a quotient, which a GPU rounds
as its compiler likes: those that are compared come from one call (`factors`).

A score costs six products in the place of one. Up to a width of 1,024 it is as exact as a float32
product, or more so.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ultra_hstu.nn.norms import L2_EPS

DIGITS = 3
EXACT_BITS = 24  # float32 holds every whole number up to 2^24
EXPONENT, ONE = 0x7F800000, 127 << 23  # bits of a float32: where its exponent is; those of 1.0

Scores = Float[Array, "*shape"]


class Digits(NamedTuple):
    """Vectors as `x_d = scale * sum over s of digit_s,d * 2^-(s (bits + 1))`.

    The digits are whole numbers of at most `2^bits` in magnitude, with D * 2^(2 bits) <= 2^24.
    """

    digit_XD: tuple[Float[Array, "X D"], ...]
    scale_X: Float[Array, " X"]  # powers of two


def digits(x_XD: Float[Array, "X D"]) -> Digits:
    """The digits of vectors.

    A vector counts as if its largest magnitude were between 2^-60 and 2^60. Scores with a vector
    that holds NaN or infinity are NaN.
    """
    x_XD = x_XD.astype(jnp.float32)
    bits = _bits(x_XD.shape[1])
    largest_X = jnp.clip(jnp.max(jnp.abs(x_XD), axis=1), 2.0**-60, 2.0**60)
    # Powers of two are made of their bits: products with them are exact on every device.
    power_X = jax.lax.bitcast_convert_type(largest_X, jnp.int32) & EXPONENT
    scale_X = _float(power_X + ((1 - bits) << 23))
    rest_XD = x_XD * _float(2 * ONE - power_X - ((1 - bits) << 23))[:, None]
    found = []
    for _ in range(DIGITS):
        found.append(jnp.round(rest_XD))
        rest_XD = (rest_XD - found[-1]) * 2.0 ** (bits + 1)
    return Digits(tuple(found), scale_X)


def factors(*items: Digits, l2_normalize: bool) -> list[Float[Array, " _"]]:
    """What the sums of the items' digits are multiplied by: scale / max(norm, 1e-6), or scale.

    Those of all items come from the same operations. Barriers keep a compiler from computing a part
    of them elsewhere, or from folding the quotient into what follows.
    """
    scale_X = jnp.concatenate([e.scale_X for e in items])
    if l2_normalize:
        square_X = jnp.concatenate([_paired_sums(e, e) for e in items])
        scale_X, square_X = jax.lax.optimization_barrier((scale_X, square_X))
        norm_X = jnp.maximum(scale_X * jnp.sqrt(square_X), L2_EPS)
        scale_X = jax.lax.optimization_barrier(scale_X / norm_X)
    ends = np.cumsum([e.scale_X.shape[0] for e in items])
    return jnp.split(scale_X, ends[:-1])


def all_scores(h: Digits, e: Digits, factor_I: Float[Array, " I"]) -> Float[Array, "U I"]:
    """The score of every user with every item."""

    def product(i: int, j: int) -> Float[Array, "U I"]:
        return jnp.matmul(h.digit_XD[i], e.digit_XD[j].T, precision="highest")

    sum_UI = _total(product, _bits(h.digit_XD[0].shape[1]))
    return sum_UI * factor_I[None, :] * h.scale_X[:, None]


def paired_scores(h: Digits, e: Digits, factor_U: Float[Array, " U"]) -> Float[Array, " U"]:
    """The score of every user with an item of its own: the same bits as among `all_scores`, if the
    factors are from one call.
    """
    return _paired_sums(h, e) * factor_U * h.scale_X


def linear(x_XD: Float[Array, "X D"], w_DY: Float[Array, "D Y"]) -> Float[Array, "X Y"]:
    """x @ w, every entry decided by its row of x and its column of w."""
    column = digits(w_DY.T)
    return all_scores(digits(x_XD), column, column.scale_X)


def unit(x_XD: Float[Array, "X D"]) -> Float[Array, "X D"]:
    """x / max(norm, 1e-6), every row decided by itself."""
    x = digits(x_XD)
    scale_X, square_X = jax.lax.optimization_barrier((x.scale_X, _paired_sums(x, x)))
    norm_X = jnp.maximum(scale_X * jnp.sqrt(square_X), L2_EPS)
    return x_XD / jax.lax.optimization_barrier(norm_X)[:, None]


def _paired_sums(h: Digits, e: Digits) -> Float[Array, " X"]:
    def product(i: int, j: int) -> Float[Array, " X"]:
        return jnp.sum(h.digit_XD[i] * e.digit_XD[j], axis=1)

    return _total(product, _bits(h.digit_XD[0].shape[1]))


def _bits(width: int) -> int:
    return (EXACT_BITS - (width - 1).bit_length()) // 2


def _total(product: Callable[[int, int], Scores], bits: int) -> Scores:
    """The sum of the products of digits, the smallest first.

    Pairs with i + j above 2 are left out: each stands for less than 2^-(3 bits + 3) of the largest.
    No product and no scaling is rounded, so that fusing them with the additions changes nothing.
    """
    total: Scores | float = 0.0
    for order in reversed(range(DIGITS)):
        terms = [product(i, order - i) for i in range(order + 1)]
        total = functools.reduce(operator.add, terms, total * 2.0 ** -(bits + 1))
    assert not isinstance(total, float)
    return total


def _float(bits_X: Array) -> Float[Array, " X"]:
    return jax.lax.bitcast_convert_type(bits_X, jnp.float32)
