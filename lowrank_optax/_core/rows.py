"""Work on stored rows, ``(m, size)`` a piece, in place: write, rewrite, orthonormalise."""

from collections.abc import Callable
from functools import partial

import jax.core
import jax.numpy as jnp
from jax import lax

from lowrank_optax._core import linalg
from lowrank_optax._core.devices import Place, free_axes
from lowrank_optax._core.layout import Layout, cast_like, combine, contract
from lowrank_optax._core.loops import for_range, now_and_then
from lowrank_optax._core.types import Columns


def write(rows: Columns, layout: Layout, slots: jax.Array, columns: Columns) -> Columns:
    """Puts column ``j`` of ``k`` into row ``slots[:, j]`` of its group; a slot of ``m`` drops it.

    A column that is dropped puts back what was there, so that nothing depends on a predicate and
    `jax.vmap` of it copies nothing either. The rows are read before (``slots`` depends on the
    read), so that XLA writes in place.
    """

    def put(w: jax.Array, at: jax.Array, c: jax.Array) -> jax.Array:
        def one(j, w):
            row = jnp.minimum(at[j], w.shape[0] - 1)
            old = lax.dynamic_slice_in_dim(w, row, 1, 0)
            new = jnp.where(at[j] < w.shape[0], lax.dynamic_slice_in_dim(c, j, 1, 0), old)
            return lax.dynamic_update_slice_in_dim(w, new, row, 0)

        return one(0, w) if c.shape[0] == 1 else for_range(0, c.shape[0], one, w)

    return [
        put(w, at, c)
        for w, at, c in zip(rows, layout.to_pieces(slots), cast_like(columns, rows), strict=True)
    ]


def rewrite(
    rows: Columns,
    layout: Layout,
    when: jax.Array,
    height: int,
    make: Callable[..., jax.Array],
    *beside: Columns,
    cross: bool = False,
) -> tuple[Columns, jax.Array, jax.Array]:
    """Replaces the first ``height`` rows of the groups in ``when``, ``(n,)``, in place.

    ``make(leaf, at, block, *blocks)`` turns columns of a leaf's rows, ``(m, width)``, of indices
    ``at``, ``(width,)``, into the new ``(height, width)``; ``blocks`` are those columns of
    ``beside``. Besides the rows it returns the Gram matrix of the new ones, ``(n, height,
    height)``, and with ``cross`` (else empty) their products with the old, ``(n, height, m)``,
    measured on what is stored; both are 0 for the other groups. Every device treats its own columns
    and the products are summed at the end.
    """
    count = rows[0].shape[0] if rows else height
    zeros = lambda width: jnp.zeros((layout.n, height, width), layout.dtype)
    local = partial(_rewrite, layout=layout, height=height, make=make, cross=cross)

    def mine(places, rows, when, *beside):
        rows, *sums = local(rows, when, beside, places)
        return rows, *lax.psum(sums, free_axes(layout.mesh))

    def body(_, carry):
        if layout.mesh is None:
            return local(carry[0], when, beside, [Place(0, True)] * len(rows))
        return layout._locally(mine, (carry[0], when, *beside), (rows, None, None))

    # One loop around those of the leaves, which mostly does not run: in it the sums over devices
    # wait, and on a GPU the host, which decides whether a loop runs, waits for one answer a step.
    return now_and_then(jnp.any(when), body, (rows, zeros(height), zeros(count if cross else 0)))


def random_rows(layout: Layout, key: jax.Array, count: int) -> Columns:
    """Orthonormal rows of a random subspace, for at most as many as a vector has entries."""
    keys = jax.random.split(key, max(1, len(layout.sizes)))
    rows = [
        jax.random.normal(k, (count, size), layout.dtype).astype(t)
        for k, size, t in zip(keys, layout.sizes, layout.rows, strict=False)
    ]
    return orthonormal(layout, layout.split(rows))


