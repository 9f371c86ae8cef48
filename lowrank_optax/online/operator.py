"""Operator: the symmetric low-rank ``G = A^T H A``, used through products alone."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count, check_least
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.types import Columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operator:
    r"""A symmetric operator of low rank, ``G = A^T H A``, over vectors or trees of arrays.

    ``A`` encodes, ``A^T`` decodes, and ``H`` holds the second moments ``E z z^T`` of the codes
    ``z = A v``. With ``S = A A^T``, ``Q^T = S^{-1/2} A`` has orthonormal rows and

    .. math:: G = Q N Q^T, \qquad N = S^{1/2} H S^{1/2}

    Powers and solves go through ``N``, and ``G`` is never formed. Every method takes one vector,
    shaped like the example, or ``k`` of them along a leading axis of every leaf.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> op = lro.online.Operator.of(jnp.eye(2, 3), jnp.diag(jnp.array([4., 16.])))
      >>> v = jnp.array([1., 1., 1.])
      >>> print(op.encode(v), op(v), op.power(v, -0.5))
      [1. 1.] [ 4. 16.  0.] [0.5  0.25 0.  ]

    Attributes:
      rows: the rows ``A``, an array ``(r, leaf.size)`` for every leaf of the example.
      h: the moments ``H``, ``(r, r)``, in squared units of the codes.
      gram: the Gram matrix ``S = A A^T``, ``(r, r)``.
      layout: the example's structure and shapes; static.

    Raises:
      ValueError: by every method, for vectors that are not shaped like the example.

    Cost: memory ``r d``; every product ``4 r d`` flops, with ``O(r³)`` for powers and solves.

    On several devices the rows of a `learner` are split along their last axis. With explicit axes,
    call the methods within `jax.sharding.auto_axes`.

    Source: elementary.
    """

    rows: Any
    h: jax.Array
    gram: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        # Which devices the rows are on is up to the rows, which may move.
        object.__setattr__(self, "layout", self.layout.on(()))

    @classmethod
    def of(cls, rows: Any, h: jax.Array, example: Any = None) -> "Operator":
        """The operator of given rows, whose leaves are ``(r, *shape)``, and ``(r, r)`` moments.

        Args:
          rows: the rows ``A``, a tree with leaves ``(r, *shape)``.
          h: the moments ``H``, ``(r, r)``, symmetric.
          example: a vector whose structure and dtypes are taken; by default the first row.

        Returns:
          The operator.

        Raises:
          ValueError: where rows, moments and example do not fit together.

        Cost: ``2 r² d`` flops, for ``S``.
        """
        first = jax.tree.map(lambda x: x[0], rows) if example is None else example
        layout = Layout.of(first, None, owner="Operator")
        columns, many = layout.columns(rows, "Operator")
        rank = columns[0].shape[0] if columns else 0
        check(
            many and jnp.shape(h) == (rank, rank),
            f"Operator: rows have rank {rank} and h has shape {jnp.shape(h)}; pass leaves "
            "(r, *shape) and (r, r) moments.",
        )
        h = jnp.asarray(h, layout.dtype)
        return cls(layout.tree(columns), h, layout.gram(columns)[0], layout)

    @property
    def rank(self) -> int:
        """The number ``r`` of codes."""
        return self.h.shape[-1]

    def encode(self, v: Any) -> jax.Array:
        """``z = A v``, ``(r,)``, or ``(k, r)`` for ``k`` vectors."""
        columns, many = self.layout.columns(v, "encode")
        z = self.codes(columns)
        return z if many else z[0]

    def decode(self, z: jax.Array) -> Any:
        """``A^T z``, shaped like the example; ``(k, r)`` codes give ``k`` vectors."""
        check(
            jnp.ndim(z) in (1, 2) and jnp.shape(z)[-1] == self.rank,
            f"decode: z has shape {jnp.shape(z)}; pass ({self.rank},) or (k, {self.rank}).",
        )
        many = jnp.ndim(z) == 2
        columns = self.columns(jnp.atleast_2d(z))
        return self.layout.vectors(columns) if many else self._one(columns)

    def __call__(self, v: Any) -> Any:
        """``G v``."""
        return self._through(v, self.h)

    apply = __call__

    def power(self, v: Any, p: float) -> Any:
        """``G^p v`` on the span of ``A``; zero outside it, for negative ``p``, too."""
        return self._through(v, self._whitened(partial(_power, power=p)))

    def solve(self, v: Any, damping: float) -> Any:
        """``(G + damping I)^{-1} v``; ``damping > 0``, in units of ``G``."""
        check_least("solve", "damping", damping, strict=True)

        def shrink(n: jax.Array) -> jax.Array:
            return jnp.linalg.solve(n + damping * jnp.eye(self.rank, dtype=n.dtype), n)

        columns, many = self.layout.columns(v, "solve")
        inside = self.columns(self.codes(columns) @ self._whitened(shrink))
        out = [(c - x.astype(c.dtype)) / damping for c, x in zip(columns, inside, strict=True)]
        return self.layout.vectors(out) if many else self._one(out)

    def project(self, v: Any) -> Any:
        """``Q Q^T v``, the part of ``v`` inside the span of ``A``."""
        return self._through(v, self._whitened(lambda n: jnp.eye(self.rank, dtype=n.dtype)))

    def residual(self, v: Any) -> Any:
        """``v - Q Q^T v``."""
        return jax.tree.map(jnp.subtract, v, self.project(v))

    def eigenvalues(self) -> jax.Array:
        """The ``r`` eigenvalues of ``G`` on the span of ``A``, descending; all others are zero."""
        return self.eigenbasis()[0]

    def eigenvectors(self) -> Any:
        """The eigenvectors of ``G`` as leaves ``(r, *shape)``, in the order of `eigenvalues`."""
        return self.layout.vectors(self.columns(self.eigenbasis()[1]))

    def eigenbasis(self) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues ``(r,)`` of ``G``, and ``T``, ``(r, r)``: its eigenvectors are ``T A``."""
        lam, v = linalg.eigh(self._normal())
        return lam, v @ _power(self.gram, -0.5)

    def codes(self, columns: Columns) -> jax.Array:
        """The codes ``(k, r)`` of columns."""
        return self.layout.dot(self.layout.leaves(self.rows), columns)[0].T

    def columns(self, z: jax.Array) -> Columns:
        """Columns ``A^T z`` of ``(k, r)`` codes."""
        return self.layout.combine(z[None], self.layout.leaves(self.rows))

    def _one(self, columns: Columns) -> Any:
        return self.layout.unflatten([c[0] for c in columns])

    def _through(self, v: Any, middle: jax.Array) -> Any:
        columns, many = self.layout.columns(v, "Operator")
        out = self.columns(self.codes(columns) @ middle)
        return self.layout.vectors(out) if many else self._one(out)

    def _normal(self) -> jax.Array:
        root = _power(self.gram, 0.5)
        return linalg.symmetrize(root @ self.h @ root)

    def _whitened(self, function) -> jax.Array:
        """``S^{-1/2} f(N) S^{-1/2}``."""
        back = _power(self.gram, -0.5)
        return back @ function(self._normal()) @ back


