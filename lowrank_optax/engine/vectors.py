"""The engine: an optimizer that runs in the eigenbasis of the curvature.

One step is ``project -> inner -> unproject -> complement``: the curvature's correction updates the
basis, the inner state moves with it by ``C = Q_new^T Q_old``, the inner parts turn ``Q^T g`` into
``u``, and the update is ``Q u`` plus whatever is to become of ``g - Q Q^T g``.
"""

import dataclasses
import numbers
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check, check_count, check_least
from lowrank_optax._core.derivatives import undifferentiated
from lowrank_optax._core.devices import Step, init_on_devices, step_on_devices
from lowrank_optax._core.entry import check_one_replica, own_arguments
from lowrank_optax._core.layout import Layout, stack
from lowrank_optax._core.loops import now_and_then
from lowrank_optax._core.precision import callers_precision, full_precision
from lowrank_optax._core.states import advance_where_taken, check_fits, check_kind
from lowrank_optax._core.types import (
    NEEDS,
    Columns,
    Context,
    Correction,
    Inner,
    Law,
    Outside,
    SymmetricCorrection,
    Vector,
)
from lowrank_optax.basis import Basis
from lowrank_optax.curvature import Curvature, Evidence, Observation
from lowrank_optax.inner import LPower, as_inner

OWNER = "scale_by_lre"


