"""The product of the linear ops on Hopper, in Pallas's GPU interpreter and as far as it lowers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.norm_linear.mosaic import product
from tests.kernels.mosaic_interpreter import interpreted


@pytest.mark.parametrize("form", ["pieces", "residual", "joined", "fp8", "fp8 residual"])
def test_product(monkeypatch, form):
    monkeypatch.setattr(product, "WORKERS", 4)
    rng = np.random.default_rng(0)
    dtype = jnp.float8_e4m3fn if "fp8" in form else jnp.bfloat16
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    ins, outs = ((128, 256), (256,)) if form == "joined" else ((256,), (256, 512))
    if "residual" in form:
        outs = (256,)
    xs = [draw(512, k).astype(dtype) for k in ins]
    w = draw(sum(outs), sum(ins)).astype(dtype)
    bias = draw(sum(outs)) if form != "joined" else None
    residual = draw(512, 256).astype(jnp.bfloat16) if "residual" in form else None
    scales = product.Scales(draw(512), draw(sum(outs))) if "fp8" in form else None
    with interpreted(monkeypatch):
        got = product.product(tuple(xs), w, bias, residual, scales, widths=outs, dtype=jnp.bfloat16)
    want = np.concatenate([np.asarray(x, np.float64) for x in xs], 1) @ np.asarray(w, np.float64).T
    if scales is not None:
        want = want * np.asarray(scales.rows)[:, None] * np.asarray(scales.columns)[None]
    if bias is not None:
        want = want + np.asarray(bias)[None]
    if residual is not None:
        want = want + np.asarray(residual, np.float64)
    got = np.concatenate([np.asarray(x, np.float64) for x in got], 1)
    assert np.abs(got - want).max() <= 2**-8 * np.abs(want).max()


@pytest.mark.parametrize("width", [512, 1536])
def test_it_fits_shared_memory(width):
    """With all that a call may have: held and streamed."""
    shape, results = jax.ShapeDtypeStruct, 2048 if width == 512 else 512

    def run(x, w, bias, residual, *scales):
        residual = None if width == 512 else residual
        scales, options = product.Scales(*scales), {"widths": (results,), "dtype": jnp.bfloat16}
        return product.product((x,), w, bias, residual, scales, **options)

    lowered = (
        jax.jit(run)
        .trace(
            shape((1024, width), jnp.float8_e4m3fn),
            shape((results, width), jnp.float8_e4m3fn),
            shape((results,), jnp.float32),
            shape((1024, results), jnp.bfloat16),
            shape((1024,), jnp.float32),
            shape((results,), jnp.float32),
        )
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert ("linear_held" if width == 512 else "linear_streamed") in lowered
