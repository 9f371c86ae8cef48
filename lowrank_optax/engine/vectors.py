"""Parameters as vectors: a group of leaves is one long vector with one basis."""

import dataclasses
import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check
from lowrank_optax._core.entry import check_one_replica
from lowrank_optax._core.layout import Layout, stack
from lowrank_optax._core.states import at_least_float32
from lowrank_optax._core.types import (
    NEEDS,
    Columns,
    Correction,
    Eigenbasis,
    Inner,
    Outside,
    SymmetricCorrection,
    Vector,
)
from lowrank_optax.basis import Basis
from lowrank_optax.curvature import Curvature, Evidence, Observation
from lowrank_optax.engine.space import (
    Events,
    Given,
    GroupState,
    LinearSpace,
    Metrics,
    Seen,
    Space,
    Turned,
    begin,
    carry,
    drift,
)
from lowrank_optax.engine.step import Engine
from lowrank_optax.inner import LPower

OWNER = "scale_by_lre"

Complement = float | jax.Array | LPower | optax.GradientTransformation
"""What becomes of ``g - Q Q^T g``: a factor, a power of the curvature there, a transformation."""


class ScaleByLREState(NamedTuple):
    """State of `scale_by_lre`, for ``n`` groups.

    Attributes:
      count: calls of ``update``, dropped steps included.
      steps: steps taken, ``(n,)``.
      since: steps since the basis was last updated, and failures to update it, ``(n,)``.
      curvature: the curvature's state.
      basis: the basis's state; its rows are arrays ``(m, size)`` for every piece of the `Layout`.
      inner: the inner parts' state, with a leading axis of groups.
      complement: the complement's state, ``()`` unless it is an optax transformation.
      key: the random key that all later keys come from.
      events: steps dropped by reason, `Events`.
      metrics: what the last step saw, `Metrics`.
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

    Like every ``scale_by_...`` of optax it returns a direction of ascent, which
    `optax.scale_by_learning_rate` turns round. A step whose gradient is zero or not finite, or
    whose small eigenproblem fails, returns zeros, leaves basis and inner state as they were, and is
    counted in ``state.events``, group by group.

    Donate the state, and the parameters where nothing else reads them, so that the rows are updated
    where they lie: ``jax.jit(step, donate_argnums=(0, 1))`` for ``step(params, state, batch)``. No
    two leaves of a state share a buffer. What was donated is gone: keep the state that comes back.

    A basis is as orthogonal as its Gram matrix is exact. Products of float32 numbers are therefore
    float32 on GPUs and TPUs, too, whatever ``jax.default_matmul_precision`` says. Rows in bfloat16
    (``dtype``) are read as they are and summed in float32. Functions that are passed in, and an
    optax complement, keep the precision that was set outside.

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
      symmetrize: whether a correction ``y z^T`` enters as one column, ``((y+z)/2)((y+z)/2)^T``, as
        the original has it. That depends on the units of ``y`` and ``z``; for ``y = H z`` it is
        ``(I + H)²/4`` on average. By default a correction enters as two columns, the exact
        ``(y z^T + z y^T)/2``, which is the same in any units.
      complement: what becomes of ``g - Q Q^T g``: dropped (``None``), scaled by a number, passed
        through an optax transformation, or multiplied by a power (``lro.inner.LInv()``) of the
        curvature outside the basis: what quasi-Newton curvatures assume there, what Hessians and
        `FrequentDirections` measure, or the largest eigenvalue that a basis may have dropped.
      groups: a function of a leaf's path to a label; leaves that share a label share a basis. By
        default all leaves do; with `lowrank_optax.per_leaf` every leaf has its own. Groups are
        independent: the result is that of as many separate optimizers.
      dtype: dtype of the stored rows, by default the leaf's. The gradient is rounded to it. The
        small algebra is float32 at least.
      axis_name: the axes of `jax.pmap` or `jax.shard_map` over which the devices have parts of a
        batch. Functions such as ``value_fn`` then give the loss of a device's own part: products
        are averaged over the axes and per-example gradients gathered, so that replicas stay alike.
        ``()`` says that every device is to go its own way.
      seed: seed of all random draws, those of curvatures and those of bases.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `ScaleByLREState`. The curvature
      says which extra arguments ``update`` needs.

    Raises:
      ValueError: for arguments out of range, for leaves that are not floating point, and for
        gradients whose shapes are not those of ``init``.

    Cost: two passes over the rows a step (``4 m d`` flops, ``m d`` numbers of state), plus the
    small algebra of basis and inner parts.

    Several devices: the mesh is that of the gradients, whose axes may be automatic or explicit.
    Rows are split along their last axis over all axes of the mesh that divide ``leaf.size``
    together, whatever the parameter's own sharding; every device does the small algebra. Each of
    ``N`` devices receives ``2 d / N`` numbers a step, to flatten the gradient and to shape the
    update, and sums of ``m`` numbers; a leaf sharded along its first axis alone is flat already. A
    leaf that no axis divides is on all devices: pad such vocabularies. The state is placed by
    `lowrank_optax.shardings`; updates are sharded like the parameters where these are passed. In
    `jax.shard_map`, pass the mean gradient. Layers of a scanned model are ``jax.vmap`` of ``init``
    and ``update`` over their axis; with `GGT` it copies no rows.

    Source: the original LRE; for the products see `lowrank_optax.recipes`.
    """
    return VectorEngine(
        curvature=curvature,
        basis=basis,
        inner=inner,
        update_every=update_every,
        warmup_steps=warmup_steps,
        symmetrize=symmetrize,
        complement=complement,
        groups=groups,
        dtype=dtype,
        axis_name=axis_name,
        seed=seed,
    ).transformation


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VectorEngine(Engine):
    """The engine of `scale_by_lre`: one space, all groups of the tree."""

    owner: ClassVar[str] = OWNER
    kind: ClassVar[type] = ScaleByLREState
    rules: ClassVar[tuple[type, ...]] = (optax.GradientTransformation, LPower)
    further: ClassVar[str] = ", or a power such as lowrank_optax.inner.LInv()"

    curvature: Curvature
    basis: Basis
    symmetrize: bool = False
    axis_name: Any = None

    def __post_init__(self):
        check(
            isinstance(self.curvature, Curvature),
            f"{OWNER}: curvature is {self.curvature!r}; pass a part "
            "from lowrank_optax.curvature, such as Covariance().",
        )
        check(
            isinstance(self.basis, Basis),
            f"{OWNER}: basis is {self.basis!r}; pass a part from "
            "lowrank_optax.basis, such as GGT(rank=100).",
        )
        super().__post_init__()
        _check_product(self.curvature, self.basis, self.inner, self.complement)

    @property
    def probed(self) -> bool:
        """Whether somebody reads a probe's product with the curvature."""
        learned = self.curvature.learns and isinstance(self.complement, LPower)
        return learned or "probe" in _needs(self.inner)

    def _init(self, params: Any) -> ScaleByLREState:
        layout = Layout.of(params, self.groups, self.dtype, small=True)
        rank = self.basis.coordinates(layout)
        every = self.update_every
        period = min(int(every), rank) if isinstance(every, numbers.Integral) else rank
        key, first = jax.random.split(jax.random.key(self.seed))
        new = begin(
            layout.n,
            layout.dtype,
            self.curvature.init(layout, max(1, period)),
            self.basis.init(layout, first),
            self.inner.init(rank, layout.dtype),
        )
        tx = self.complement if isinstance(self.complement, optax.GradientTransformation) else None
        return ScaleByLREState(
            count=jnp.zeros((), jnp.int32),
            complement=tx.init(at_least_float32(params)) if tx else (),
            key=jax.random.key_data(key),
            **new._asdict(),
        )

    def layout(self, updates: Any, state: ScaleByLREState, params: Any) -> Layout:
        """The layout that ``init`` saw: that of the parameters or, without them, of their rows."""
        given = updates if params is None else params
        layout = Layout.of(given, self.groups, self.dtype, small=True)
        if params is None:
            rows = getattr(state.basis, "rows", ()) if self.dtype is None else ()
            layout = layout.kept_in(state.metrics.captured.dtype, rows)
        return layout.on(updates)

    def spaces(self, layout: Layout, state: ScaleByLREState) -> dict[str, Space]:
        return {"": VectorSpace(self, layout)}

    def states(self, state: ScaleByLREState) -> dict[str, GroupState]:
        return {"": GroupState(*(getattr(state, name) for name in GroupState._fields))}

    def stored(self, state: ScaleByLREState, new: dict[str, GroupState]) -> ScaleByLREState:
        return state._replace(**new[""]._asdict())

    def factor(self, now: Turned) -> Any:
        """A complement's power is that of what is assumed outside the basis, or of a bound."""
        if not isinstance(self.complement, LPower):
            return self.complement
        known = "outside" in self.curvature.provides
        gamma = self.curvature.outside(now.curvature) if known else self.basis.outside(now.basis)
        some = gamma != 0
        return jnp.where(some, jnp.where(some, gamma, 1) ** self.complement.p, 0)

    def asked(self, extra: dict[str, Any]) -> dict[str, Any]:
        if self.axis_name is None:
            check_one_replica(OWNER, extra)
        read = self.curvature.functions
        if self.told or read is None:
            return extra
        return {name: x for name, x in extra.items() if name in read or not callable(x)}