def merge(
    a: Operator, b: Operator, rank: int | None = None, weights: tuple[float, float] = (1.0, 1.0)
) -> Operator:
    r"""The best operator of a given rank for ``w_a G_a + w_b G_b``: it joins two sketches.

    The rows ``[√(w_a Λ_a) Q_a^T; √(w_b Λ_b) Q_b^T]`` are decomposed as one matrix through their
    Gram matrix, and the leading singular vectors are kept. The result is exact if the rank suffices
    for both.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> one = lro.online.Operator.of(jnp.eye(1, 3), jnp.array([[4.]]))
      >>> two = lro.online.Operator.of(jnp.eye(2, 3), jnp.diag(jnp.array([1., 9.])))
      >>> print(lro.online.merge(one, two).eigenvalues().round(3))
      [9. 5.]

    Args:
      a: an operator with positive semidefinite ``H``.
      b: another operator over the same vectors.
      rank: rank of the result, at least 1; by default the larger of the two ranks.
      weights: weights ``w_a`` and ``w_b``, at least 0, default 1 and 1. Where moments are averages,
        pass the numbers of vectors seen.

    Returns:
      An operator with orthonormal rows and diagonal moments.

    Raises:
      ValueError: for operators over vectors of different shapes, or a rank beyond both together.

    Cost: ``2 (r_a + r_b)² d + 2 (r_a + r_b) r d`` flops.

    Source: Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006;
    Iwen and Ong, "A distributed and incremental SVD algorithm", SIAM J. Matrix Anal. Appl. 2016.
    """
    check(
        a.layout.shapes == b.layout.shapes and a.layout.treedef == b.layout.treedef,
        f"merge: operators over vectors of shapes {a.layout.shapes} and {b.layout.shapes}; pass "
        "two over the same vectors.",
    )
    rank = max(a.rank, b.rank) if rank is None else rank
    check_count("merge", "rank", rank)
    check(
        rank <= a.rank + b.rank,
        f"merge: rank is {rank}; the operators hold {a.rank} + {b.rank} directions.",
    )
    rows, roots = [], []
    for op, weight in zip((a, b), weights, strict=True):
        check_least("merge", "weights", weight)
        rows.append(op.layout.leaves(op.rows))
        roots.append(weight**0.5 * _power(op.h, 0.5))
    layout = a.layout
    stacked = [jnp.concatenate(pair) for pair in zip(*rows, strict=True)]
    root = jax.scipy.linalg.block_diag(*roots)
    gram = layout.gram(stacked)[0]
    lam, v = linalg.eigh(linalg.symmetrize(root @ gram @ root))
    lam, live = linalg.regularize(lam[:rank], lam[:rank] > 0)
    scale = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, lam, 1)), 0)
    out = layout.combine(((scale[:, None] * v[:rank]) @ root)[None], stacked)
    return Operator(layout.tree(out), jnp.diag(lam), layout.gram(out)[0], layout)


