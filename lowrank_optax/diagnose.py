"""Functions that show what an optimizer keeps, what it did, and how much memory it needs.

They take any state that contains one of this library, including a chain's and a TrainState's
``opt_state``; `operator` takes an online operator, `memory` an optimizer before it has a state. All
that return arrays run inside jit. ``n`` is the number of groups of parameters, ``r`` the number of
coordinates, ``m`` the number of stored rows.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lowrank_optax._core.memory import Memory, memory
from lowrank_optax.engine.treatment import LeafView, LeafViews, treated
from lowrank_optax.engine.views import View, see

__all__ = [
    "LeafView",
    "LeafViews",
    "MatricesSummary",
    "Memory",
    "OperatorSummary",
    "Summary",
    "effective_rank",
    "find",
    "matrices",
    "memory",
    "operator",
    "orthogonality_error",
    "parts",
    "scalars",
    "summary",
    "views",
]


class Summary(NamedTuple):
    """What one step did, all of it from small arrays.

    Attributes:
      spectrum: eigenvalues as stored, ``(n, r)``, 0 in dead slots; every basis of this library has
        the largest first. Averages
        are not corrected for their start, so that early eigenvalues are too small.
      effective_rank: the `effective_rank` of the spectrum, ``(n,)``.
      captured_energy: the share ``‖Q^T g‖² / ‖g‖²`` of the last gradient, ``(n,)``.
      orthogonality_error: the error ``max|Q^T Q - I|`` by the stored Gram matrices, ``(n,)``.
      drift: the share of the old basis that left it in the last step, ``(n,)``.
      cosine: the cosine between the gradient and the update inside the basis, ``(n,)``.
      nonfinite: number of steps dropped for a gradient that was not finite, ``(n,)``.
      zero: number of steps dropped for a zero gradient, ``(n,)``.
      eigh: number of steps dropped for an eigenproblem that failed, ``(n,)``.
      inner: number of steps dropped because an inner part's update was not finite, ``(n,)``.
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


def parts(tx: Any) -> dict[str, Any]:
    """What an optimizer of this library is made of: parts and options that are not the defaults.

    Example:
      >>> import lowrank_optax as lro
      >>> made = lro.diagnose.parts(lro.ggt(0.1, rank=20))
      >>> made["curvature"], made["complement"]
      (Covariance(), 100.0)

    Args:
      tx: what `scale_by_lre`, `scale_by_matrix_lre` or a recipe made of them returned.

    Returns:
      The arguments of the engine by name: ``curvature``, ``basis`` and ``inner`` for vectors,
      ``short``, ``long`` and ``inner`` for matrices, and options such as ``complement``.

    Raises:
      ValueError: for a transformation that none of them returned.
    """
    owner = getattr(getattr(tx, "update", None), "__self__", None)
    engine: Any = getattr(owner, "engine", owner)
    if not dataclasses.is_dataclass(engine) or not hasattr(engine, "inner"):
        raise ValueError(
            f"diagnose: {tx!r} is no optimizer of this library; pass what scale_by_lre, "
            "scale_by_matrix_lre or a recipe such as lro.soap_muon(1e-2) returned, before "
            "optax.chain or any other wrapper."
        )
    fields = [field for field in dataclasses.fields(engine) if field.init]
    given = {field.name: getattr(engine, field.name) for field in fields}
    default = {field.name: field.default for field in fields}
    return {name: x for name, x in given.items() if x is not default[name]}


