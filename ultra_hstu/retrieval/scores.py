"""Scores that have one value: a dot product is decided by its two vectors alone, to the bit.

A matrix product adds up in an order that depends on its shape, on where a row stands in it and on
the device, so that two equal embeddings may score differently in the last bits, and rounding would
decide their tie. Here every vector is cut into digits, whole numbers so small that the products of
two vectors' digits add up in float32 without any rounding, in whatever order (error-free splitting:
Ozaki, Ogita, Oishi and Rump, Numerical Algorithms 59, 2012). What is rounded, the sum over pairs of
digits and the norm, is computed item by item, always in the same order.

A score costs six products in the place of one. Up to a width of 1,024 it is as exact as a float32
product, or more so.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ultra_hstu.nn.norms import L2_EPS

DIGITS = 3
EXACT_BITS = 24  # float32 holds every whole number up to 2^24
EXPONENT, ONE = 0x7F800000, 127 << 23  # bits of a float32: where its exponent is; those of 1.0

Scores = Float[Array, "*shape"]


class Digits(NamedTuple):
    """Vectors as `x_d = factor * sum over s of digit_s,d * 2^-(s (bits + 1))`.

    The digits are whole numbers of at most `2^bits` in magnitude, with D * 2^(2 bits) <= 2^24.
    """

    digit_XD: tuple[Float[Array, "X D"], ...]
    factor_X: Float[Array, " X"]


def digits(x_XD: Float[Array, "X D"], *, unit: bool = False) -> Digits:
    """The digits of vectors; with `unit`, of x / max(norm of x, 1e-6).

    A vector counts as if its largest magnitude were between 2^-60 and 2^60. Scores with a vector
    that holds NaN or infinity are NaN.
    """
    x_XD = x_XD.astype(jnp.float32)
    bits = _bits(x_XD.shape[1])
    largest_X = jnp.clip(jnp.max(jnp.abs(x_XD), axis=1), 2.0**-60, 2.0**60)
    # Powers of two are made of their bits: products with them are exact on every device.
    power_X = jax.lax.bitcast_convert_type(largest_X, jnp.int32) & EXPONENT
    factor_X = _float(power_X + ((1 - bits) << 23))
    rest_XD = x_XD * _float(2 * ONE - power_X - ((1 - bits) << 23))[:, None]
    found = []
    for _ in range(DIGITS):
        found.append(jnp.round(rest_XD))
        rest_XD = (rest_XD - found[-1]) * 2.0 ** (bits + 1)
    if unit:
        square_X = _total(lambda i, j: jnp.sum(found[i] * found[j], axis=1), bits)
        norm_X = jnp.maximum(factor_X * jnp.sqrt(square_X), L2_EPS)
        # Without the barrier a compiler may fold the division into the products that follow.
        factor_X = jax.lax.optimization_barrier(factor_X / norm_X)
    return Digits(tuple(found), factor_X)


def all_scores(h: Digits, e: Digits) -> Float[Array, "U I"]:
    """The score of every user with every item."""

    def product(i: int, j: int) -> Float[Array, "U I"]:
        return jnp.matmul(h.digit_XD[i], e.digit_XD[j].T, precision="highest")

    total_UI = _total(product, _bits(h.digit_XD[0].shape[1]))
    return total_UI * e.factor_X[None, :] * h.factor_X[:, None]


def paired_scores(h: Digits, e: Digits) -> Float[Array, " U"]:
    """The score of every user with an item of its own: the same bits as among `all_scores`."""

    def product(i: int, j: int) -> Float[Array, " U"]:
        return jnp.sum(h.digit_XD[i] * e.digit_XD[j], axis=1)

    total_U = _total(product, _bits(h.digit_XD[0].shape[1]))
    return total_U * e.factor_X * h.factor_X


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
