"""Attention that takes the memory of the Hopper kernel and computes nothing: for compiled programs whose memory is to be read, on machines without a GPU.

Inputs and outputs are whole arrays, q, k and v alone are kept for the backward, and dQ is summed in float32. A program that holds it must not be run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.hstu_attention import api

NAME = "abstract"


def install() -> str:
    """Makes it an implementation of `hstu_attention` in this process; returns its name."""
    api.implementations()[NAME] = __name__
    return NAME


def attention(
    q_THK: Array, k_THK: Array, v_THV: Array, plan: Any, *, alpha: float, scale: Any, bias: Any, deterministic: bool = False
) -> Array:
    """See `hstu_attention`."""
    return _attend(q_THK, k_THK, v_THV)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array) -> Array:
    return _opaque(v)(q, k, v)[0]


def _backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    q, k, v = saved
    dq, dk, dv = _opaque(jax.ShapeDtypeStruct(q.shape, jnp.float32), k, v)(q, k, v, g)
    return dq.astype(q.dtype), dk, dv


_attend.defvjp(lambda q, k, v: (_attend(q, k, v), (q, k, v)), _backward)


def _opaque(*results: Any) -> Any:
    """A call that the compiler cannot look into, with results of these shapes and dtypes."""
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results)
    return functools.partial(jax.pure_callback, _never, shapes)


def _never(*_: Any) -> None:
    raise NotImplementedError(f"implementation {NAME!r} takes memory and computes nothing: compile with it, and run with another one")