@dataclasses.dataclass(frozen=True, eq=False)
class VectorSpace(LinearSpace):
    """All groups of a tree; their vectors are lists of flat leaves."""

    engine: VectorEngine
    layout: Layout

    @property
    def n(self) -> int:
        return self.layout.n

    @property
    def dtype(self) -> Any:
        return self.layout.dtype

    def read(self, leaves: list[jax.Array]) -> Vector:
        return self.layout.flatten(self.layout.tree(leaves))

    def square(self, g: Vector) -> jax.Array:
        return self.layout.inner(g, g)

    def look(self, g: Vector, square, accept, due, old: GroupState, given: Given) -> Seen:
        observed = self.engine.curvature.observe(
            self.layout, old.curvature, Observation(g, accept, given.params, given.extra)
        )
        nobody = jnp.zeros_like(due)
        return Seen(g, square, accept, due, due, nobody, (observed, given))

    def still(self, seen: Seen, old: GroupState) -> Turned:
        observed, _ = seen.measured
        zeros = jnp.zeros(self.n, self.dtype)
        return Turned(old.basis, observed, old.inner, jnp.zeros_like(seen.due), zeros)

    def absorb(self, seen: Seen, now: Turned) -> tuple[Turned, jax.Array | None]:
        engine, layout, basis = self.engine, self.layout, self.engine.basis
        evidence, turn = self._evidence(seen, now)
        correction, curvature = engine.curvature.correct(layout, now.curvature, evidence)
        symmetric = _symmetric(layout, correction, seen.g, engine.symmetrize, evidence.params)
        weights = symmetric.weights
        # A correction without weight, such as a skipped quasi-Newton pair, leaves the basis alone.
        some = seen.due & jnp.any(weights != 0, axis=1)
        done = basis.absorb(layout, now.basis, symmetric, some, turn)
        moved = seen.due & ~done.failed
        probe = product = outside = None
        if correction.probe is not None and engine.probed:
            probe, product, outside = self._measured(layout, done.state, correction)
            curvature = engine.curvature.learn(layout, curvature, moved, outside)

        live = basis.eigenbasis(now.basis).live
        inner = jax.vmap(lambda *args: carry(engine.inner, *args))(done.c, moved, now.inner)
        weights = weights[:, -done.u.shape[-1] :]
        told = (done.u, weights, probe, product, outside)
        # Of a column that is switched off a basis need not know the coordinates.
        plain = correction.columns is None and correction.weights is None
        new = Turned(done.state, curvature, inner, done.failed, drift(done.c, live, moved), told)
        return new, done.u[..., 0] if plain else None

    def _evidence(self, seen: Seen, now: Turned) -> tuple[Evidence, jax.Array]:
        """What the curvature may look at, and the basis's own random key."""
        engine, layout, basis, old = self.engine, self.layout, self.engine.basis, now.basis
        (_, given), g = seen.measured, seen.g
        measure, turn = jax.random.split(given.key)

        def apply(v: Vector, gamma: jax.Array) -> Vector:
            u = basis.project(layout, old, v)
            rest = basis.unproject(layout, old, (basis.measured(old) - gamma[:, None]) * u)
            return [
                a + c * x.astype(layout.dtype)
                for a, c, x in zip(rest, layout.to_pieces(gamma), v, strict=True)
            ]

        def project(v: Vector) -> Vector:
            return basis.unproject(layout, old, basis.project(layout, old, v))

        evidence = Evidence(
            g,
            seen.due,
            given.params,
            given.extra,
            measure,
            apply,
            project,
            engine.probed,
            engine.axis_name,
        )
        return evidence, turn

    def _measured(self, layout, basis, correction):
        """The correction's probe and product in the basis, and what they show outside it."""
        z, hz = correction.probe
        pair = [jnp.stack([a, b.astype(a.dtype)]) for a, b in zip(z, hz, strict=True)]
        both = self.engine.basis.project(layout, basis, pair)
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

    def settle(self, seen: Seen, now: Turned, old: GroupState, again: jax.Array) -> Turned:
        undo = self.engine.curvature.undo
        return now._replace(
            curvature=undo(self.layout, now.failed, again, now.curvature, old.curvature)
        )

    def follow(self, seen: Seen, now: Turned) -> tuple[Vector, jax.Array]:
        g = self.engine.curvature.gradient(self.layout, now.curvature, seen.g)
        return g, seen.square if g is seen.g else self.square(g)

    def project(self, basis: Any, g: Vector) -> jax.Array:
        return self.engine.basis.project(self.layout, basis, g)

    def unproject(self, basis: Any, *us: jax.Array) -> list[Vector]:
        if len(us) == 1:
            return [self.engine.basis.unproject(self.layout, basis, us[0])]
        all_of_them = self.engine.basis.unproject(self.layout, basis, jnp.stack(us, axis=1))
        return [[x[i] for x in all_of_them] for i in range(len(us))]

    def eigenbasis(self, basis: Any) -> Eigenbasis:
        return self.engine.basis.eigenbasis(basis)

    def each(self, values: jax.Array) -> list[jax.Array]:
        return self.layout.to_pieces(values)

    def write(self, step: Vector) -> dict[int, jax.Array]:
        return dict(enumerate(self.layout.part(step)))

    @property
    def cuts(self) -> bool:
        return any(len(places) > 1 for places in self.layout.pieces)

    def whole(self, step: Vector) -> dict[int, jax.Array]:
        pieces = zip(self.layout.pieces, step, strict=True)
        return {places[0]: x for places, x in pieces if len(places) == 1}

    def at(self, values: jax.Array) -> dict[int, jax.Array]:
        return dict(enumerate(self.layout.of_leaves(values)))


def _check_product(curvature: Curvature, basis: Basis, inner: Inner, complement: Any) -> None:
    """Refuses combinations in which a part's needs are met by no other."""
    offers = curvature.provides | basis.provides
    if complement is not None:
        offers = offers | {"complement"}
    outside = frozenset({"outside"} if isinstance(complement, LPower) else ())
    for owner, needs in (
        (inner, _needs(inner)),
        (curvature, curvature.needs),
        (basis, basis.needs),
        (complement, outside),
    ):
        for name in sorted(needs - offers):
            raise ValueError(
                f"{OWNER}: {owner} needs {NEEDS[name]}. It was combined with "
                f"{curvature} and {basis}."
            )


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
        for f, x in zip(layout.to_pieces(by), columns, strict=True)
    ]
    return grow(c, left), grow(1 / c, right)
