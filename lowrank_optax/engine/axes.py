"""Which axes of a leaf are the rows of a matrix, which its columns, and which a batch of them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.checks import check

OWNER = "MatrixAxes"


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """How a leaf is seen as matrices: every axis is a row, a column or a batch axis.

    The axes of one kind are flattened in the order in which they are named. A leaf of shape ``s``
    becomes ``B`` matrices ``(R, C)`` with ``B = prod s[batch]``, ``R = prod s[rows]``, ``C = prod
    s[columns]``; those of a batch are independent of one another.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> query = lro.MatrixAxes(rows=(1,), columns=(2, 3), batch=(0,))  # (layers, d, heads, k)
      >>> query.sizes((12, 64, 4, 16))                                   # batch, rows, columns
      (12, 64, 64)
      >>> query.matrices(jnp.zeros((12, 64, 4, 16))).shape
      (12, 64, 64)

    Args:
      rows: numbers of the axes that become the rows, one at least.
      columns: numbers of the axes that become the columns, one at least.
      batch: numbers of the axes of which every place has a matrix of its own, such as the layers of
        a scan or experts; none by default.

    Raises:
      ValueError: for axes that are not numbers from 0 on, or named twice, and a matrix without rows
        or columns.

    Cost: none; `matrices` and `leaf` move the leaf once where its axes are not in this order.

    Source: elementary.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("rows", "columns", "batch"):
            axes = getattr(self, name)
            whole = isinstance(axes, tuple) and all(type(i) is int and i >= 0 for i in axes)
            check(
                whole and (axes or name == "batch"),
                f"{OWNER}: {name} is {axes!r}; pass a tuple of axis numbers from 0 on, such as "
                "MatrixAxes(rows=(1,), columns=(2,), batch=(0,)).",
            )
        order = self.batch + self.rows + self.columns
        twice = sorted({i for i in order if order.count(i) > 1})
        check(not twice, f"{OWNER}: axes {twice} are named twice in {self}; name every axis once.")

    @property
    def turned(self) -> "MatrixAxes":
        """The same matrices transposed."""
        return dataclasses.replace(self, rows=self.columns, columns=self.rows)

    def covers(self, shape: Sequence[int]) -> bool:
        """Whether these are all axes of a shape."""
        return sorted(self.batch + self.rows + self.columns) == list(range(len(shape)))

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The number of matrices, of rows and of columns that a leaf of this shape is seen as."""
        batch, rows, columns = (
            math.prod(shape[i] for i in axes) for axes in (self.batch, self.rows, self.columns)
        )
        return batch, rows, columns

    def matrices(self, x: jax.Array) -> jax.Array:
        """A leaf as ``(B, R, C)``."""
        return jnp.reshape(jnp.transpose(x, self._order), self.sizes(x.shape))

    def leaf(self, matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Matrices ``(B, R, C)`` as a leaf of this shape: the inverse of `matrices`."""
        order = self._order
        back = tuple(order.index(i) for i in range(len(order)))
        return jnp.transpose(jnp.reshape(matrices, [shape[i] for i in order]), back)

    def spread(self, values: jax.Array, shape: Sequence[int]) -> jax.Array:
        """One number a matrix, ``(B,)``, as an array that multiplies the leaf."""
        ones = [size if i in self.batch else 1 for i, size in enumerate(shape)]
        return self.leaf(values, ones)

    def wide(self, shape: Sequence[int]) -> "MatrixAxes":
        """The same, transposed where there are more rows than columns."""
        _, rows, columns = self.sizes(shape)
        return self.turned if rows > columns else self

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch + self.rows + self.columns


def as_axes(owner: str, given: Any, name: str, shape: tuple[int, ...]) -> MatrixAxes | None:
    """What a view returned for a leaf, checked."""
    if given is None:
        return None
    place = f"{owner}: view gives {given!r} for the leaf {name or 'of the tree'} of shape {shape}"
    check(
        isinstance(given, MatrixAxes),
        f"{place}; return axes, such as lowrank_optax.MatrixAxes(rows=(0,), columns=(1,)), or None "
        "to leave it to the optimizer of the rest.",
    )
    axes = tuple(range(len(shape)))
    check(given.covers(shape), f"{place}; name every one of its axes {axes} once.")
    check(math.prod(shape) > 0, f"{place}, which has no entries; return None.")
    return given
