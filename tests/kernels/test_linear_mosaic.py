import jax.numpy as jnp
import numpy as np
import pytest

from kernels.norm_linear.mosaic import product
from tests.kernels.mosaic_interpreter import interpreted


@pytest.mark.parametrize("form", ["pieces", "residual", "joined", "fp8"])
def test_product(monkeypatch, form):
    monkeypatch.setattr(product, "WORKERS", 4)
    rng = np.random.default_rng(0)
    dtype = jnp.float8_e4m3fn if form == "fp8" else jnp.bfloat16
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    ins, outs = ((128, 256), (256,)) if form == "joined" else ((256,), (256, 512))
    if form == "residual":
        outs = (256,)
    xs = [draw(512, k).astype(dtype) for k in ins]
    w = draw(sum(outs), sum(ins)).astype(dtype)
    bias = draw(sum(outs)) if form != "joined" else None
    residual = draw(512, 256).astype(jnp.bfloat16) if form == "residual" else None
    scales = product.Scales(draw(512), draw(sum(outs))) if form == "fp8" else None
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