def signed_pca(rank: int, *streams: tuple[float, Any]) -> Operator:
    r"""The leading eigenvectors of ``sum_i w_i E[u_i u_i^T]``: quadratic purposes in closed form.

    Among orthonormal rows ``A``, ``sum_i w_i E‖u_i - A^T A u_i‖²`` over several streams is least
    for the eigenvectors with the algebraically largest eigenvalues; weights may have either sign.
    If there are fewer vectors than entries, the vectors' Gram matrix gives the eigenvectors, and
    nothing of size ``d × d`` is formed.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> keep, avoid = jnp.array([[1., 1.]]), jnp.array([[1., 0.]])
      >>> op = lro.online.signed_pca(1, (1.0, keep), (-5.0, avoid))
      >>> print(jnp.abs(op.eigenvectors()).round(1))
      [[0.2 1. ]]

    Args:
      rank: number ``r`` of eigenvectors to keep, at least 1.
      *streams: pairs of a weight and a tree of vectors along a leading axis of every leaf.

    Returns:
      An operator with orthonormal rows and the eigenvalues as moments, in descending order.

    Raises:
      ValueError: without streams, or for streams of different shapes.

    Cost: ``2 n d min(n, d)`` flops for ``n`` vectors in all, and ``eigh`` of size ``min(n, d)``.
    """
    check_count("signed_pca", "rank", rank)
    check(streams, "signed_pca: no streams; pass pairs (weight, vectors).")
    sizes = [jnp.shape(x)[:1] for _, vectors in streams for x in jax.tree.leaves(vectors)]
    check((0,) not in sizes, "signed_pca: a stream holds no vectors; pass one at least, or none.")
    layout = Layout.of(jax.tree.map(lambda x: x[0], streams[0][1]), None, owner="signed_pca")
    parts = [layout.columns(vectors, "signed_pca")[0] for _, vectors in streams]
    stacked = [jnp.concatenate(columns) for columns in zip(*parts, strict=True)]
    weights = jnp.concatenate(
        [
            jnp.full(c[0].shape[0], w / c[0].shape[0])
            for (w, _), c in zip(streams, parts, strict=True)
        ]
    )
    most = min(weights.shape[0], sum(layout.sizes))
    check(
        rank <= most,
        f"signed_pca: rank is {rank}, but the vectors span {most} dimensions; pass at most that.",
    )
    few = _dual if weights.shape[0] < sum(layout.sizes) else _primal
    lam, out = few(layout, stacked, weights.astype(layout.dtype), rank)
    return Operator(layout.tree(out), jnp.diag(lam), layout.gram(out)[0], layout)


def _dual(
    layout: Layout, stacked: Columns, weights: jax.Array, rank: int
) -> tuple[jax.Array, Columns]:
    """Leading eigenpairs of ``X^T D X`` through ``X X^T``."""
    size, u = linalg.eigh(linalg.symmetrize(layout.gram(stacked)[0]))
    _, live = linalg.regularize(size, size > 0)
    root = jnp.sqrt(jnp.where(live, size, 0))
    # In the orthonormal coordinates Λ^{-1/2} U^T X the matrix is Λ^{1/2} U^T D U Λ^{1/2}.
    lam, v = linalg.eigh(
        linalg.symmetrize((root[:, None] * u * weights[None]) @ (u.T * root[None]))
    )
    order = jnp.argsort(-jnp.where(jnp.abs(v) @ live > 0.5, lam, -jnp.inf))[:rank]
    out = layout.combine(((v[order] * linalg.safe_divide(1.0, root)) @ u)[None], stacked)
    return lam[order], out


def _primal(
    layout: Layout, stacked: Columns, weights: jax.Array, rank: int
) -> tuple[jax.Array, Columns]:
    """Leading eigenpairs of ``X^T D X``, which is smaller than ``X X^T``."""
    x = jnp.concatenate([c.astype(layout.dtype) for c in stacked], axis=1)
    lam, v = linalg.eigh(linalg.symmetrize((x.T * weights[None]) @ x))
    splits = [int(i) for i in np.cumsum(layout.sizes)[:-1]]
    return lam[:rank], jnp.split(v[:rank], splits, axis=1)


def _power(a: jax.Array, power: float) -> jax.Array:
    return linalg.matrix_power(a, power, damping=0, rdamping=0)