def orthonormal(layout: Layout, rows: Columns) -> Columns:
    """Independent rows orthonormalised from the first on: CholeskyQR2, not in place.

    Cost: ``8 d r²`` flops, and a copy of the rows.
    """
    for _ in range(2):
        t = jax.vmap(linalg.cholesky_inverse)(layout.gram(rows))
        rows = cast_like(layout.combine(t, rows), rows)
    return rows


def cholesky_qr(
    rows: Columns, layout: Layout, gram: jax.Array, when: jax.Array
) -> tuple[Columns, jax.Array, jax.Array, jax.Array]:
    """Orthonormalises the rows of the groups in ``when``, whose Gram matrix is given.

    Shifted CholeskyQR3: two rounds ``W <- L^{-1} W`` with ``W W^T = L L^T``, in place; the third
    factor stays small. A shift of the order of rounding keeps the first rounds from failing.
    Returns ``W``, its Gram matrix, ``T`` with orthonormal ``T W``, and ``T`` for the rows as they
    were given. Zero rows stay zero.

    Cost: ``8 d r²`` flops.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", SIAM J. Sci. Comput. 2020.
    """
    r = gram.shape[-1]
    total = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)

    def turn(each: list[jax.Array], leaf: int, at: jax.Array, block: jax.Array) -> jax.Array:
        return combine(each[leaf], block, layout.dtype)

    for shift in (10.0, 1.0):
        t = jax.vmap(partial(linalg.cholesky_inverse, shift=shift))(gram)
        rows, gram, _ = rewrite(rows, layout, when, r, partial(turn, layout.to_pieces(t)))
        total = t @ total
    t = jax.vmap(linalg.cholesky_inverse)(gram)
    return rows, gram, t, t @ total


def _rewrite(rows, when, beside, places, *, layout: Layout, height, make, cross):
    """`rewrite` on one device."""
    count = rows[0].shape[0] if rows else height
    done, grams, crosses = [], [], []
    along = zip(*beside, strict=True) if beside else [()] * len(rows)
    for leaf, (w, go, blocks, place) in enumerate(
        zip(rows, layout.to_pieces(when), along, places, strict=True)
    ):
        w, *sums = _rewrite_leaf(
            (w, *blocks), go, height, partial(make, leaf), cross, layout, place
        )
        done.append(w)
        grams.append(sums[0])
        crosses.append(sums[-1])
    gram = layout.gather(grams, (height, height))
    empty = jnp.zeros((layout.n, height, 0), layout.dtype)
    return done, gram, layout.gather(crosses, (height, count)) if cross else empty


def _rewrite_leaf(arrays, go, height, make, cross, layout: Layout, place: "Place"):
    """`_rewrite` for one leaf: a loop over blocks of columns with a trip count of zero or all."""
    w, *beside = arrays
    count, size = w.shape
    dtype = layout.dtype
    sums = [jnp.zeros((height, height), dtype)]
    sums += [jnp.zeros((height, count), dtype)] if cross else []
    if size == 0:
        return w, *sums
    width = min(size, layout.block(count))

    def body(j, carry):
        w, *sums = carry
        start = jnp.minimum(j * width, size - width)
        block, *blocks = (lax.dynamic_slice_in_dim(x, start, width, 1) for x in (w, *beside))
        at = start + jnp.arange(width)
        new = make(place.part * size + at, block, *blocks).astype(w.dtype)
        # The last block overlaps the one before; in a batch of runs a loop may run for others.
        mine = (at >= j * width) & go
        counted = jnp.where(mine & place.first, new, 0)
        sums = [a + contract(counted, b, dtype) for a, b in zip(sums, (new, block), strict=False)]
        # What is written depends on all that was read before, or XLA copies the rows.
        fine = jnp.all(jnp.isfinite(sums[-1]))
        new = jnp.where(mine & fine, new, block[:height])
        return lax.dynamic_update_slice(w, new, (jnp.zeros_like(start), start)), *sums

    return now_and_then(jnp.where(go, -(-size // width), 0), body, (w, *sums))
