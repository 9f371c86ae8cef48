"""Dense float64 pictures of what the engine keeps low-rank, and the references they must match."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class Given(lro.curvature.Curvature):
    """The correction is what the extra arguments ``columns, right, weights`` say."""

    signed: bool = False

    def correct(self, layout, state, evidence):
        given = evidence.extra
        weights = jnp.broadcast_to(given["weights"], (layout.n, *given["weights"].shape))
        joined = lambda leaves: leaves and layout.join(leaves, leaves[0].shape[:1], layout.rows)
        columns, right = joined(given["columns"]), joined(given.get("right"))
        return lro.Correction(columns, right, weights, self.signed), state


def split(flat, sizes):
    """A list with one array a leaf, from an array whose last axis is the vector, by pieces."""
    layout = lro.Layout.of(
        [jax.ShapeDtypeStruct((n,), jnp.float32) for n in sizes], None, small=True
    )
    ends = np.cumsum(layout.sizes)[:-1]
    return layout.part([jnp.asarray(x) for x in np.split(np.asarray(flat), ends, axis=-1)])


def join(leaves):
    """Arrays of parts of a vector side by side, in float64."""
    return np.concatenate([np.asarray(x, np.float64) for x in leaves], axis=-1)


def vectors(basis_state, group=0):
    """``Q^T`` as the state has it, ``(..., r, d)``; leading axes are kept."""
    t = np.asarray(basis_state.t, np.float64)[..., group, :, :]
    if not hasattr(basis_state, "rows"):
        return t
    return t @ join(jax.tree.leaves(basis_state.rows))


def spectrum(basis_state, group=0):
    return np.asarray(basis_state.lam, np.float64)[..., group, :]


def matrix(basis_state):
    """``Q diag(lam) Q^T``, ``(..., d, d)``."""
    q = vectors(basis_state)
    return np.swapaxes(q, -1, -2) @ (spectrum(basis_state)[..., None] * q)


def after_each(tx, grads, **extra):
    """Updates and states after every step, stacked along the first axis; ``grads`` likewise."""
    start = tx.init(jax.tree.map(lambda g: g[0], grads))

    @jax.jit
    def run(state, grads, extra):
        def step(state, now):
            updates, state = tx.update(now[0], state, **now[1])
            return state, (updates, state)

        return jax.lax.scan(step, state, (grads, extra))[1]

    return run(start, grads, extra)


def absorbed(basis, columns, weights, *, sizes=None, right=None, signed=False, **options):
    """The basis's state after every correction, stacked; ``columns`` are ``(steps, k, d)``."""
    sizes = sizes or (columns.shape[-1],)
    given = {"columns": split(columns, sizes), "weights": jnp.asarray(weights, columns.dtype)}
    if right is not None:
        given["right"] = split(right, sizes)
    grads = split(np.ones((len(columns), columns.shape[-1]), columns.dtype), sizes)
    tx = lro.scale_by_lre(Given(signed), basis, lro.inner.NanToZero(), **options)
    return after_each(tx, grads, **given)[1].basis


# References -------------------------------------------------------------------------------------


def leading(b, rank=None, eig_tol=0.0):
    """``b`` without its eigenvalues beyond ``rank`` by size and below ``eig_tol * max``."""
    lam, q = np.linalg.eigh(b)
    order = np.argsort(-np.abs(lam))[:rank]
    lam, q = lam[order], q[:, order]
    lam = np.where(np.abs(lam) > eig_tol * np.abs(lam[0]), lam, 0)
    return (q * lam) @ q.T


def outer(columns, weights):
    """``sum_j w_j y_j y_j^T`` for columns ``(k, d)``."""
    return (columns.T * weights) @ columns


def window(columns, weights, rank, beta=None):
    """GGT's curvature after every correction, from the definition."""
    result, past = [], []
    for many, ws in zip(columns, weights, strict=True):
        past = (past + [(y, w) for y, w in zip(many, ws, strict=True) if w])[-rank:]
        ages = np.arange(len(past))[::-1]
        share = np.ones(len(past)) if beta is None else beta**ages / max(np.sum(beta**ages), 1e-300)
        terms = [s * w * np.outer(y, y) for (y, w), s in zip(past, share, strict=True)]
        result.append(sum(terms, np.zeros((columns.shape[-1],) * 2)))
    return np.stack(result)


def recursion(columns, weights, rank, beta, eig_tol, buffer=None):
    """Eigen's ``B`` after every correction: averaged (or summed), then truncated.

    More columns than ``buffer`` come in chunks; the average decays with the first.
    """
    b, result = np.zeros((columns.shape[-1],) * 2), []
    decay, gain = (1, 1) if beta is None else (beta, 1 - beta)
    for i, (many, ws) in enumerate(zip(columns, weights, strict=True)):
        for start in range(0, len(ws), buffer or len(ws)):
            if ws.any():  # with every column switched off there is no correction
                chunk = slice(start, start + (buffer or len(ws)))
                old = b if start else decay * b
                b = leading(old + gain * outer(many[chunk], ws[chunk]), rank, eig_tol if i else 0)
        result.append(b)
    return np.stack(result)
