"""Shapes that matter, shared by tests, tuning and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.hstu_attention.plan import AttentionSpec
from kernels.hstu_attention.relative_bias import RelativeBias
from kernels.jagged import lengths_to_offsets
from kernels.mask import AttentionMask


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention call of a model.

    Attributes:
      lengths: of the sequences.
      capacity: T; None is the sum of the lengths.
      heads, k_width, v_width: H, K, V.
      max_length: N, which divides the output.
      bias: relative bias with both tables.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    k_width: int
    v_width: int
    mask: AttentionMask = AttentionMask()  # noqa: RUF009 - frozen
    max_length: int = 8192
    capacity: int | None = None
    dtype: str = "bfloat16"
    bias: bool = False

    @property
    def rows(self) -> int:
        return self.capacity or sum(self.lengths)

    @property
    def alpha(self) -> float:
        """Factor on the scores."""
        return self.k_width**-0.5

    @property
    def scale(self) -> float:
        """Factor on the outputs."""
        return 1 / self.max_length

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.dtype, self.heads, self.k_width, self.v_width, self.bias)

    @property
    def forward_flops(self) -> float:
        """Useful ones: two products over unmasked pairs."""
        return 2.0 * self.mask.num_pairs(self.lengths) * self.heads * (self.k_width + self.v_width)

    @property
    def backward_flops(self) -> float:
        """By the convention of flash attention: 2.5 times the forward."""
        return 2.5 * self.forward_flops

    @property
    def forward_bytes(self) -> int:
        """Read q, k, v and write the output once."""
        entries = 2 * self.rows * self.heads * (self.k_width + self.v_width)
        return entries * jnp.dtype(self.dtype).itemsize

    def offsets(self) -> np.ndarray:
        return np.asarray(lengths_to_offsets(self.lengths, xp=np))

    def arrays(self, seed: int = 0) -> dict[str, jax.Array]:
        """Random q, k, v and output cotangent g.

        They are drawn in float32: numbers drawn in bfloat16 are few, and their roundings do not
        average out.
        """
        keys = jax.random.split(jax.random.key(seed), 4)
        widths = {"q": self.k_width, "k": self.k_width, "v": self.v_width, "g": self.v_width}
        return {
            name: jax.random.normal(key, (self.rows, self.heads, width)).astype(self.dtype)
            for key, (name, width) in zip(keys, widths.items(), strict=True)
        }

    def relative_bias(self) -> RelativeBias | None:
        """Random tables and times, where the calls have a bias."""
        if not self.bias:
            return None
        rng = np.random.default_rng(1)
        times = np.cumsum(np.exp(rng.uniform(0, 11, self.rows + 1))).astype(np.int32)
        tables = (
            rng.standard_normal(n, dtype=np.float32) * 0.02 for n in (2 * self.max_length - 1, 129)
        )
        return RelativeBias(*(jnp.asarray(x) for x in (*tables, times[:-1], times[1:])))


def _uniform_lengths(total: int, longest: int) -> tuple[int, ...]:
    """Uniform in [0, longest], until they sum to `total`."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(int(rng.integers(0, longest + 1)), total - sum(lengths)))
    return tuple(lengths)


def _movielens_lengths(users: int, capacity: int) -> tuple[int, ...]:
    """About the histories of MovieLens-1M: log-normal, cut at 200, mean 115."""
    lengths = np.exp(np.random.default_rng(0).normal(4.6, 0.8, users)).clip(5, 200).astype(int)
    while lengths.sum() > capacity:
        lengths[lengths.argmax()] = 5
    return tuple(int(n) for n in lengths)


_WINDOW = AttentionMask(window=256)
_SEMI_LOCAL = AttentionMask(window=256, full_rows=256)
_ML1M = _movielens_lengths(128, 18432)

WORKLOADS = {
    w.name: w
    for w in (
        Workload("causal_d128_4x8192", (8192,) * 4, 4, 128, 128),
        Workload("causal_d128_8x8192", (8192,) * 8, 4, 128, 128),
        Workload("causal_d64_4x8192", (8192,) * 4, 8, 64, 64),
        Workload("causal_d256_4x8192", (8192,) * 4, 4, 256, 256),
        Workload("window_d128_2x16384", (16384,) * 2, 4, 128, 128, _WINDOW, max_length=16384),
        Workload(
            "semi_local_d128_2x16384", (16384,) * 2, 4, 128, 128, _SEMI_LOCAL, max_length=16384
        ),
        Workload("jagged_d128_65536", _uniform_lengths(65536, 8192), 4, 128, 128),
        Workload("short_d64_512x100", (100,) * 512, 4, 64, 64, max_length=128),
        *(
            Workload(
                f"ml1m{large}{suffix}",
                _ML1M,
                heads,
                50 // heads,
                50 // heads,
                max_length=211,
                capacity=18432,
                dtype=dtype,
                bias=True,
            )
            for suffix, dtype in (("", "float32"), ("_bf16", "bfloat16"))
            for large, heads in (("", 1), ("_large", 2))
        ),
    )
}
