"""Batches of vectors, from which those that are not finite are left out."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Columns
from lowrank_optax.online.purposes import Stream


def clean(
    layout: Layout, columns: Columns, on: jax.Array | None = None
) -> tuple[Stream, jax.Array]:
    """A stream whose vectors are set to zero where not finite or not ``on``; which ones remain."""
    fine = jnp.stack([jnp.all(jnp.isfinite(c), axis=1) for c in columns]).all(axis=0)
    fine = fine if on is None else fine & on
    columns = [jnp.where(fine[:, None], c, 0) for c in columns]
    return Stream(columns, equal(fine, layout.dtype)), fine


def equal(some: jax.Array, dtype: Any) -> jax.Array:
    """Equal weights with sum one for those that are true."""
    return some.astype(dtype) / jnp.maximum(1, jnp.sum(some))
