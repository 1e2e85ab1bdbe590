"""Projections whose forward product runs in float8 (ULTRA-HSTU, arXiv 2602.16986).

Values are e4m3, with one scale a row of the activations and one a column of the weights.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX = 448.0
SMALLEST = 1e-12  # the published code's floor of a row's largest magnitude

Precision = Literal["same", "fp8"]


def linear(
    x_TX: Float[Array, "T X"],
    w_XY: Float[Array, "X Y"],
    bias_Y: Float[Array, " Y"] | None = None,
    *,
    residual_TY: Float[Array, "T Y"] | None = None,
    precision: Precision = "same",
) -> Float[Array, "T Y"]:
    """`residual + x @ w + bias` in the dtype of x.

    "same" works in the dtype of x. "fp8" rounds x and w to e4m3 and sums products in float32, where
    scales, bias and residual follow; one rounding to the dtype of x ends it. Its gradients are
    those of the product without the rounding, in the dtype of x (bfloat16 in training).

    Raises:
      ValueError: another precision.
    """
    if precision == "same":
        y_TY = x_TX @ w_XY.astype(x_TX.dtype)
        y_TY = y_TY if residual_TY is None else residual_TY + y_TY
        return y_TY if bias_Y is None else y_TY + bias_Y.astype(x_TX.dtype)[None]
    if precision != "fp8":
        raise ValueError(f"{precision=} must be 'same' or 'fp8'")
    y_TY = scaled_product(x_TX, w_XY)
    if bias_Y is not None:
        y_TY += bias_Y.astype(jnp.float32)[None]
    if residual_TY is not None:
        y_TY += residual_TY.astype(jnp.float32)
    return y_TY.astype(x_TX.dtype)


def quantize(x: Float[Array, "*shape"], axis: int) -> tuple[Array, Float[Array, "..."]]:
    """e4m3 values and float32 scales, `x = values * scale`.

    All entries along `axis` share one scale: the largest magnitude becomes 448.
    """
    x32 = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=axis, keepdims=True), SMALLEST) / E4M3_MAX
    return (x32 / scale).astype(jnp.float8_e4m3fn), scale


@jax.custom_vjp
def scaled_product(x_TX: Float[Array, "T X"], w_XY: Float[Array, "X Y"]) -> Float[Array, "T Y"]:
    """`x @ w` in float32, of x rounded to e4m3 by rows and w by columns."""
    qx_TX, x_scale_T1 = quantize(x_TX, axis=1)
    qw_XY, w_scale_1Y = quantize(w_XY, axis=0)
    y_TY = jnp.matmul(
        qx_TX, qw_XY, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
    return y_TY * (x_scale_T1 * w_scale_1Y)


def _backward(saved: tuple[Array, Array], g_TY: Array) -> tuple[Array, Array]:
    x_TX, w_XY = saved
    g_TY = g_TY.astype(x_TX.dtype)
    d_w_XY = jnp.einsum("tx,ty->xy", x_TX, g_TY, preferred_element_type=jnp.float32)
    return g_TY @ w_XY.astype(x_TX.dtype).T, d_w_XY.astype(w_XY.dtype)


scaled_product.defvjp(lambda x_TX, w_XY: (scaled_product(x_TX, w_XY), (x_TX, w_XY)), _backward)