def summary(state: Any) -> Summary:
    """Everything that a training loop wants to log.

    `matrices` does the same for bases on the sides of matrices.

    Args:
      state: a state that contains a `ScaleByLREState`.

    Returns:
      A `Summary`.

    Raises:
      ValueError: where no state of `scale_by_lre` is found.

    Cost: that of `orthogonality_error`; no pass over the rows.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.GGT(4)); state = tx.init(jnp.zeros(3))
      >>> _, state = jax.jit(tx.update)(jnp.array([1., 2., 2.]), state)
      >>> s = lro.diagnose.summary(state)
      >>> print(s.spectrum.round(3), s.captured_energy.round(3))
      [[9. 0. 0. 0.]] [1.]
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
    """The bases of the ``n`` matrices of one shape ``(a, b)``; a side without a basis has ``None``.

    Attributes:
      short: eigenvalues of the shorter side as stored, ``(n, r_S)``, in descending order.
      long: eigenvalues of the longer side as stored, ``(n, r_L)``, in descending order.
      captured_energy: the share ``‖Q_S^T G Q_L‖² / ‖G‖²`` of the last gradient, ``(n,)``.
      dropped: number of steps that were not taken, for whatever reason, ``(n,)``.
    """

    short: jax.Array | None
    long: jax.Array | None
    captured_energy: jax.Array
    dropped: jax.Array


def matrices(state: Any) -> dict[str, MatricesSummary]:
    """What `scale_by_matrix_lre`, and with it `soap_muon`, keeps for every shape of matrix.

    Args:
      state: a state that contains one of `scale_by_matrix_lre`.

    Returns:
      A `MatricesSummary` for every shape, by its name such as ``"2x3"``.

    Raises:
      ValueError: where no state of `scale_by_matrix_lre` is found.

    Cost: reads small arrays that the state holds.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.soap_muon(1e-2); state = tx.init(jnp.zeros((2, 3)))
      >>> _, state = jax.jit(tx.update)(jnp.diag(jnp.array([2.0, 1.0, 0.0]))[:2], state)
      >>> seen = lro.diagnose.matrices(state)["2x3"]
      >>> print((seen.short / seen.short[:, :1]).round(2), seen.captured_energy.round(2))
      [[1.   0.25]] [1.]
    """
    found = next(_inside(state, lambda x: hasattr(x, "matrices")), None)
    if found is None:
        raise ValueError(
            f"diagnose: {type(state).__name__} holds no state of scale_by_matrix_lre; pass the "
            "state of soap_muon or soap, or of a chain that contains one."
        )
    return {name: _of_matrices(each) for name, each in found.matrices.items()}


def _of_matrices(state: Any) -> MatricesSummary:
    short, long = (getattr(side, "lam", None) for side in state.basis)
    dropped = jnp.sum(jnp.stack(state.events), axis=0)
    return MatricesSummary(short, long, state.metrics.captured, dropped)


def views(params: Any, view: View | None = None, *, tx: Any = None) -> LeafViews:
    """How the recipes for matrices see every leaf, and what goes to the optimizer of the rest.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> scan = {"kernel": jnp.zeros((12, 64, 256)), "bias": jnp.zeros((12, 256))}
      >>> lro.diagnose.views({"embedding": jnp.zeros((5000, 64)), "Scan_0": scan})
      leaf                  shape          seen as
      ['Scan_0']['bias']    (12, 256)      rest            bias or scale
      ['Scan_0']['kernel']  (12, 64, 256)  12 of 64 x 256  matrix
      ['embedding']         (5000, 64)     5000 x 64       embedding
      >>> tx = lro.scale_by_matrix_lre(None, lro.basis.FullMatrix(), lro.inner.Adam(), largest=1024)
      >>> print(lro.diagnose.views(jnp.zeros((5000, 64)), tx=tx))
      leaf      shape       seen as
      the tree  (5000, 64)  rest     matrix; 5000 > largest=1024

    Args:
      params: the parameters, or arrays' shapes such as `jax.ShapeDtypeStruct`.
      view: a view to look at instead of `default_matrix_view`.
      tx: what `scale_by_matrix_lre` or a recipe made of it returned, whose view and longest side
        (``largest``) are used; without it sides of any length have a basis.

    Returns:
      A `LeafViews`: the table, when printed, and a row for every leaf.

    Raises:
      ValueError: for a view and an optimizer at once, for an optimizer of another kind, and for a
        view that does not return axes of the leaf.

    Cost: none; only shapes are read.
    """
    made = {} if tx is None else parts(tx)
    if tx is not None and (view is not None or "basis" in made):  # which vectors have
        raise ValueError(
            f"diagnose.views: view is {view!r} and tx {tx!r}; pass one of them, and as tx an "
            "optimizer of matrices such as lro.soap_muon(1e-2)."
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths, shapes = [path for path, _ in leaves], [jnp.shape(x) for _, x in leaves]
    found = see("diagnose.views", paths, shapes, view or made.get("view"))
    return LeafViews(
        tuple(
            treated(jax.tree_util.keystr(path), shape, axes, why, made)
            for path, shape, (axes, why) in zip(paths, shapes, found, strict=True)
        )
    )


class OperatorSummary(NamedTuple):
    """What an online operator holds, as a single group, so that `plot` draws it as well.

    Attributes:
      spectrum: eigenvalues of ``G = A^T H A``, ``(1, r)``, in descending order.
      effective_rank: the `effective_rank` of the spectrum, ``(1,)``.
      captured_energy: the share of the vectors' squared norm inside the span of ``A``, ``(1,)``.
      orthogonality_error: the error ``max|A A^T - I|``, ``(1,)``; large for rows of free length.
    """

    spectrum: jax.Array
    effective_rank: jax.Array
    captured_energy: jax.Array
    orthogonality_error: jax.Array


def operator(op: Any, vectors: Any) -> OperatorSummary:
    """An `online.Operator`'s spectrum, and what it captures of vectors.

    Args:
      op: the operator, an `online.Operator`.
      vectors: one vector, shaped like the operator's example, or several along a leading axis.

    Returns:
      An `OperatorSummary`.

    Cost: two passes over the rows, and one ``eigh`` of ``r x r``.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> op = lro.online.Operator.of(jnp.eye(2, 3), jnp.diag(jnp.array([4., 1.])))
      >>> s = lro.diagnose.operator(op, jnp.array([1., 1., 2 ** 0.5]))
      >>> print(s.spectrum, s.captured_energy)
      [[4. 1.]] [0.5]
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

    Args:
      state: a state of an optax transformation, a pytree.

    Returns:
      The `ScaleByLREState`.

    Raises:
      ValueError: where there is none.

    Example:
      >>> import jax.numpy as jnp, optax, lowrank_optax as lro
      >>> state = optax.chain(optax.clip(1.0), lro.whiten()).init(jnp.zeros(3))
      >>> type(lro.diagnose.find(state)).__name__
      'ScaleByLREState'
    """
    is_engine = lambda x: hasattr(x, "complement") and hasattr(x, "basis")
    found = next(_inside(state, is_engine), None)
    if found is None:
        raise ValueError(
            f"diagnose: {type(state).__name__} holds no state of scale_by_lre; pass the state of "
            "lre, of scale_by_lre, or of a chain that contains one. For soap_muon and other "
            "recipes of matrices there is lro.diagnose.matrices."
        )
    return found


def _inside(state: Any, wanted: Any) -> Iterator[Any]:
    """The states inside a tree that are wanted, in its order."""
    leaves = jax.tree.leaves(state, is_leaf=wanted)
    return (leaf for leaf in leaves if wanted(leaf))


def effective_rank(lam: jax.Array) -> jax.Array:
    r"""The exponential of the entropy of the spectrum as a distribution; 0 for no spectrum.

    .. math:: e^{-\sum_i p_i \ln p_i}, \qquad p_i = |\lambda_i| / \sum_j |\lambda_j|

    Args:
      lam: eigenvalues, ``(..., r)``, in any unit.

    Returns:
      The rank, ``(...)``, from 1 to ``r``.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> print(lro.diagnose.effective_rank(jnp.array([3.0, 3.0, 0.0])).round())
      2.0
    """
    size = jnp.abs(lam)
    total = jnp.sum(size, axis=-1, keepdims=True)
    p = size / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def orthogonality_error(state: Any) -> jax.Array:
    """The error ``max|T K T^T - I|`` of a basis over its live slots, from the small matrices alone.

    Bases that select coordinates are orthonormal by construction and have the error 0.

    Args:
      state: a state that contains a `ScaleByLREState`.

    Returns:
      The errors, ``(n,)``.

    Raises:
      ValueError: where no state of `scale_by_lre` is found.

    Cost: ``2 r m²`` flops a group.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> state = lro.whiten().init(jnp.zeros(3))
      >>> print(lro.diagnose.orthogonality_error(state))  # no slot is live yet
      [0.]
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


