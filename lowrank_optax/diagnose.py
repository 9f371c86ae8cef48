"""Pure functions of a state: the spectrum and what becomes of the gradient in it.

They take any state that contains a `ScaleByLREState`, a chain's or a TrainState's `opt_state`
included, and `operator` takes an online operator; all run inside jit. ``n`` is the number of
groups, ``r`` of coordinates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Summary(NamedTuple):
    """The state of one step, all of it from small arrays.

    Attributes:
      spectrum: ``(n, r)`` eigenvalues as stored, in descending order, 0 in dead slots; averages are
        not corrected for their start, so that theirs begin small.
      effective_rank: ``(n,)``, `effective_rank` of the spectrum.
      captured_energy: ``(n,)``, ``‖Q^T g‖² / ‖g‖²`` of the last step.
      orthogonality_error: ``(n,)``, ``max|Q^T Q - I|`` as the stored Gram matrices have it.
      drift: ``(n,)``, the share of the old basis that left it in the last step.
      cosine: ``(n,)``, between the gradient and the update inside the basis.
      nonfinite: ``(n,)`` steps dropped for a gradient that was not finite.
      zero: ``(n,)`` for a zero gradient.
      eigh: ``(n,)`` for an eigenproblem that failed.
      inner: ``(n,)`` for inner parts that gave something that is not finite.
    """

    spectrum: jax.Array
    effective_rank: jax.Array
    captured_energy: jax.Array
    orthogonality_error: jax.Array
    drift: jax.Array
    cosine: jax.Array
    nonfinite: jax.Array
    zero: jax.Array
    eigh: jax.Array
    inner: jax.Array


def summary(state: Any) -> Summary:
    """Everything a training loop wants to log, at the cost of small algebra.

    Of bases on the sides of matrices see `matrices`.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.GGT(4)); state = tx.init(jnp.zeros(3))
      >>> _, state = tx.update(jnp.array([1., 2., 2.]), state)
      >>> s = lro.diagnose.summary(state)
      >>> print(s.spectrum.round(3), s.captured_energy.round(3))
      [[9. 0. 0. 0.]] [1.]

    Raises:
      ValueError: where no state of `scale_by_lre` is found.
    """
    state = find(state)
    lam = state.basis.lam
    return Summary(
        spectrum=lam,
        effective_rank=effective_rank(lam),
        captured_energy=state.metrics.captured,
        orthogonality_error=orthogonality_error(state),
        drift=state.metrics.drift,
        cosine=state.metrics.cosine,
        **state.events._asdict(),
    )


class MatricesSummary(NamedTuple):
    """The bases of the ``n`` matrices of one shape ``(a, b)``; a side without one has ``None``.

    Attributes:
      short: ``(n, r_S)`` eigenvalues of the shorter side as stored, in descending order.
      long: ``(n, r_L)``, those of the longer side.
      captured_energy: ``(n,)``, ``‖Q_S^T G Q_L‖² / ‖G‖²`` of the last step.
      dropped: ``(n,)`` steps that were not taken, for whatever reason.
    """

    short: jax.Array | None
    long: jax.Array | None
    captured_energy: jax.Array
    dropped: jax.Array


def matrices(state: Any) -> dict[str, MatricesSummary]:
    """What `scale_by_matrix_lre`, and with it `soap_muon`, keeps for every shape of matrix.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.soap_muon(1e-2); state = tx.init(jnp.zeros((2, 3)))
      >>> _, state = tx.update(jnp.diag(jnp.array([2.0, 1.0, 0.0]))[:2], state)
      >>> seen = lro.diagnose.matrices(state)["2x3"]
      >>> print((seen.short / seen.short[:, :1]).round(2), seen.captured_energy.round(2))
      [[1.   0.25]] [1.]

    Raises:
      ValueError: where no state of `scale_by_matrix_lre` is found.
    """
    is_engine = lambda x: hasattr(x, "matrices")
    for leaf in jax.tree.leaves(state, is_leaf=is_engine):
        if is_engine(leaf):
            return {name: _of_matrices(each) for name, each in leaf.matrices.items()}
    raise ValueError(
        f"diagnose: {type(state).__name__} holds no state of scale_by_matrix_lre; pass the "
        "state of lre or soap, or of a chain that contains one."
    )


def _of_matrices(state: Any) -> MatricesSummary:
    short, long = (getattr(side, "lam", None) for side in state.basis)
    dropped = jnp.sum(jnp.stack(state.events), axis=0)
    return MatricesSummary(short, long, state.metrics.captured, dropped)


class OperatorSummary(NamedTuple):
    """What an online operator holds, as a single group: `plot` draws a history of these as well.

    Attributes:
      spectrum: ``(1, r)`` eigenvalues of ``G = A^T H A``, in descending order.
      effective_rank: ``(1,)``, `effective_rank` of the spectrum.
      captured_energy: ``(1,)``, share of the vectors' squared norm inside the span of ``A``.
      orthogonality_error: ``(1,)``, ``max|A A^T - I|``: large for rows of free length.
    """

    spectrum: jax.Array
    effective_rank: jax.Array
    captured_energy: jax.Array
    orthogonality_error: jax.Array


def operator(op: Any, vectors: Any) -> OperatorSummary:
    """An `online.Operator`'s spectrum and what it captures of vectors.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> op = lro.online.Operator.of(jnp.eye(2, 3), jnp.diag(jnp.array([4., 1.])))
      >>> s = lro.diagnose.operator(op, jnp.array([1., 1., 2 ** 0.5]))
      >>> print(s.spectrum, s.captured_energy)
      [[4. 1.]] [0.5]

    Args:
      op: an operator.
      vectors: one vector, shaped like the operator's example, or several along a leading axis.

    Cost: two passes over the rows.
    """
    total = jnp.sum(jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(vectors)]))
    inside = jax.tree.leaves(op.project(vectors))
    energy = jnp.sum(jnp.stack([jnp.sum(jnp.square(x)) for x in inside]))
    lam = op.eigenvalues()
    error = jnp.max(jnp.abs(op.gram - jnp.eye(op.rank, dtype=op.gram.dtype)))
    captured = energy / jnp.where(total > 0, total, 1)
    return OperatorSummary(lam[None], effective_rank(lam)[None], captured[None], error[None])


def find(state: Any) -> Any:
    """The first `ScaleByLREState` inside any state.

    Raises:
      ValueError: where there is none.
    """
    is_engine = lambda x: hasattr(x, "basis") and hasattr(x, "metrics")
    for leaf in jax.tree.leaves(state, is_leaf=is_engine):
        if is_engine(leaf):
            return leaf
    raise ValueError(
        f"diagnose: {type(state).__name__} holds no state of scale_by_lre; pass the "
        "state of lre, of scale_by_lre, or of a chain that contains one."
    )


def effective_rank(lam: jax.Array) -> jax.Array:
    """``exp(H(p))`` of the spectrum as a distribution ``p = |lam| / sum|lam|``; 0 for no spectrum.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    size = jnp.abs(lam)
    total = jnp.sum(size, axis=-1, keepdims=True)
    p = size / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def orthogonality_error(state: Any) -> jax.Array:
    """``max|T K T^T - I|`` over live slots, ``(n,)``: from the small matrices, ``O(r m²)``.

    Bases that select coordinates are orthonormal by construction: 0.
    """
    basis = find(state).basis
    if not hasattr(basis, "t"):
        return jnp.zeros(basis.lam.shape[0], basis.lam.dtype)
    gram = basis.gram if hasattr(basis, "gram") else None
    t = basis.t
    product = (
        jnp.einsum("nrm,nsm->nrs", t, t)
        if gram is None
        else jnp.einsum("nrm,nml,nsl->nrs", t, gram, t)
    )
    eye = jax.vmap(jnp.diag)((basis.lam != 0).astype(product.dtype))
    return jnp.max(jnp.abs(product - eye), axis=(1, 2), initial=0.0)
