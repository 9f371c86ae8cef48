"""Matrix-shaped parameters: a leaf as a block of columns, with a basis for one side or for both.

The engine of `scale_by_lre` sees one long vector; this one sees matrices ``G`` and has the same
parts: ``U = Q_S^T G Q_L`` is what the inner parts turn, flattened, and their states move with the
Kronecker product ``C_S (x) C_L``, which nobody forms.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _linalg
from lowrank_optax._tree import (
    Layout,
    alike,
    check_fits,
    per_leaf,
    repeat,
    spread,
    start,
    step_alike,
)
from lowrank_optax._types import (
    NEEDS,
    Context,
    Eigenbasis,
    Increment,
    Inner,
    Law,
    check,
    check_count,
    check_least,
)
from lowrank_optax.basis import Basis
from lowrank_optax.inner import as_inner
from lowrank_optax.transform import Events, carry, step_inside

OWNER = "scale_by_matrix_lre"

deal = partial(spread, axes=(0, -1))
"""Arrays of ``n`` matrices dealt out to the devices, or split along their last axis."""


class MatricesState(NamedTuple):
    """State of ``n`` matrices of one shape ``(a, b)``, ``a <= b``.

    Attributes:
      steps: ``(n,)`` steps taken.
      since: ``(n,)`` steps since the bases were last updated.
      short: state of the basis of columns, of length ``a``; ``()`` without one.
      long: state of the basis of rows, of length ``b``; ``()`` without one.
      inner: the inner parts' state, with a leading axis of matrices.
      events: steps dropped by reason, ``(n,)`` each.
      captured: ``(n,)``, ``‖Q_S^T G Q_L‖² / ‖G‖²`` in the last step.
    """

    steps: jax.Array
    since: jax.Array
    short: Any
    long: Any
    inner: Any
    events: Events
    captured: jax.Array


class ScaleByMatrixLREState(NamedTuple):
    """State of `scale_by_matrix_lre`.

    Attributes:
      count: calls of ``update``, dropped steps included.
      matrices: a `MatricesState` for every shape, by its name, such as ``"64x256 float32"``.
      rest: state of the transformation of all other leaves.
      dropped: steps that ``rest`` did not take because something was not finite.
      key: of the randomness still to come.
    """

    count: jax.Array
    matrices: Any
    rest: Any
    dropped: jax.Array
    key: jax.Array


def squarest(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The split of the axes into two that gives the squarest matrix; ``None`` for vectors.

    Example:
      >>> from lowrank_optax import squarest
      >>> squarest((64, 4, 16)), squarest((3, 3, 16, 32)), squarest((10,)), squarest((1, 10))
      ((64, 64), (144, 32), None, None)
    """
    splits = ((math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape)))
    best = max(splits, key=min, default=(0, 0))
    return best if min(best) > 1 else None


