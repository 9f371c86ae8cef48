"""The engine: an optimizer that runs in the eigenbasis of the curvature.

One step is ``project -> inner -> unproject -> complement``: the curvature's correction updates the
basis, the inner state moves with it by ``C = Q_new^T Q_old``, the inner parts turn ``Q^T g`` into
``u``, and the update is ``Q u`` plus whatever is to become of ``g - Q Q^T g``.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _linalg
from lowrank_optax._tree import Layout, repeat, stack
from lowrank_optax._types import (
    Context,
    Correction,
    Inner,
    Law,
    Vector,
    check,
    check_count,
    check_least,
)
from lowrank_optax.basis import Basis
from lowrank_optax.curvature import Curvature, Evidence
from lowrank_optax.inner import as_inner


class Events(NamedTuple):
    """Steps that were dropped, by reason, ``(n,)`` each: everything but these counters stayed.

    Attributes:
      nonfinite: the gradient or its square was not finite.
      zero: the gradient was zero.
      eigh: the small eigenproblem gave something that is not finite.
      inner: the inner parts did.
    """

    nonfinite: jax.Array
    zero: jax.Array
    eigh: jax.Array
    inner: jax.Array


class Metrics(NamedTuple):
    """What the last step saw, ``(n,)`` each, all from small arrays.

    Attributes:
      captured: ``‖Q^T g‖² / ‖g‖²``, the share of the gradient inside the basis.
      drift: ``1 - ‖C‖_F² / r_live``, the share of the old basis outside the new one.
      cosine: between the gradient and the update inside the basis.
    """

    captured: jax.Array
    drift: jax.Array
    cosine: jax.Array


class ScaleByLREState(NamedTuple):
    """State of `scale_by_lre`, for ``n`` groups.

    Attributes:
      count: calls of ``update``, dropped steps included.
      steps: ``(n,)`` steps taken.
      since: ``(n,)`` steps since the basis was last updated.
      curvature: the curvature's state.
      basis: the basis's state; its rows are arrays ``(m, leaf.size)``.
      inner: the inner parts' state, with a leading axis of groups.
      complement: the complement's state, ``()`` unless it is an optax transformation.
      key: of the randomness still to come.
      events: `Events`.
      metrics: `Metrics`.
    """

    count: jax.Array
    steps: jax.Array
    since: jax.Array
    curvature: Any
    basis: Any
    inner: Any
    complement: Any
    key: jax.Array
    events: Events
    metrics: Metrics


Complement = float | jax.Array | optax.GradientTransformation


def scale_by_lre(
    curvature: Curvature,
    basis: Basis,
    inner: Inner | Sequence[Inner],
    *,
    update_every: int | Callable[[jax.Array], jax.Array] = 1,
    warmup_steps: int = 0,
    symmetrize: bool = True,
    complement: Complement | None = None,
    groups: Callable[[Any], Hashable] | None = None,
    dtype: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` in the low-rank eigenbasis ``Q diag(lam) Q^T`` of a curvature.

    .. math:: \Delta = Q\,\mathrm{inner}(Q^T g;\ \lambda) + \mathrm{complement}(g - Q Q^T g)

    Like every ``scale_by_...`` of optax it returns a direction of ascent; `optax.scale_by_learning_
    rate` turns it round. A step whose gradient is zero or not finite, whose small eigenproblem
    fails, or whose inner parts give something that is not finite returns zeros, leaves everything
    as it was, and is counted in ``state.events``, group by group.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> whiten = lro.scale_by_lre(
      ...     lro.curvature.Covariance(), lro.basis.GGT(20), lro.inner.LInvSqrt())
      >>> tx = optax.chain(whiten, optax.adam(1e-1))
      >>> loss = lambda x: jnp.sum(x**2 * jnp.array([1., 100.]))
      >>> x = jnp.array([1., 1.]); state = tx.init(x)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jax.grad(loss)(x), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(loss(x) < 1e-2)
      True

    Args:
      curvature: what is measured, from `lowrank_optax.curvature`.
      basis: how it is kept, from `lowrank_optax.basis`.
      inner: what runs inside, from `lowrank_optax.inner`: one part or a sequence of them.
      update_every: steps between two updates of the basis, or a schedule of the number of steps
        taken. The first step always updates.
      warmup_steps: first steps that build the basis and return zeros.
      symmetrize: a correction ``y z^T`` enters as ``((y+z)/2)((y+z)/2)^T``, one column, as the
        original does; otherwise as the exact ``(y z^T + z y^T)/2``, two columns.
      complement: what becomes of ``g - Q Q^T g``: dropped (``None``), scaled by a number, or
        passed through an optax transformation.
      groups: a function of a leaf's path to a label; leaves that share a label share a basis.
        `lowrank_optax.per_leaf` makes one for each leaf; by default there is one for everything.
        Groups are independent: the result is that of as many separate optimizers.
      dtype: of the stored rows; by default the leaf's. The gradient is rounded to it. The small
        algebra is float32 at least.
      seed: of the randomness of curvatures and bases.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see the curvature for the arguments it needs.

    Raises:
      ValueError: for arguments out of range, for leaves that are not floating point, and for
        gradients whose shapes are not those of ``init``.

    Cost: two passes over the rows a step (``4 m d`` flops, ``m d`` numbers of state), plus the
    small algebra of basis and inner parts.

    Source: the original LRE; for the products see `lowrank_optax.alias`.
    """
    check(isinstance(curvature, Curvature), f"scale_by_lre: curvature is {curvature!r}; pass a part "
          "from lowrank_optax.curvature, such as Covariance().")
    check(isinstance(basis, Basis), f"scale_by_lre: basis is {basis!r}; pass a part from "
          "lowrank_optax.basis, such as GGT(rank=100).")
    inner = as_inner(inner)
    if not callable(update_every):
        check_count("scale_by_lre", "update_every", update_every)
    check_count("scale_by_lre", "warmup_steps", warmup_steps, 0)
    check(groups is None or callable(groups), f"scale_by_lre: groups is {groups!r}; pass a function "
          "of a leaf's path, such as lowrank_optax.per_leaf.")
    check(dtype is None or jnp.issubdtype(dtype, jnp.floating),
          f"scale_by_lre: dtype is {dtype!r}; pass a floating-point dtype such as jnp.bfloat16.")
    if isinstance(complement, int | float):
        check_least("scale_by_lre", "complement", complement)
    elif isinstance(complement, optax.GradientTransformation):
        complement = optax.with_extra_args_support(complement)
    fixed = update_every if isinstance(update_every, int) else None

    def init(params: Any) -> ScaleByLREState:
        layout = Layout.of(params, groups, dtype)
        n, rank = layout.n, basis.coordinates(layout)
        start = inner.init(rank, layout.dtype)
        outside = isinstance(complement, optax.GradientTransformation)
        ints = lambda: jnp.zeros(n, jnp.int32)
        floats = lambda: jnp.zeros(n, layout.dtype)
        return ScaleByLREState(
            count=jnp.zeros((), jnp.int32),
            steps=ints(),
            since=ints(),
            curvature=curvature.init(layout, min(fixed or rank, rank)),
            basis=basis.init(layout),
            inner=jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (n, *x.shape))), start),
            complement=complement.init(params) if outside else (),
            key=jax.random.key_data(jax.random.key(seed)),
            events=Events(ints(), ints(), ints(), ints()),
            metrics=Metrics(floats(), floats(), floats()))

    def update(grads: Any, state: ScaleByLREState, params: Any = None, **extra: Any):
        layout = Layout.of(grads, groups, dtype)
        count = optax.safe_increment(state.count)
        if not layout.names:
            return grads, state._replace(count=count)
        basis.check_state(layout, state.basis)
        g = layout.flatten(grads)
        square = layout.inner(g, g)
        accept = jnp.isfinite(square) & (square > 0)
        period = update_every(state.steps) if callable(update_every) else update_every
        due = accept & ((state.since + 1 >= period) | (state.steps == 0))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), count)
        evidence = Evidence(g, due, params, extra, key)
        observed = curvature.observe(layout, state.curvature, g, accept)

        def refresh(old, curved):
            correction, curved = curvature.correct(layout, curved, evidence)
            columns, weights = _columns(layout, correction, g, symmetrize)
            done = basis.absorb(layout, old, columns, weights, due, correction.signed)
            return done, curved, done.u[..., 0] if correction.columns is None else None

        if fixed == 1:
            done, curved, u0 = refresh(state.basis, observed)
            based, c, failed = done.state, done.c, done.failed
        else:
            def body(_, carry):
                done, curved, _ = refresh(*carry[:2])
                return done.state, curved, done.c, done.failed
            based, curved, c, failed = repeat(
                jnp.any(due), body, (state.basis, observed, _eyes(layout, basis), ~accept & accept))
            u0 = None
        if u0 is None:
            u0 = basis.project(layout, based, g)

        accept, moved = accept & ~failed, due & ~failed
        u0 = jnp.where(accept[:, None], u0, 0)
        u, inside, fine = jax.vmap(partial(_step_inside, inner))(
            u0, state.inner, c, Context(u0, basis.eigenbasis(based), moved),
            accept, state.steps >= warmup_steps)
        taken = accept & fine
        active = taken & (state.steps >= warmup_steps)
        updates, apart = _outside(complement, layout, basis, based, g, u, u0, active,
                                  state.complement, params, extra)
        shared = jnp.sum(u * u0, axis=1)
        metrics = Metrics(
            captured=_linalg.safe_divide(jnp.sum(u0**2, axis=1), square),
            drift=jnp.where(moved, 1 - _linalg.safe_divide(
                jnp.sum(c**2, axis=(1, 2)), jnp.sum(basis.eigenbasis(state.basis).live, axis=1)), 0),
            cosine=_linalg.safe_divide(shared, jnp.linalg.norm(u, axis=1) * jnp.sqrt(square)))
        add = optax.safe_increment
        tally = lambda counter, hit: jnp.where(hit, add(counter), counter)
        zero = square == 0
        old = state.events
        return layout.unflatten(updates), ScaleByLREState(
            count=count,
            steps=tally(state.steps, taken),
            since=jnp.where(moved, 0, tally(state.since, taken)),
            curvature=curved,
            basis=based,
            inner=inside,
            complement=apart,
            key=state.key,
            events=Events(
                nonfinite=tally(old.nonfinite, ~jnp.isfinite(square)),
                zero=tally(old.zero, zero),
                eigh=tally(old.eigh, failed),
                inner=tally(old.inner, accept & ~fine)),
            metrics=jax.tree.map(lambda new, old: jnp.where(taken, new, old), metrics,
                                 state.metrics))

    return optax.GradientTransformationExtraArgs(init, update)