def scalars(state: Any) -> dict[str, float]:
    """Figures of every state of this library inside a state, for TensorBoard, W&B or any logger.

    A figure of several groups or matrices has three entries, ``/mean``, ``/min`` and ``/max``;
    counts of dropped steps are sums. Not for use inside jit: numbers are read from the device.

    Args:
      state: the state of an optimizer, of a chain, or a TrainState, that holds states of
        `scale_by_lre`, `scale_by_matrix_lre`, `levenberg_marquardt` or `spring`.

    Returns:
      Numbers by names such as ``"lre/captured_energy"``, ``"matrices/64x256/dropped"`` or
      ``"levenberg_marquardt/damping"``; a second state of a kind is ``"lre_1/..."``.

    Raises:
      ValueError: where no state of this library is found, or inside jit.

    Cost: that of `orthogonality_error`, and one transfer of small arrays from the device.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.whitened_adam(1e-2, 4); state = tx.init(jnp.zeros(3))
      >>> _, state = tx.update(jnp.array([1.0, 2.0, 2.0]), state)
      >>> logged = lro.diagnose.scalars(state)
      >>> logged["lre/captured_energy"], logged["lre/dropped"]
      (1.0, 0.0)
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
        raise ValueError(
            "diagnose.scalars: the state is traced; call it outside of jit, or return "
            "diagnose.summary(state) from the compiled step."
        )
    out: dict[str, float] = {}
    for name, figures in _figures(state):
        for key, value in jax.device_get(figures).items():
            values = np.asarray(value, np.float64)
            if key == "dropped":
                out[f"{name}/dropped"] = float(values.sum())
            elif values.size == 1:
                out[f"{name}/{key}"] = float(values.reshape(()))
            elif values.size:
                for by in (np.mean, np.min, np.max):
                    out[f"{name}/{key}/{by.__name__}"] = float(by(values))
    if not out:
        raise ValueError(
            f"diagnose: {type(state).__name__} holds no state of this library; pass the state of "
            "one of its optimizers, or of a chain that contains one."
        )
    return out


def _figures(state: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arrays by name of every state of this library, each kind under a prefix of its own."""
    is_vectors = lambda x: hasattr(x, "complement") and hasattr(x, "basis")
    for i, each in enumerate(_inside(state, is_vectors)):
        seen = summary(each)._asdict()
        dropped = sum(seen.pop(reason) for reason in each.events._fields)
        lam = seen.pop("spectrum")
        seen |= {"largest_eigenvalue": lam.max(1), "dropped": dropped}
        yield ("lre" if i == 0 else f"lre_{i}"), seen
    for i, each in enumerate(_inside(state, lambda x: hasattr(x, "matrices"))):
        prefix = "matrices" if i == 0 else f"matrices_{i}"
        for shape, found in matrices(each).items():
            sides = {"short": found.short, "long": found.long}
            sides = {k: lam for k, lam in sides.items() if lam is not None}
            seen = {f"effective_rank_{k}": effective_rank(lam) for k, lam in sides.items()}
            seen |= {f"largest_eigenvalue_{k}": lam.max(1) for k, lam in sides.items()}
            figures = {"captured_energy": found.captured_energy, "dropped": found.dropped}
            yield f"{prefix}/{shape}", seen | figures
        yield f"{prefix}/rest", {"dropped": each.dropped}
    for i, each in enumerate(_inside(state, lambda x: hasattr(x, "refused"))):
        figures = {key: getattr(each, key) for key in ("loss", "damping", "relative")}
        figures |= {"refused": each.refused, "products": each.products, "dropped": each.nonfinite}
        yield "levenberg_marquardt" + (f"_{i}" if i else ""), figures
    for i, each in enumerate(_inside(state, lambda x: hasattr(x, "promise"))):
        figures = {key: getattr(each, key) for key in ("loss", "damping", "gain", "promise")}
        yield "spring" + (f"_{i}" if i else ""), figures | {"dropped": each.nonfinite}
