"""The compiled part of answering: users to vectors, and the best items of the catalogue for these.

Item tables may be packed (`quantization`).
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ultra_hstu import quantization
from ultra_hstu.nn.norms import l2_normalize
from ultra_hstu.quantization import ItemTable
from ultra_hstu.retrieval import mol_scores
from ultra_hstu.retrieval.batch import Batch
from ultra_hstu.retrieval.metrics import best_items
from ultra_hstu.retrieval.mol import ItemPart
from ultra_hstu.retrieval.mol_scores import Answering, item_part
from ultra_hstu.retrieval.recipe import Recipe
from ultra_hstu.step import Params


def encode(recipe: Recipe, params: Params, batch: Batch) -> Float[Array, "U D"]:
    # The model meets a table of the batch's rows alone, so that a packed table is never unpacked as
    # a whole.
    row_TD = quantization.rows(quantization.served_table(params), batch.item_T)
    rows = row_TD.shape[0]
    local_TD = jnp.concatenate([jnp.zeros_like(row_TD[:1]), row_TD])
    local_T = jnp.where(batch.item_T > 0, jnp.arange(1, rows + 1, dtype=jnp.int32), 0)
    model = recipe.model(quantization.with_item_table(params, local_TD))
    user_UD = model.queries(dataclasses.replace(batch, item_T=local_T))
    cosines = recipe.config.loss.l2_normalize and model.mixture is None
    return l2_normalize(user_UD) if cosines else user_UD.astype(jnp.float32)


class OfMixture(NamedTuple):
    """The parts of all items, and the parameters that make those of users."""

    params: Params
    items: ItemPart


Scored = ItemTable | OfMixture  # what items are scored by


def scored(params: Params, items: Float[Array, "I1 D"] | ItemPart) -> Scored:
    """What `best` and `best_of_mixture` take, from what `scored_items` makes."""
    return OfMixture(params, items) if isinstance(items, ItemPart) else items


def scored_items(recipe: Recipe, params: Params) -> Float[Array, "I1 D"] | ItemPart:
    """What items are scored by, of a model whose tokens are made of something else."""
    model = recipe.model(params)
    table_ID = model.all_items()
    return table_ID if model.mixture is None else item_part(model.mixture, table_ID)


def best_of_mixture(
    recipe: Recipe,
    candidates: int | None,
    scored: OfMixture,
    user_UX: Float[Array, "U X"],
    hidden_US: Int[Array, "U S"],
    allowed_I: Bool[Array, " I1"] | None,
    *,
    k: int,
) -> tuple[Int[Array, "U {k}"], Float[Array, "U {k}"]]:
    mixture = recipe.model(scored.params).mixture
    assert mixture is not None
    users = Answering.of(mixture, user_UX)
    if candidates is not None:
        candidates = max(candidates, k)  # k is that of a bucket
    return mol_scores.best(
        users, scored.items, hidden_US, k=k, corpus_I=allowed_I, candidates=candidates
    )


def best(
    normalize: bool,
    table: ItemTable,
    user_UD: Float[Array, "U D"],
    hidden_US: Int[Array, "U S"],
    allowed_I: Bool[Array, " I1"] | None,
    *,
    k: int,
) -> tuple[Int[Array, "U {k}"], Float[Array, "U {k}"]]:
    return best_items(user_UD, table, hidden_US, k=k, l2_normalize=normalize, corpus_I=allowed_I)
