"""Projections whose forward product runs in float8 (ULTRA-HSTU, arXiv 2602.16986).

Values are e4m3, with one scale a row of the activations and one a column of the weights.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX = 448.0
SMALLEST = 1e-12  # the published code's floor of a row's largest magnitude

Precision = Literal["same", "fp8"]
Gradient = Literal["same", "fp8"]


def linear(
    x_TX: Float[Array, "T X"],
    w_XY: Float[Array, "X Y"],
    bias_Y: Float[Array, " Y"] | None = None,
    *,
    residual_TY: Float[Array, "T Y"] | None = None,
    precision: Precision = "same",
    gradient: Gradient = "same",
) -> Float[Array, "T Y"]:
    """`residual + x @ w + bias` in the dtype of x.

    "same" works in the dtype of x. "fp8" rounds x and w to e4m3 and sums products in float32, where
    scales, bias and residual follow; one rounding to the dtype of x ends it. Its gradients are
    those of the product without the rounding, in the dtype of x (bfloat16 in training); with
    `gradient` "fp8", the product that makes x's gradient rounds the result's gradient by rows, and
    w, to e4m3.

    Raises:
      ValueError: another precision or gradient, or an "fp8" gradient of "same" precision.
    """
    if gradient not in ("same", "fp8") or (gradient == "fp8" and precision == "same"):
        raise ValueError(f"{gradient=} must be 'same', or 'fp8' beside precision='fp8'")
    if precision == "same":
        y_TY = x_TX @ w_XY.astype(x_TX.dtype)
        y_TY = y_TY if residual_TY is None else residual_TY + y_TY
        return y_TY if bias_Y is None else y_TY + bias_Y.astype(x_TX.dtype)[None]
    if precision != "fp8":
        raise ValueError(f"{precision=} must be 'same' or 'fp8'")
    y_TY = scaled_product(x_TX, w_XY, gradient)
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


def scaled_product(
    x_TX: Float[Array, "T X"], w_XY: Float[Array, "X Y"], gradient: Gradient = "same"
) -> Float[Array, "T Y"]:
    """`x @ w` in float32, of x rounded to e4m3 by rows and w by columns."""
    return _scaled_product(gradient, x_TX, w_XY)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_product(gradient: Gradient, x_TX: Array, w_XY: Array) -> Array:
    qx_TX, x_scale_T1 = quantize(x_TX, axis=1)
    qw_XY, w_scale_1Y = quantize(w_XY, axis=0)
    y_TY = jnp.matmul(
        qx_TX, qw_XY, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )
    return y_TY * (x_scale_T1 * w_scale_1Y)


def _forward(gradient: Gradient, x_TX: Array, w_XY: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scaled_product(gradient, x_TX, w_XY), (x_TX, w_XY)


def _backward(gradient: Gradient, saved: tuple[Array, Array], g_TY: Array) -> tuple[Array, Array]:
    x_TX, w_XY = saved
    g_TY = g_TY.astype(x_TX.dtype)
    d_w_XY = jnp.einsum("tx,ty->xy", x_TX, g_TY, preferred_element_type=jnp.float32)
    if gradient == "fp8":
        d_x_TX = scaled_product(g_TY, w_XY.T).astype(x_TX.dtype)
    else:
        d_x_TX = g_TY @ w_XY.astype(x_TX.dtype).T
    return d_x_TX, d_w_XY.astype(w_XY.dtype)


_scaled_product.defvjp(_forward, _backward)


def exact_linear(
    x_TX: Float[Array, "T X"], w_XY: Float[Array, "X Y"], bias_Y: Float[Array, " Y"] | None
) -> Float[Array, "T Y"]:
    """`x @ w + bias` in float32: what `linear` comes near in any precision."""
    y_TY = jnp.matmul(x_TX, w_XY.astype(jnp.float32), precision="highest")
    return y_TY if bias_Y is None else y_TY + bias_Y.astype(jnp.float32)[None]