def scale_by_matrix_lre(
    short: Basis | None,
    long: Basis | None,
    inner: Inner | Sequence[Inner],
    *,
    update_every: int | Callable[[jax.Array], jax.Array] = 1,
    warmup_steps: int = 0,
    view: Callable[[tuple[int, ...]], tuple[int, int] | None] | None = None,
    rest: optax.GradientTransformation | None = None,
    complement: float | jax.Array = 0.0,
    largest: int | None = None,
    dtype: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` in eigenbases of the two sides of every matrix-shaped leaf.

    With ``G`` seen so that its columns are not longer than its rows, ``(a, b)``, ``a <= b``:

    .. math:: \Delta = Q_S\,\mathrm{inner}(Q_S^T G\, Q_L;\ \sqrt{\lambda_S \lambda_L})\,Q_L^T
              + \gamma\,(G - Q_S Q_S^T G\, Q_L Q_L^T)

    The ``short`` basis learns from the ``b`` columns of ``G``, ``G G^T``, the ``long`` one from its
    ``a`` rows, ``G^T G``; ``None`` in place of one is the identity and ``lam`` then the other's.
    Eigenvalues are those of the Kronecker product ``(L (x) R)^{1/2}``, so that `LInvSqrt` gives
    Shampoo's ``L^{-1/4} G R^{-1/4}``. Norms in the inner parts go over the whole matrix; their
    states move as ``(C_S^p) V (C_L^p)^T`` when the bases do.

    ================================ =========== ===============================
    short, long                      inner       is, but for what its recipe says
    ================================ =========== ===============================
    SubspaceIteration(r, 0), None    Adam        GaLore (`galore`)
    FullMatrix(b2, every=10) twice   Adam        SOAP (`soap`)
    FullMatrix(None) twice           LInvSqrt    Shampoo
    ================================ =========== ===============================

    Like every ``scale_by_...`` of optax it returns a direction of ascent. A matrix whose gradient
    is zero or not finite gets a zero update, its state stays as it was, and the step is counted in
    its ``events``; others go on. A side whose eigenproblem fails stays as it was, and the matrix
    takes no step.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> side = lro.basis.SubspaceIteration(2)
      >>> tx = optax.chain(
      ...     lro.scale_by_matrix_lre(side, None, lro.inner.Adam()), optax.scale(-0.1))
      >>> target = jnp.outer(jnp.arange(4.0), jnp.ones(6))
      >>> loss = lambda p: jnp.sum((p["w"] - target) ** 2) + p["b"] ** 2
      >>> p = {"w": jnp.zeros((4, 6)), "b": jnp.ones(())}; state = tx.init(p)
      >>> for _ in range(100):
      ...     updates, state = jax.jit(tx.update)(jax.grad(loss)(p), state)
      ...     p = optax.apply_updates(p, updates)
      >>> bool(loss(p) < 1e-2)
      True

    Args:
      short: basis of the shorter side, from `lowrank_optax.basis`. Ranks are cut to ``a``. Of a
        square view this is the first axis.
      long: basis of the longer side, cut to ``b``.
      inner: what runs inside: one part or a sequence of them. Parts that hold matrices or tensors
        over the coordinates are refused: there are ``r_S r_L`` of them.
      update_every: steps between two updates of the bases, or a schedule of the number of steps
        taken. The first step always updates. Only the gradients of those steps are seen;
        ``FullMatrix(every=10)`` sees all and turns at every tenth.
      warmup_steps: first steps that build the bases and return zeros for the matrices. With two
        bases of full rank that have seen one gradient only, it is diagonal in them, and the rest of
        its coordinates rounding, which Adam would blow up.
      view: a function of a leaf's shape to ``(rows, columns)``, to which it is reshaped, or
        ``None`` to leave it to ``rest``; by default `squarest`.
      rest: of the leaves that are no matrices, by default `optax.scale_by_adam`.
      complement: ``gamma``, 0 drops what is outside the bases.
      largest: sides longer than this have no basis, and matrices of which no side has one are left
        to ``rest``; ``None`` for no limit. What a full basis costs grows with the cube.
      dtype: of the stored rows, for bases that store rows in the leaf's dtype; by default that.
      seed: of the randomness of the bases.

    Returns:
      An `optax.GradientTransformationExtraArgs`; extra arguments go to ``rest``.

    Raises:
      ValueError: for parts that do not fit together, arguments out of range, leaves that are not
        floating point, views of another size, and gradients whose shapes are not those of ``init``.

    Cost: a step ``4 (r_S a b + r_S r_L b)`` flops a matrix; an update that of the bases for ``b``
    and ``a`` columns and ``4 r_S r_L (r_S + r_L)`` flops for each state of the inner parts. Leaves
    of one shape and dtype are treated together, batched over the small algebra. On several devices
    the state's arrays are dealt out matrix by matrix as far as their number is divisible, otherwise
    split along their last axis; the rest is XLA's partitioning, which moves a few times ``d``.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024; Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024; Gupta, Koren
    and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018.
    """
    rule, sides = as_inner(inner), tuple(basis for basis in (short, long) if basis is not None)
    check(sides, f"{OWNER}: short and long are None; pass a basis for one side at least.")
    for basis in sides:
        check(
            isinstance(basis, Basis),
            f"{OWNER}: {basis!r} is no basis; pass a part from lowrank_optax.basis, such as "
            "SubspaceIteration(16), or None.",
        )
    _check_parts(sides, rule)
    if not callable(update_every):
        check_count(OWNER, "update_every", update_every)
    check_count(OWNER, "warmup_steps", warmup_steps, 0)
    check(
        view is None or callable(view),
        f"{OWNER}: view is {view!r}; pass a function of a leaf's shape, such as "
        "lowrank_optax.squarest.",
    )
    check(
        rest is None or isinstance(rest, optax.GradientTransformation),
        f"{OWNER}: rest is {rest!r}; pass an optax.GradientTransformation.",
    )
    if not isinstance(complement, jax.Array):
        check_least(OWNER, "complement", complement)
    if largest is not None:
        check_count(OWNER, "largest", largest)
    check(
        dtype is None or jnp.issubdtype(dtype, jnp.floating),
        f"{OWNER}: dtype is {dtype!r}; pass a floating-point dtype such as jnp.bfloat16.",
    )
    others = rest or optax.scale_by_adam()

    def seen(shape: tuple[int, ...]) -> tuple[int, int] | None:
        found = (view or squarest)(shape)
        if found is None or largest is None or len(found) != 2:
            return found
        pairs = zip((short, long), sorted(found), strict=True)
        return found if any(b is not None and size <= largest for b, size in pairs) else None

    others = optax.masked(
        others._replace(update=_linalg.as_called(others.update)),
        partial(jax.tree.map, lambda x: seen(jnp.shape(x)) is None),
    )
    engine = _Engine(
        short,
        long,
        rule,
        update_every,
        warmup_steps,
        seen,
        others,
        complement,
        largest,
        dtype,
        seed,
    )
    return optax.GradientTransformationExtraArgs(
        _linalg.exact(engine.init), _linalg.exact(engine.update)
    )


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """The leaves of one shape and dtype, ``n`` matrices ``(a, b)`` with ``a <= b``.

    Attributes:
      leaves: their places in the tree.
      turned: which of them are transposed for that.
      short: layout of their columns, a group for each matrix.
      long: layout of their rows.
    """

    leaves: tuple[int, ...]
    turned: tuple[bool, ...]
    short: Layout
    long: Layout

    @classmethod
    def of(cls, layout: Layout, views: Sequence[Any], rows: Any) -> dict[str, "_Matrices"]:
        """The matrices of a tree by the names of their shapes."""
        found: dict[str, list[int]] = {}
        for i, (view, dtype) in enumerate(zip(views, layout.dtypes, strict=True)):
            if view is not None:
                found.setdefault(f"{min(view)}x{max(view)} {dtype}", []).append(i)
        return {
            name: cls(
                tuple(at),
                tuple(views[i][0] > views[i][1] for i in at),
                *(
                    Layout.of(
                        [jax.ShapeDtypeStruct((size,), layout.dtypes[i]) for i in at],
                        per_leaf,
                        rows,
                        OWNER,
                    )
                    for size in sorted(views[at[0]])
                ),
            )
            for name, at in found.items()
        }

    @property
    def sizes(self) -> tuple[int, int]:
        """``(a, b)``."""
        return self.short.sizes[0], self.long.sizes[0]

    def read(self, leaves: Sequence[jax.Array]) -> jax.Array:
        """The leaves as matrices, ``(n, a, b)``."""
        a, b = self.sizes
        return jnp.stack(
            [
                jnp.reshape(leaves[i], (b, a)).T if turned else jnp.reshape(leaves[i], (a, b))
                for i, turned in zip(self.leaves, self.turned, strict=True)
            ]
        ).astype(self.short.dtype)

    def write(self, x: jax.Array) -> dict[int, jax.Array]:
        """The inverse of `read`, flat."""
        return {
            i: jnp.reshape(each.T if turned else each, -1)
            for i, turned, each in zip(self.leaves, self.turned, x, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class _Engine:
    """The parts of one optimizer, and the step they make together."""

    short: Basis | None
    long: Basis | None
    inner: Inner
    update_every: Any
    warmup_steps: Any
    view: Callable[[tuple[int, ...]], tuple[int, int] | None]
    rest: optax.GradientTransformationExtraArgs
    complement: Any
    largest: Any
    dtype: Any
    seed: Any

    def init(self, params: Any) -> ScaleByMatrixLREState:
        return start(self._init, params)

    def _init(self, params: Any) -> ScaleByMatrixLREState:
        key, *keys = jax.random.split(jax.random.key(self.seed), 3)

        def begin(kind: _Matrices) -> MatricesState:
            n, dtype = kind.short.n, kind.short.dtype
            short, long = (
                () if basis is None else basis.init(layout, k)
                for (basis, layout), k in zip(self._sides(kind), keys, strict=True)
            )
            size = math.prod(
                layout.dims[0] if basis is None else basis.coordinates(layout)
                for basis, layout in self._sides(kind)
            )
            inner = self.inner.init(size, dtype)
            ints = lambda: jnp.zeros(n, jnp.int32)
            return MatricesState(
                ints(),
                ints(),
                short,
                long,
                jax.tree.map(lambda x: jnp.array(jnp.broadcast_to(x, (n, *x.shape))), inner),
                Events(ints(), ints(), ints(), ints()),
                jnp.zeros(n, dtype),
            )

        layout = Layout.of(params, None, self.dtype, OWNER)
        matrices = self._matrices(layout)
        return ScaleByMatrixLREState(
            count=jnp.zeros((), jnp.int32),
            # `optax.tree.map_params` inits a tree without leaves, to find out where parameters are:
            # one leaf stands for all of this.
            matrices={name: deal(begin(kind), layout.mesh) for name, kind in matrices.items()}
            if layout.names
            else jnp.zeros(()),
            rest=self.rest.init(params),
            dropped=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any):
        layout = Layout.of(updates, None, self.dtype, OWNER)
        if not layout.names:
            return updates, state._replace(count=_linalg.tally(state.count))
        check_fits(OWNER, state, jax.eval_shape(self.init, updates), but="rest")
        return step_alike(self._update, updates, state, params, extra)

    def _update(self, updates: Any, state: Any, params: Any, arrays: Any, **functions: Any):
        layout = Layout.of(updates, None, self.dtype, OWNER)
        matrices, extra = self._matrices(layout), arrays | functions
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        leaves, rest, fine = self._others(layout, matrices, updates, state.rest, params, extra)
        new, given = {}, layout.leaves(updates)
        for i, (name, kind) in enumerate(matrices.items()):
            step, new[name] = self._step(
                kind,
                deal(kind.read(given), layout.mesh),
                state.matrices[name],
                jax.random.fold_in(key, i),
            )
            # Taken from their devices all at once: one by one they would go to every device.
            leaves |= kind.write(spread(step, layout.mesh, (1, 2)))
        return layout.unflatten([leaves[i] for i in range(len(leaves))]), ScaleByMatrixLREState(
            count=_linalg.tally(state.count, period=_linalg.DRAWS),
            matrices=new,
            rest=rest,
            dropped=_linalg.tally(state.dropped, ~fine),
            key=state.key,
        )

    def _others(self, layout: Layout, matrices, updates, old, params, extra):
        """The step of the leaves that are no matrices; none at all where one is not finite."""
        taken = {i for kind in matrices.values() for i in kind.leaves}
        mine = lambda tree: {i: x for i, x in enumerate(layout.leaves(tree)) if i not in taken}
        given = mine(updates)
        step, new = self.rest.update(updates, old, params, **extra)
        step = mine(step)
        # A second moment that overflowed would divide by infinity for ever.
        burst = [
            jnp.where(jnp.isfinite(y), x, 0)
            for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
            if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        fine = _linalg.finite(*given.values(), *step.values(), *burst, jnp.zeros(()))
        step = {i: jnp.where(fine, jnp.reshape(x, -1), 0) for i, x in step.items()}
        return step, jax.tree.map(partial(jnp.where, fine), new, old), fine

    def _sides(self, kind: _Matrices) -> tuple[tuple[Basis | None, Layout], ...]:
        """The bases of both sides, their ranks cut to what there is, with their layouts."""
        short, long = (
            None if self.largest is not None and size > self.largest else basis
            for basis, size in zip((self.short, self.long), kind.sizes, strict=True)
        )
        return (_cut(short, kind.short), kind.short), (_cut(long, kind.long), kind.long)

    def _matrices(self, layout: Layout) -> dict[str, _Matrices]:
        views = [self.view(shape) for shape in layout.shapes]
        for name, shape, view in zip(layout.names, layout.shapes, views, strict=True):
            check(
                view is None or (len(view) == 2 and math.prod(view) == math.prod(shape) > 0),
                f"{OWNER}: view gives {view} for the leaf {name or 'of the tree'} of shape {shape};"
                " return two sizes with as many entries, or None.",
            )
        return _Matrices.of(layout, views, self.dtype)

    def _step(self, kind: _Matrices, g: jax.Array, old: MatricesState, key: jax.Array):
        """The step of all matrices of one shape, ``(n, a, b)``."""
        square = jnp.sum(g**2, axis=(1, 2))
        accept = jnp.isfinite(square) & (square > 0)
        every: Any = self.update_every
        period: Any = every(old.steps) if callable(every) else every
        due = accept & ((old.since + 1 >= period) | (old.steps == 0))

        # The bases absorb columns and rows, and the inner state moves with them.
        start = (old.short, old.long, old.inner, jnp.zeros_like(due))
        refresh = lambda _, now: self._refresh(kind, g, due, key, *now[:3])
        always = isinstance(every, numbers.Integral) and every == 1
        short, long, inside, failed = (
            refresh(0, start) if always else repeat(jnp.any(due), refresh, start)
        )
        accept = accept & ~failed

        # The inner parts run on the flattened coordinates.
        warm = old.steps >= self.warmup_steps
        u0 = jnp.where(accept[:, None, None], self._project(kind, short, long, g), 0)
        context = Context(
            jnp.reshape(u0, (len(u0), -1)), self._eigenbasis(kind, short, long), due & ~failed
        )
        u, inside, fine = jax.vmap(partial(step_inside, self.inner))(
            context.g, inside, context, accept & warm
        )
        taken = accept & fine

        # Back to the matrices, with what becomes of the part of them outside the bases.
        scale, moves = jnp.asarray(self.complement, g.dtype), (taken & warm)[:, None, None]
        u = jnp.reshape(u, u0.shape) - jnp.where(moves, scale * u0, 0)
        step = self._unproject(kind, short, long, u)
        step = step + scale * jnp.where(moves, g, 0)
        failures = Events(~jnp.isfinite(square), square == 0, failed, accept & ~fine)
        captured = _linalg.safe_divide(jnp.sum(u0**2, axis=(1, 2)), square)
        return step, MatricesState(
            steps=_linalg.tally(old.steps, taken),
            since=jnp.where(due & ~failed, 0, _linalg.tally(old.since, taken)),
            short=short,
            long=long,
            inner=inside,
            events=jax.tree.map(_linalg.tally, old.events, failures),
            captured=jnp.where(taken, captured, old.captured),
        )

    def _refresh(self, kind: _Matrices, g, due, key, short, long, inner):
        """One update of both bases; the inner state carried to them, and which ones failed."""
        states, changes, failed = [], [], jnp.zeros_like(due)
        columns = jnp.swapaxes(g, 1, 2), g
        for (basis, layout), state, y, k in zip(
            self._sides(kind), (short, long), columns, jax.random.split(key), strict=True
        ):
            if basis is None:
                states.append(state)
                changes.append(None)
                continue
            known = Increment(
                [x.astype(t) for x, t in zip(y, layout.rows, strict=True)],
                jnp.ones(y.shape[:2], layout.dtype),
                # Without it a full matrix would start as the identity, which rounds gradients away.
                initial=jnp.zeros(layout.n, layout.dtype),
            )
            done = basis.absorb(layout, state, known, due, k)
            states.append(done.state)
            changes.append(done.c)
            failed = failed | done.failed
        # A basis may have learned without turning, and moving costs more than the step itself.
        turned = due & jnp.any(jnp.stack([_turned(c) for c in changes if c is not None]), axis=0)
        move = jax.vmap(partial(carry, self.inner))
        inner = repeat(jnp.any(turned), lambda _, now: move(tuple(changes), turned, now), inner)
        return *states, inner, failed

    def _eigenbasis(self, kind: _Matrices, short: Any, long: Any) -> Eigenbasis:
        """Those of both sides multiplied, ``(n, r_S r_L)``; of one side spread over the other."""
        sides = [
            Eigenbasis(
                jnp.ones((layout.n, layout.dims[0]), layout.dtype),
                jnp.ones((layout.n, layout.dims[0]), bool),
            )
            if basis is None
            else basis.eigenbasis(state)
            for (basis, layout), state in zip(self._sides(kind), (short, long), strict=True)
        ]
        power = 1.0 if any(basis is None for basis, _ in self._sides(kind)) else 0.5
        one, two = (jnp.maximum(side.lam, 0) ** power for side in sides)
        lam, live = (
            one[:, :, None] * two[:, None],
            sides[0].live[:, :, None] & sides[1].live[:, None],
        )
        return Eigenbasis(jnp.reshape(lam, (len(lam), -1)), jnp.reshape(live, (len(live), -1)))

    def _project(self, kind: _Matrices, short: Any, long: Any, g: jax.Array) -> jax.Array:
        """``Q_S^T G Q_L``, ``(n, r_S, r_L)``."""
        (one, columns), (two, rows) = self._sides(kind)
        if one is not None:
            g = one.project(columns, short, list(jnp.swapaxes(g, 1, 2)))
        if two is not None:
            g = jnp.swapaxes(two.project(rows, long, list(g)), 1, 2)
        return g

    def _unproject(self, kind: _Matrices, short: Any, long: Any, u: jax.Array) -> jax.Array:
        """``Q_S U Q_L^T``, ``(n, a, b)``."""
        (one, columns), (two, rows) = self._sides(kind)
        if two is not None:
            u = jnp.stack(two.unproject(rows, long, u))
        if one is not None:
            u = jnp.stack(one.unproject(columns, short, jnp.swapaxes(u, 1, 2)))
            u = jnp.swapaxes(u, 1, 2)
        return u


def _cut(basis: Basis | None, layout: Layout) -> Any:
    """The basis with no more rank than there are dimensions."""
    rank = getattr(basis, "rank", None)
    if rank is None or rank <= layout.dims[0]:
        return basis
    return dataclasses.replace(basis, rank=layout.dims[0])  # pyright: ignore[reportArgumentType]


def _turned(c: jax.Array) -> jax.Array:
    """Whether a change of basis, ``(n, r, r)``, is any, ``(n,)``."""
    return jnp.any(c != jnp.eye(c.shape[-1], dtype=c.dtype), axis=(1, 2))


def _check_parts(bases: Sequence[Basis], inner: Inner) -> None:
    """Refuses parts whose needs nothing here meets, and states too large to move."""
    offers = frozenset.intersection(*(basis.provides for basis in bases))
    for owner, needs in (
        (inner, getattr(inner, "needs", frozenset())),
        *((b, b.needs) for b in bases),
    ):
        for name in sorted(needs - offers):
            raise ValueError(f"{OWNER}: {owner} needs {NEEDS[name]}. It was combined with {bases}.")
    laws = jax.tree.leaves(inner.laws, is_leaf=lambda x: isinstance(x, Law))
    check(
        all(law.axes < 2 for law in laws),
        f"{OWNER}: {inner} holds matrices over all r_S r_L coordinates of a matrix; pass "
        "elementwise parts such as lro.inner.Adam(), or see leaves as vectors with scale_by_lre.",
    )


def orthogonalize(
    rms: float = 0.2,
    *,
    iterations: int = 5,
    view: Callable[[tuple[int, ...]], tuple[int, int] | None] | None = None,
) -> optax.GradientTransformation:
    r"""Replaces every matrix-shaped update by its orthogonal polar factor, as Muon does.

    With ``G = U diag(s) V^T``, ``(a, b)``:

    .. math:: \Delta \approx \rho\,\sqrt{\max(a, b)}\; U V^T

    by the quintic Newton–Schulz iteration, whose singular values end between .7 and 1.2. Stands
    behind any optimizer: all directions that it moves in, it then moves in alike. Leaves that are
    no matrices, and updates that are zero or not finite, stay as they are.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.orthogonalize(rms=1.0)
      >>> updates, _ = tx.update(jnp.array([[100.0, 0.0], [0.0, -1.0]]), tx.init(jnp.zeros((2, 2))))
      >>> print(jnp.round(updates / 2**0.5))
      [[ 1.  0.]
       [ 0. -1.]]

    Args:
      rms: root mean square of the entries of an update of full rank, ``rho``; that of Adam's
        updates is about .2.
      iterations: of Newton–Schulz.
      view: a function of a leaf's shape to ``(rows, columns)`` or ``None``; by default `squarest`.

    Raises:
      ValueError: for an ``rms`` or a number of iterations out of range.

    Cost: ``4 a² b + 2 a³`` flops an iteration, ``a <= b``; no state.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the
    scale of Liu et al., "Muon is Scalable for LLM Training", 2025.
    """
    check_least("orthogonalize", "rms", rms, strict=True)
    check_count("orthogonalize", "iterations", iterations)
    seen = view or squarest

    def polar(g: jax.Array) -> jax.Array:
        """Of one matrix that is not higher than wide."""
        top = jnp.max(jnp.abs(g))
        sound = jnp.isfinite(top) & (top > 0)
        # First the largest entry, or the norm's squares leave the dtype's range; its inverse has to
        # stay in it too.
        y = g / jnp.where(sound, jnp.minimum(top, jnp.finfo(g.dtype).max / 64), 1)
        y = y / jnp.where(sound, jnp.linalg.norm(y), 1)

        def newton_schulz(_, y):
            k = y @ y.T
            return 3.4445 * y + (-4.775 * k + 2.0315 * k @ k) @ y

        y = jax.lax.fori_loop(0, iterations, newton_schulz, y)  # unrolled it compiles for long
        return jnp.where(sound, rms * g.shape[1] ** 0.5 * y, g)

    def step(updates: Any) -> tuple[Any]:
        leaves, treedef = jax.tree.flatten(updates)
        kinds: dict[Any, list[int]] = {}
        for i, x in enumerate(leaves):
            size = seen(x.shape)
            if size is not None:
                kinds.setdefault((x.shape, size, x.dtype), []).append(i)
        for (shape, size, dtype), members in kinds.items():
            upright = size[0] > size[1]
            g = jnp.reshape(jnp.stack([leaves[i] for i in members]), (-1, *size))
            g = g.astype(jnp.promote_types(dtype, jnp.float32))
            y = jax.vmap(polar)(jnp.swapaxes(g, 1, 2) if upright else g)
            y = jnp.reshape(jnp.swapaxes(y, 1, 2) if upright else y, (-1, *shape)).astype(dtype)
            for i, x in zip(members, y, strict=True):
                leaves[i] = x
        return (treedef.unflatten(leaves),)

    def update(updates: Any, state: Any, params: Any = None):
        return *alike(step, (updates,), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
