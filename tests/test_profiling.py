"""Profiles: what a trace says of a program whose kernels are known."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from ultra_hstu import instructions, profiling
from ultra_hstu.nn.norms import l2_normalize

LOOPS = 5
WIDTH = 384


@pytest.fixture(scope="module")
def profile():
    """Three calls of a loop over a norm and a matrix product."""

    def loop(x_TD, weight_DD):
        return jax.lax.fori_loop(0, LOOPS, lambda _, x: l2_normalize(x) @ weight_DD, x_TD)

    x = jnp.ones((WIDTH, WIDTH))
    program = jax.jit(loop).lower(x, x).compile()
    jax.block_until_ready(program(x, x))
    return profiling.profiled(lambda: [program(x, x) for _ in range(3)], [program], steps=3)[0]


def test_kernels_have_kinds_sources_and_counts(profile):
    product = next(one for one in profile.kernels if one.kind == "matrix products")
    assert product.calls == LOOPS
    norm = [one for one in profile.kernels if "nn/norms.py:l2_normalize" in one.source]
    sums = sum(one.calls for one in norm if one.kind == "reductions")
    assert sums == LOOPS
    assert [one.seconds for one in profile.kernels] == sorted(
        (one.seconds for one in profile.kernels), reverse=True
    )


def test_a_loop_is_not_counted_beside_its_body(profile):
    kinds = profile.kinds()
    assert kinds["control flow"][1] < kinds["matrix products"][1]
    assert 0 < profile.busy <= profile.seconds
    assert list(kinds)[-1] == profiling.IDLE
    assert kinds[profiling.IDLE][1] == pytest.approx(profile.seconds - profile.busy)


def test_the_tables_and_the_record_say_the_same(profile):
    screen = Console(file=io.StringIO(), width=120)
    for table in profile.tables("a loop"):
        screen.print(table)
    shown, record = screen.file.getvalue(), profile.to_json(shown=2)
    assert "a loop" in shown and "nn/norms.py:l2_normalize" in shown
    assert f"{record['kinds']['matrix products']['ms']:.3f}" in shown
    assert len(record["longest"]) == 2
    assert record["longest"][0]["ms"] == 1e3 * profile.kernels[0].seconds


def test_gradients_and_fused_operations_are_seen_in_a_program():
    text = jax.jit(jax.grad(lambda x: jnp.sum(l2_normalize(x) ** 3))).lower(jnp.ones((8, WIDTH)))
    found = instructions.instructions(text.compile().as_text())
    backward = [one for one in found.values() if one.backward and "l2_normalize" in one.source]
    assert backward
    assert any({"fusion", "multiply"} <= one.operations for one in found.values())


def test_kernels_of_our_own_are_known_by_their_names():
    unknown = instructions.Instruction(frozenset())
    for name in ("hstu_forward_mosaic_gpu_kernel", "backward_queries"):  # of Mosaic and of Triton
        assert instructions.kind_of(name, unknown) == "attention"
    assert instructions.kind_of("nvjet_hsh_128x256", unknown) == "matrix products"
    assert instructions.kind_of("MemcpyD2D", unknown) == "copies"


def test_a_folder_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"no kernel was traced in {tmp_path}"):
        profiling.read(tmp_path, [], seconds=1.0, steps=1)