def _columns(layout: Layout, correction: Correction, g: Vector, symmetrize: bool):
    """A correction as columns with signed weights ``(n, k)``."""
    left, right, weights = correction.columns, correction.right, correction.weights
    if left is None:
        left = stack(g)
    if weights is None:
        weights = jnp.ones((layout.n, left[0].shape[0]), layout.dtype)
    if right is not None:
        plus = [(y + z) / 2 for y, z in zip(left, right, strict=True)]
        if symmetrize:
            return plus, weights
        # (y z^T + z y^T)/2 = p p^T - q q^T with p = (y+z)/2 and q = (y-z)/2
        minus = [(y - z) / 2 for y, z in zip(left, right, strict=True)]
        left = [jnp.concatenate(pair) for pair in zip(plus, minus, strict=True)]
        weights = jnp.concatenate([weights, -weights], axis=1)
    return left, weights


def _step_inside(inner: Inner, u0, state, c, context: Context, accept, active):
    """One group: the inner state moved, the inner parts run, both kept where they are finite."""
    is_law = lambda x: isinstance(x, Law)
    moved = jax.tree.map(partial(_move, c, context.moved), inner.laws, state, is_leaf=is_law)
    u, new = inner.update(u0, moved, context)
    fine = _linalg.finite(u, *(x for x in jax.tree.leaves(new)
                               if jnp.issubdtype(x.dtype, jnp.inexact)))
    keep = accept & active & fine
    new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, moved)
    return jnp.where(keep, u, 0), new, fine