class Events(NamedTuple):
    """Steps that were dropped, by reason, ``(n,)`` each.

    The update was zero; basis and inner state stayed as they were, to the bit.

    Attributes:
      nonfinite: the gradient or its square was not finite.
      zero: the gradient was zero.
      eigh: the small eigenproblem gave something that is not finite.
      inner: the inner parts did. The gradient was sound, so here the basis did learn from it, and
        the inner state moved with the basis but took no step.
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
      since: ``(n,)`` steps since the basis was last updated, and failures to update it.
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


Complement = float | jax.Array | LPower | optax.GradientTransformation


def scale_by_lre(
    curvature: Curvature,
    basis: Basis,
    inner: Inner | Sequence[Inner],
    *,
    update_every: int | Callable[[jax.Array], jax.Array] = 1,
    warmup_steps: int = 0,
    symmetrize: bool = False,
    complement: Complement | None = None,
    groups: Callable[[Any], Hashable] | None = None,
    dtype: Any = None,
    axis_name: str | Sequence[str] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` in the low-rank eigenbasis ``Q diag(lam) Q^T`` of a curvature.

    .. math:: \Delta = Q\,\mathrm{inner}(Q^T g;\ \lambda) + \mathrm{complement}(g - Q Q^T g)

    Like every ``scale_by_...`` of optax it returns a direction of ascent; `optax.scale_by_learning_
    rate` turns it round. A step whose gradient is zero or not finite, or whose small eigenproblem
    fails, returns zeros, leaves basis and inner state as they were, and is counted in
    ``state.events``, group by group.

    Donate the state, and the parameters where nothing else reads them, so that the rows are updated
    where they lie: ``jax.jit(step, donate_argnums=(0, 1))`` for ``step(params, state, batch)``. No
    two leaves of a state share a buffer. What was donated is gone: keep the state that comes back.

    Products of float32 numbers are float32 on GPUs and TPUs, too, whatever
    ``jax.default_matmul_precision`` says, since a basis is as orthogonal as its Gram matrix is
    exact; rows in bfloat16 (``dtype``) are read as such, with sums in float32. Functions that are
    passed in, and an optax complement, keep the precision that was set outside.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> whiten = lro.scale_by_lre(
      ...     lro.curvature.Covariance(), lro.basis.GGT(20), lro.inner.LInvSqrt())
      >>> tx = optax.chain(whiten, optax.adam(1e-1))
      >>> loss = lambda x: jnp.sum(x**2 * jnp.array([1., 100.]))
      >>> x = jnp.array([1., 1.]); state = tx.init(x)
      >>> for _ in range(100):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(x), state, x)
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
        original has it; that depends on the units of ``y`` and ``z``, and on average it is
        ``(I + H)²/4`` for ``y = H z``. By default it enters as the exact ``(y z^T + z y^T)/2``, two
        columns, in any units the same.
      complement: what becomes of ``g - Q Q^T g``: dropped (``None``), scaled by a number, passed
        through an optax transformation, or multiplied by a power (``lro.inner.LInv()``) of the
        curvature outside the basis: what quasi-Newton curvatures assume there, what Hessians and
        `FrequentDirections` measure, or the largest eigenvalue that a basis may have dropped.
      groups: a function of a leaf's path to a label; leaves that share a label share a basis.
        `lowrank_optax.per_leaf` makes one for each leaf; by default there is one for everything.
        Groups are independent: the result is that of as many separate optimizers.
      dtype: of the stored rows; by default the leaf's. The gradient is rounded to it. The small
        algebra is float32 at least.
      axis_name: the axes of `jax.pmap` or `jax.shard_map` over which the devices have parts of a
        batch. Functions such as ``value_fn`` then give the loss of a device's own part: products
        are averaged over the axes and per-example gradients gathered, so that replicas stay alike.
        ``()`` says that every device is to go its own way.
      seed: of the randomness of curvatures and bases.

    Returns:
      An `optax.GradientTransformationExtraArgs`; see the curvature for the arguments it needs.

    Raises:
      ValueError: for arguments out of range, for leaves that are not floating point, and for
        gradients whose shapes are not those of ``init``.

    Cost: two passes over the rows a step (``4 m d`` flops, ``m d`` numbers of state), plus the
    small algebra of basis and inner parts.

    Several devices: the mesh is that of the gradients, whose axes may be automatic or explicit.
    Rows are split along their last axis over all axes of the mesh that divide ``leaf.size``
    together, whatever the parameter's own sharding; small algebra is done on every device. Of
    ``N`` devices each receives ``2 d / N`` numbers a step, the gradient as flat vectors and the
    update as it was, and sums of ``m``; a leaf sharded along its first axis alone is flat already.
    A leaf that no axis divides is on all devices: pad such vocabularies. The state is placed by
    `lowrank_optax.shardings`; updates are sharded like the parameters where these are passed. In
    `jax.shard_map`, pass the mean gradient. Layers of a scanned model are ``jax.vmap`` of ``init``
    and ``update`` over their axis; with `GGT` it copies no rows.

    Source: the original LRE; for the products see `lowrank_optax.recipes`.
    """
    engine = vector_engine(
        curvature,
        basis,
        inner,
        update_every=update_every,
        warmup_steps=warmup_steps,
        symmetrize=symmetrize,
        complement=complement,
        groups=groups,
        dtype=dtype,
        axis_name=axis_name,
        seed=seed,
    )
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def vector_engine(
    curvature: Any,
    basis: Any,
    inner: Any,
    *,
    update_every: Any = 1,
    warmup_steps: Any = 0,
    symmetrize=True,
    complement=None,
    groups=None,
    dtype=None,
    axis_name=None,
    seed=0,
) -> "VectorEngine":
    """The engine of `scale_by_lre`, its arguments checked."""
    check(
        isinstance(curvature, Curvature),
        f"scale_by_lre: curvature is {curvature!r}; pass a part "
        "from lowrank_optax.curvature, such as Covariance().",
    )
    check(
        isinstance(basis, Basis),
        f"scale_by_lre: basis is {basis!r}; pass a part from "
        "lowrank_optax.basis, such as GGT(rank=100).",
    )
    rule = as_inner(inner)
    if not callable(update_every):
        check_count("scale_by_lre", "update_every", update_every)
    check_count("scale_by_lre", "warmup_steps", warmup_steps, 0)
    check(
        groups is None or callable(groups),
        f"scale_by_lre: groups is {groups!r}; pass a function "
        "of a leaf's path, such as lowrank_optax.per_leaf.",
    )
    check(
        dtype is None or jnp.issubdtype(dtype, jnp.floating),
        f"scale_by_lre: dtype is {dtype!r}; pass a floating-point dtype such as jnp.bfloat16.",
    )
    if isinstance(complement, int | float):
        check_least("scale_by_lre", "complement", complement)
    kinds = (int, float, jax.Array, np.ndarray, np.generic, LPower, optax.GradientTransformation)
    check(
        complement is None or isinstance(complement, kinds),
        f"scale_by_lre: complement is {complement!r}; pass a number, an optax transformation, or a "
        "power such as lowrank_optax.inner.LInv().",
    )
    told = isinstance(complement, optax.GradientTransformationExtraArgs)
    if isinstance(complement, optax.GradientTransformation):
        complement = optax.with_extra_args_support(complement)
        complement = complement._replace(update=callers_precision(complement.update))
    _check_product(curvature, basis, rule, complement)
    return VectorEngine(
        curvature,
        basis,
        rule,
        update_every,
        warmup_steps,
        symmetrize,
        complement,
        groups,
        dtype,
        axis_name,
        seed,
        told,
    )


