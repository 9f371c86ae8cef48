"""All matrices of one shape as one stack: how it is read from leaves and written back."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._core.devices import split_over_devices
from lowrank_optax._core.layout import Layout, per_leaf
from lowrank_optax.engine.axes import MatrixAxes
from lowrank_optax.engine.space import Space

share_out = partial(split_over_devices, axes=(0, -1))
"""Arrays of ``n`` groups dealt out to the devices, or split along their last axis."""


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices(Space):
    """``n`` groups of ``m`` matrices ``(a, b)``, ``a <= b``; a group has one basis a side.

    Leaves with batch axes are groups one after another: the first has the first matrix of each of
    its leaves, the second the second.

    Attributes:
      parts: what the step of a matrix is made of.
      members: the places in the tree of the leaves that share bases.
      axes: how each of these is seen, ``a`` first.
      shapes: their shapes.
      many: how many groups the members make: the matrices in each leaf.
      columns: layout of the shorter side, a group for each of ours.
      rows: layout of the longer side.
      mesh: the mesh of the leaves.
    """

    parts: Any
    members: list[list[int]]
    axes: list[list[MatrixAxes]]
    shapes: list[list[tuple[int, ...]]]
    many: list[int]
    columns: Layout
    rows: Layout
    mesh: Any

    @classmethod
    def of(cls, parts: Any, layout: Layout, views: Any, members: Any, owner: str):
        """The leaves ``members``, matrices of one shape; of several dtypes the widest is theirs."""
        dtype = jnp.result_type(*(layout.dtypes[i] for each in members for i in each))
        shapes = [[layout.shapes[i] for i in each] for each in members]
        axes = [[views[i].wide(layout.shapes[i]) for i in each] for each in members]
        first = zip((each[0] for each in axes), (each[0] for each in shapes), strict=True)
        sizes = [one.sizes(shape) for one, shape in first]
        many = [size[0] for size in sizes]
        columns, rows = (
            Layout.of(
                [jax.ShapeDtypeStruct((size,), dtype)] * sum(many), per_leaf, parts.dtype, owner
            )
            for size in sizes[0][1:]
        )
        return cls(parts, members, axes, shapes, many, columns, rows, layout.mesh)

    @property
    def n(self) -> int:
        return sum(self.many)

    @property
    def dtype(self) -> Any:
        return self.columns.dtype

    @property
    def places(self) -> list[int]:
        """The places of all leaves in the tree."""
        return [i for each in self.members for i in each]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(n, m, a, b)``."""
        return self.n, len(self.members[0]), self.columns.sizes[0], self.rows.sizes[0]

    # Reading and writing ------------------------------------------------------------------------

    def read(self, leaves: list[jax.Array]) -> jax.Array:
        """``(n, m, a, b)``."""
        groups: dict[int, list[jax.Array]] = {}
        for _, (first, _), i, axes, _ in self._each_leaf():
            groups.setdefault(first, []).append(axes.matrices(leaves[i]))
        g = jnp.concatenate([jnp.stack(each, axis=1) for each in groups.values()])
        return share_out(g.astype(self.dtype), self.mesh)

    def write(self, step: jax.Array) -> dict[int, jax.Array]:
        # Taken from their devices all at once: one by one they would go to every device.
        step = split_over_devices(step, self.mesh, (2, 3))
        return {
            i: jnp.reshape(axes.leaf(step[first : first + many, j], shape), -1)
            for many, (first, j), i, axes, shape in self._each_leaf()
        }

    def at(self, values: jax.Array) -> dict[int, jax.Array]:
        return {
            i: values[first] if many == 1 else axes.spread(values[first : first + many], shape)
            for many, (first, _), i, axes, shape in self._each_leaf()
        }

    def _each_leaf(self) -> Iterator[tuple[int, tuple[int, int], int, MatrixAxes, Any]]:
        """Of every leaf its matrices' number, first group and place there; itself, axes, shape."""
        first = 0
        for many, *group in zip(self.many, self.members, self.axes, self.shapes, strict=True):
            for j, (i, axes, shape) in enumerate(zip(*group, strict=True)):
                yield many, (first, j), i, axes, shape
            first += many

    def each(self, values: jax.Array) -> jax.Array:
        return values[:, None, None, None]

    def square(self, g: jax.Array) -> jax.Array:
        return jnp.sum(g**2, axis=(1, 2, 3))