def _move(c: jax.Array, moved: jax.Array, law: Law, state: Any) -> Any:
    """A state carried to the new basis if there is one."""
    if law.axes == 0:
        return state
    carry = partial(_linalg.transport, law, c)
    new = carry(state) if law.centred else jax.tree.map(carry, state)
    return jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, state)


def _outside(complement, layout, basis, based, g, u, u0, active, state, params, extra):
    """``Q u`` plus what becomes of ``g - Q Q^T g``; a scale costs no pass of its own."""
    if complement is None:
        return basis.unproject(layout, based, u), state
    on = layout.spread(active)
    g = [jnp.where(a, x.astype(layout.dtype), 0) for a, x in zip(on, g, strict=True)]
    u0 = jnp.where(active[:, None], u0, 0)
    if not isinstance(complement, optax.GradientTransformation):
        part = basis.unproject(layout, based, u - complement * u0)
        return [p + complement * x for p, x in zip(part, g, strict=True)], state
    both = basis.unproject(layout, based, jnp.stack([u, u0], axis=1))
    apart = [x - b[1] for x, b in zip(g, both, strict=True)]
    apart, new = complement.update(layout.unflatten(apart), state, params, **extra)
    updates = [b[0] + jnp.where(a, jnp.reshape(x, -1), 0)
               for a, b, x in zip(on, both, layout.leaves(apart), strict=True)]
    return updates, jax.tree.map(lambda a, b: jnp.where(jnp.any(active), a, b), new, state)


def _eyes(layout: Layout, basis: Basis) -> jax.Array:
    """The identity as a change of basis in every group."""
    rank = basis.coordinates(layout)
    return jnp.broadcast_to(jnp.eye(rank, dtype=layout.dtype), (layout.n, rank, rank))