class _Refreshed(NamedTuple):
    """What an update of the basis leaves behind; of a group that was not due, its old state."""

    basis: Any
    curvature: Any
    c: jax.Array
    failed: jax.Array
    columns: jax.Array
    weights: jax.Array
    probe: jax.Array | None
    product: jax.Array | None
    outside: Outside | None


@dataclasses.dataclass(frozen=True, eq=False)
class VectorEngine:
    """The parts of one optimizer, and the step they make together."""

    curvature: Curvature
    basis: Basis
    inner: Inner
    update_every: Any
    warmup_steps: Any
    symmetrize: bool
    complement: Any
    groups: Any
    dtype: Any
    axis_name: Any
    seed: Any
    told: bool

    @property
    def every_step(self) -> bool:
        """Whether it is known before tracing that each step updates the basis."""
        return isinstance(self.update_every, numbers.Integral) and self.update_every == 1

    @full_precision
    def init(self, params: Any) -> ScaleByLREState:
        return init_on_devices(self._init, params)

    def _init(self, params: Any) -> ScaleByLREState:
        layout = Layout.of(params, self.groups, self.dtype)
        n, rank = layout.n, self.basis.coordinates(layout)
        period = self.update_every if isinstance(self.update_every, numbers.Integral) else rank
        inner = self.inner.init(rank, layout.dtype)
        key, first = jax.random.split(jax.random.key(self.seed))
        rest = (
            self.complement if isinstance(self.complement, optax.GradientTransformation) else None
        )
        ints = lambda: jnp.zeros(n, jnp.int32)
        floats = lambda: jnp.zeros(n, layout.dtype)
        return ScaleByLREState(
            count=jnp.zeros((), jnp.int32),
            steps=ints(),
            since=ints(),
            curvature=self.curvature.init(layout, max(1, min(int(period), rank))),
            basis=self.basis.init(layout, first),
            inner=jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (n, *x.shape))), inner),
            complement=rest.init(params) if rest else (),
            key=jax.random.key_data(key),
            events=Events(ints(), ints(), ints(), ints()),
            metrics=Metrics(floats(), floats(), floats()),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any):
        return self.step(updates, state, params, extra)[:2]

    @full_precision
    def step(self, updates: Any, state: Any, params: Any, extra: dict[str, Any]):
        """Updates, state, and which leaves were dropped for something that is not finite."""
        updates = undifferentiated(OWNER, updates)
        params, extra = own_arguments(OWNER, updates, params, extra)
        check_kind(OWNER, state, ScaleByLREState)
        layout = self.layout(updates, state, params)
        if not layout.names:
            return updates, state._replace(count=linalg.tally(state.count)), []
        # The complement's state is the user's own.
        check_fits(OWNER, state, self.init, (layout.example,), self._known, but="complement")
        read = self.curvature.functions
        if not self.told and read is not None:  # what nobody reads keeps no step from compiling
            extra = {name: x for name, x in extra.items() if name in read or not callable(x)}
        if self.axis_name is None:
            check_one_replica(OWNER, extra)
        return step_on_devices(self._step, updates, state, params, extra)

    @cached_property
    def _step(self) -> Step:
        return Step(self._update)

    @cached_property
    def _known(self) -> set[Any]:
        return set()

    def layout(self, updates: Any, state: ScaleByLREState, params: Any) -> Layout:
        """The layout that ``init`` saw: that of the parameters or, without them, of their rows."""
        layout = Layout.of(updates if params is None else params, self.groups, self.dtype)
        if params is None:
            rows = getattr(state.basis, "rows", ()) if self.dtype is None else ()
            layout = layout.kept_in(state.metrics.captured.dtype, rows)
        return layout.on(updates)

    def _update(self, updates: Any, state: Any, params: Any, arrays: Any, **functions: Any):
        extra = arrays | functions
        layout = self.layout(updates, state, params)
        count = linalg.tally(state.count)
        g = layout.flatten(updates)
        square = layout.inner(g, g)
        accept = jnp.isfinite(square) & (square > 0)
        due = accept & self._due(state)
        observed = self.curvature.observe(
            layout, state.curvature, Observation(g, accept, params, extra)
        )

        # The basis absorbs the correction and projects the gradient.
        new, u0 = self._refreshed(layout, state, observed, g, due, params, extra)
        followed, length = self.curvature.gradient(layout, new.curvature, g), square
        if followed is not g:
            length = layout.inner(followed, followed)
        if u0 is None or followed is not g:
            u0, g = self.basis.project(layout, new.basis, followed), followed
        accept, moved = accept & ~new.failed, due & ~new.failed
        u0 = jnp.where(accept[:, None], u0, 0)

        # The inner state moves to the new basis and the inner parts run there.
        warm = state.steps >= self.warmup_steps
        context = Context(
            u0,
            self.basis.eigenbasis(new.basis),
            moved,
            new.columns,
            new.weights,
            new.probe,
            new.product,
            new.outside,
        )
        inside = jax.vmap(partial(carry, self.inner))(new.c, moved, state.inner)
        u, inside, fine = jax.vmap(partial(step_inside, self.inner))(
            u0, inside, context, accept & warm
        )
        taken = accept & fine
        # After a failed update the next step tries again; should that fail too, a step that was
        # collected before is to blame.
        since = linalg.tally(state.since, taken | new.failed)
        again = new.failed & (since > self._period(state))

        # Back to the parameters, with what becomes of the part of the gradient outside the basis.
        step, rest = self._unproject(
            layout, new, state.complement, g, u, u0, taken & warm, params, extra
        )
        metrics = _measure(u, u0, length, new.c, moved, self.basis.eigenbasis(state.basis).live)
        failures = Events(~jnp.isfinite(square), square == 0, new.failed, accept & ~fine)
        new_state = ScaleByLREState(
            count=count,
            steps=linalg.tally(state.steps, taken, linalg.DRAWS),
            since=jnp.where(moved, 0, since),
            curvature=self.curvature.undo(
                layout, new.failed, again, new.curvature, state.curvature
            ),
            basis=new.basis,
            inner=inside,
            complement=rest,
            key=state.key,
            events=jax.tree.map(linalg.tally, state.events, failures),
            metrics=jax.tree.map(partial(jnp.where, taken), metrics, state.metrics),
        )
        dropped = failures.nonfinite | failures.eigh | failures.inner
        return layout.unflatten(step, updates), new_state, layout.to_leaves(dropped)

    def _due(self, state: ScaleByLREState) -> jax.Array:
        """The groups whose basis this step updates, ``(n,)``."""
        return (state.since + 1 >= self._period(state)) | (state.steps == 0)

    def _period(self, state: ScaleByLREState) -> Any:
        """Steps between two updates of the basis, as they are now."""
        every = self.update_every
        return every(state.steps) if callable(every) else every

    def _refreshed(self, layout, state, observed, g, due, params, extra):
        """The basis after this step's update, if any; the gradient in it where that is known."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), jnp.max(state.steps))

        def refresh(basis, curvature):
            return self._refresh(layout, basis, curvature, g, due, params, extra, key)

        if self.every_step:
            return refresh(state.basis, observed)
        shapes = jax.eval_shape(lambda: refresh(state.basis, observed)[0])
        still = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(basis=None, curvature=None)
        )
        eyes = jnp.broadcast_to(jnp.eye(still.c.shape[-1], dtype=still.c.dtype), still.c.shape)
        still = still._replace(basis=state.basis, curvature=observed, c=eyes)
        return now_and_then(
            jnp.any(due), lambda _, x: refresh(x.basis, x.curvature)[0], still
        ), None

    def _refresh(self, layout, old, curvature, g, due, params, extra, key):
        """One update of the basis; also the gradient in it where that is known without a pass."""
        basis = self.basis

        def apply(v: Vector, gamma: jax.Array) -> Vector:
            u = basis.project(layout, old, v)
            rest = basis.unproject(layout, old, (basis.measured(old) - gamma[:, None]) * u)
            return [
                a + c * x.astype(layout.dtype)
                for a, c, x in zip(rest, layout.to_leaves(gamma), v, strict=True)
            ]

        def project(v: Vector) -> Vector:
            return basis.unproject(layout, old, basis.project(layout, old, v))

        measure, turn = jax.random.split(key)
        probed = "probe" in _needs(self.inner)
        probed = probed or (self.curvature.learns and bool(_outside(self.complement)))
        evidence = Evidence(g, due, params, extra, measure, apply, project, probed, self.axis_name)
        correction, curvature = self.curvature.correct(layout, curvature, evidence)
        known = _symmetric(layout, correction, g, self.symmetrize, params)
        weights = known.weights
        # A correction without weight, such as a skipped quasi-Newton pair, leaves the basis alone.
        done = basis.absorb(layout, old, known, due & jnp.any(weights != 0, axis=1), turn)
        probe = product = outside = None
        if correction.probe is not None and probed:
            probe, product, outside = self._measured(layout, done.state, correction)
            curvature = self.curvature.learn(layout, curvature, due & ~done.failed, outside)
        new = _Refreshed(
            done.state,
            curvature,
            done.c,
            done.failed,
            done.u,
            weights[:, -done.u.shape[-1] :],
            probe,
            product,
            outside,
        )
        # Of a column that is switched off a basis need not know the coordinates.
        plain = correction.columns is None and correction.weights is None
        return new, done.u[..., 0] if plain else None

    def _outside(self, new: _Refreshed) -> jax.Array:
        """The curvature outside the basis, ``(n,)``: what is assumed there, or a bound."""
        if "outside" in self.curvature.provides:
            return self.curvature.outside(new.curvature)
        return self.basis.outside(new.basis)

    def _measured(self, layout, basis, correction):
        """The correction's probe and product in the basis, and what they show outside it."""
        z, hz = correction.probe
        pair = [jnp.stack([a, b.astype(a.dtype)]) for a, b in zip(z, hz, strict=True)]
        both = self.basis.project(layout, basis, pair)
        probe, product = both[..., 0], both[..., 1]
        if not correction.independent:
            return probe, product, Outside(*jnp.zeros((3, layout.n), layout.dtype))
        whole = layout.gram(pair)
        apart = whole - jnp.einsum("nrk,nrl->nkl", both, both)
        # Below that the difference is rounding: the basis spans the probe.
        floor = 1e3 * jnp.finfo(layout.dtype).eps
        some = (apart[:, 0, 0] > floor * whole[:, 0, 0]) & (apart[:, 1, 1] > floor * whole[:, 1, 1])
        seen = Outside(apart[:, 0, 0], apart[:, 0, 1], apart[:, 1, 1])
        return probe, product, Outside(*(jnp.where(some, x, 0) for x in seen))

    def _unproject(self, layout, new, state, g, u, u0, active, params, extra):
        """``Q u`` plus what becomes of ``g - Q Q^T g``; a scale costs no pass of its own."""
        complement, unproject = self.complement, partial(self.basis.unproject, layout, new.basis)
        if complement is None:
            return unproject(u), state
        on = layout.to_leaves(active)
        g = [jnp.where(a, x.astype(layout.dtype), 0) for a, x in zip(on, g, strict=True)]
        u0 = jnp.where(active[:, None], u0, 0)
        if not isinstance(complement, optax.GradientTransformation):
            if isinstance(complement, LPower):
                gamma = self._outside(new)
                some = gamma != 0
                complement = jnp.where(some, jnp.where(some, gamma, 1) ** complement.p, 0)
            scale = jnp.broadcast_to(jnp.asarray(complement, layout.dtype), active.shape)
            part = unproject(u - scale[:, None] * u0)
            return [
                p + s * x for p, s, x in zip(part, layout.to_leaves(scale), g, strict=True)
            ], state
        both = unproject(jnp.stack([u, u0], axis=1))
        apart = [x - b[1] for x, b in zip(g, both, strict=True)]
        apart, rest = complement.update(layout.unflatten(apart), state, params, **extra)
        step = [
            b[0] + jnp.where(a, jnp.reshape(x, -1), 0)
            for a, b, x in zip(on, both, layout.leaves(apart), strict=True)
        ]
        return step, advance_where_taken(complement, layout, on, rest, state)


def _check_product(curvature: Curvature, basis: Basis, inner: Inner, complement: Any) -> None:
    """Refuses combinations in which a part's needs are met by no other."""
    outside = _outside(complement)
    offers = curvature.provides | basis.provides
    if complement is not None:
        offers = offers | {"complement"}
    for owner, needs in (
        (inner, _needs(inner)),
        (curvature, curvature.needs),
        (basis, basis.needs),
        (complement, outside),
    ):
        for name in sorted(needs - offers):
            raise ValueError(
                f"scale_by_lre: {owner} needs {NEEDS[name]}. It was combined with "
                f"{curvature} and {basis}."
            )


def _outside(complement: Any) -> frozenset[str]:
    """What a complement needs."""
    return frozenset({"outside"} if isinstance(complement, LPower) else ())


def _needs(inner: Inner) -> frozenset[str]:
    return getattr(inner, "needs", frozenset())


def _symmetric(
    layout: Layout, correction: Correction, g: Vector, symmetrize: bool, params: Any
) -> SymmetricCorrection:
    """A correction in its symmetric form, as columns with weights ``(n, k)``."""
    columns, right, weights = correction.columns, correction.right, correction.weights
    signed = correction.signed
    if columns is None:
        columns = stack(g)
    if weights is None:
        weights = jnp.ones((layout.n, columns[0].shape[0]), layout.dtype)
    if right is not None:
        if not symmetrize:
            # The same matrix with columns of one length: what is far shorter would be rounded.
            columns, right = _balanced(layout, columns, right)
        plus = [(y + z) / 2 for y, z in zip(columns, right, strict=True)]
        minus = [(y - z) / 2 for y, z in zip(columns, right, strict=True)]
        columns = plus
        if not symmetrize:
            # (y z^T + z y^T)/2 = p p^T - q q^T with p = (y+z)/2 and q = (y-z)/2
            columns = [jnp.concatenate(pair) for pair in zip(plus, minus, strict=True)]
            weights, signed = jnp.concatenate([weights, -weights], axis=1), True
    return SymmetricCorrection(columns, weights, signed, correction.initial, params)


def _balanced(layout: Layout, left: Columns, right: Columns) -> tuple[Columns, Columns]:
    """Columns ``c y`` and ``z / c`` with ``c² = ‖z‖/‖y‖``, which have one length."""
    size = lambda columns: jnp.stack(
        [
            jnp.sqrt(layout.inner(one, one))
            for one in ([x[i] for x in columns] for i in range(columns[0].shape[0]))
        ],
        axis=1,
    )
    ratio = linalg.safe_divide(size(right), size(left))
    c = jnp.sqrt(jnp.where(ratio > 0, ratio, 1))
    grow = lambda by, columns: [
        (f[:, None] * x.astype(layout.dtype)).astype(x.dtype)
        for f, x in zip(layout.to_leaves(by), columns, strict=True)
    ]
    return grow(c, left), grow(1 / c, right)


def carry(inner: Inner, c: Any, moved: jax.Array, state: Any) -> Any:
    """One group's inner state in the new basis, if there is one; ``c`` as in `transport`."""
    is_law = lambda x: isinstance(x, Law)
    return jax.tree.map(partial(_move, c, moved), inner.laws, state, is_leaf=is_law)


def step_inside(inner: Inner, u0: jax.Array, state: Any, context: Context, active: jax.Array):
    """One group: the inner parts run, and what they give is kept where it is finite.

    What they give for dead slots is nobody's: it may be 0/0, and must not cost the others the step.
    Returns ``u``, the state, and whether both were finite.
    """
    u, new = inner.update(u0, state, context)
    u = jnp.where(context.basis.live, u, 0)
    fine = linalg.finite(
        u, *(x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.inexact))
    )
    keep = active & fine
    new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
    return jnp.where(keep, u, 0), new, fine


def _move(c: Any, moved: jax.Array, law: Law, state: Any) -> Any:
    """A state carried to the new basis if there is one."""
    if law.axes == 0:
        return state
    to = partial(linalg.transport, law, c)
    new = to(state) if law.centred or law.surrounded else jax.tree.map(to, state)
    return jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, state)


def _measure(u, u0, square, c, moved, live) -> Metrics:
    """`Metrics` of a step."""
    shared = jnp.sum(u * u0, axis=1)
    stayed = linalg.safe_divide(jnp.sum(c**2 * live[:, None], axis=(1, 2)), jnp.sum(live, axis=1))
    return Metrics(
        captured=linalg.safe_divide(jnp.sum(u0**2, axis=1), square),
        drift=jnp.where(moved, 1 - stayed, 0),
        cosine=linalg.safe_divide(shared, jnp.linalg.norm(u, axis=1) * jnp.sqrt(square)),
    )
