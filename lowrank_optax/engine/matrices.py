"""Matrix-shaped parameters: a leaf as a block of columns, with a basis for one side or for both.

The engine of `scale_by_lre` sees one long vector; this one sees matrices ``G`` and has the same
parts: ``U = Q_S^T G Q_L`` is what the inner parts turn, flattened, and their states move with the
Kronecker product ``C_S (x) C_L``, which nobody forms.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import as_size, check, check_count, check_least
from lowrank_optax._core.derivatives import undifferentiated
from lowrank_optax._core.devices import Step, init_on_devices, split_over_devices, step_on_devices
from lowrank_optax._core.entry import own_arguments
from lowrank_optax._core.layout import Layout, per_leaf
from lowrank_optax._core.loops import now_and_then
from lowrank_optax._core.precision import callers_precision, full_precision
from lowrank_optax._core.states import advance_where_taken, at_least_float32, check_fits, check_kind
from lowrank_optax._core.types import NEEDS, Context, Eigenbasis, Inner, Law, SymmetricCorrection
from lowrank_optax.basis import Basis, FullMatrix
from lowrank_optax.basis.full import FullMatrixState
from lowrank_optax.engine.vectors import Events, carry, step_inside
from lowrank_optax.engine.views import View, default_matrix_view
from lowrank_optax.inner import as_inner

OWNER = "scale_by_matrix_lre"


deal = partial(split_over_devices, axes=(0, -1))
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
      matrices: a `MatricesState` for every shape, by its name, such as ``"64x256"``.
      rest: state of the transformation of all other leaves, in float32 at least.
      complement: state of the complement, ``()`` unless it is an optax transformation.
      dropped: steps of a leaf that ``rest`` did not take because something was not finite.
      key: of the randomness still to come.
    """

    count: jax.Array
    matrices: Any
    rest: Any
    complement: Any
    dropped: jax.Array
    key: jax.Array


def scale_by_matrix_lre(
    short: Basis | None,
    long: Basis | None,
    inner: Inner | Sequence[Inner],
    *,
    update_every: int | Callable[[jax.Array], jax.Array] = 1,
    warmup_steps: int = 0,
    view: View | None = None,
    rest: optax.GradientTransformation | None = None,
    complement: float | jax.Array | optax.GradientTransformation | None = None,
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
      view: a function of a leaf's path and shape to ``(rows, columns)``, to which it is reshaped,
        or ``None`` to leave it to ``rest``; by default `default_matrix_view` of the shape.
      rest: the optimizer of the leaves that are no matrices, by default `optax.scale_by_adam`. It
        sees them in float32 at least.
      complement: what becomes of ``G - Q_S Q_S^T G Q_L Q_L^T``: dropped (``None``), scaled by a
        number ``gamma``, or passed through an optax transformation.
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
    of one shape are treated together, batched over the small algebra. On several devices
    the state's arrays are dealt out matrix by matrix as far as their number is divisible, otherwise
    split along their last axis; the rest is XLA's partitioning, which moves a few times ``d``.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    ICML 2024; Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024; Gupta, Koren
    and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018.
    """
    engine = matrix_engine(
        short,
        long,
        inner,
        update_every=update_every,
        warmup_steps=warmup_steps,
        view=view,
        rest=rest,
        complement=complement,
        largest=largest,
        dtype=dtype,
        seed=seed,
    )
    return optax.GradientTransformationExtraArgs(engine.init, engine.update)


def matrix_engine(
    short: Any,
    long: Any,
    inner: Any,
    *,
    update_every: Any = 1,
    warmup_steps: Any = 0,
    view: Any = None,
    rest: Any = None,
    complement: Any = None,
    largest: Any = None,
    dtype: Any = None,
    seed: Any = 0,
) -> "MatrixEngine":
    """The engine of `scale_by_matrix_lre`, its arguments checked."""
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
        f"{OWNER}: view is {view!r}; pass a function of a leaf's path and shape, such as "
        "lambda path, shape: lowrank_optax.default_matrix_view(shape).",
    )
    check(
        rest is None or isinstance(rest, optax.GradientTransformation),
        f"{OWNER}: rest is {rest!r}; pass an optax.GradientTransformation.",
    )
    told = any(isinstance(tx, optax.GradientTransformationExtraArgs) for tx in (rest, complement))
    called = lambda tx: optax.with_extra_args_support(
        tx._replace(update=callers_precision(tx.update))
    )
    if isinstance(complement, optax.GradientTransformation):
        complement = called(complement)
    elif complement is not None:
        check_least(OWNER, "complement", complement)
    check(
        dtype is None or jnp.issubdtype(dtype, jnp.floating),
        f"{OWNER}: dtype is {dtype!r}; pass a floating-point dtype such as jnp.bfloat16.",
    )
    seen: Any = view or (lambda path, shape: default_matrix_view(shape))
    return MatrixEngine(
        short,
        long,
        rule,
        update_every,
        warmup_steps,
        seen,
        called(rest or optax.scale_by_adam()),
        complement,
        None if largest is None else as_size(OWNER, "largest", largest),
        dtype,
        seed,
        told,
    )


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """The leaves of one shape, ``n`` matrices ``(a, b)`` with ``a <= b``.

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
        for i, view in enumerate(views):
            if view is not None:
                found.setdefault(f"{min(view)}x{max(view)}", []).append(i)
        return {name: cls._alike(layout, views, rows, at) for name, at in found.items()}

    @classmethod
    def _alike(cls, layout: Layout, views: Sequence[Any], rows: Any, at: list[int]):
        """The leaves ``at`` these places, all of one shape; of several dtypes the widest is it."""
        dtype = jnp.result_type(*(layout.dtypes[i] for i in at))
        sides = (
            Layout.of([jax.ShapeDtypeStruct((size,), dtype)] * len(at), per_leaf, rows, OWNER)
            for size in sorted(views[at[0]])
        )
        return cls(tuple(at), tuple(views[i][0] > views[i][1] for i in at), *sides)

    def kept_in(self, state: "MatricesState") -> "_Matrices":
        """The matrices in the dtypes of their state."""
        dtype = state.captured.dtype
        sides = ((self.short, state.short), (self.long, state.long))
        short, long = (one.kept_in(dtype, getattr(side, "rows", ())) for one, side in sides)
        return dataclasses.replace(self, short=short, long=long)

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


class _Looked(NamedTuple):
    """What a step of all matrices of one shape knows before its bases turn; see `_look`."""

    g: jax.Array
    square: jax.Array
    accept: jax.Array
    due: jax.Array
    turning: jax.Array
    broken: jax.Array
    sides: list[tuple[Any, SymmetricCorrection]]
    inner: Any
    key: jax.Array


class _Turned(NamedTuple):
    """The bases of all matrices of one shape, their inner states, and which bases failed."""

    short: Any
    long: Any
    inner: Any
    failed: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixEngine:
    """The parts of one optimizer, and the step they make together."""

    short: Basis | None
    long: Basis | None
    inner: Inner
    update_every: Any
    warmup_steps: Any
    view: View
    rest: optax.GradientTransformationExtraArgs
    complement: Any
    largest: Any
    dtype: Any
    seed: Any
    told: bool

    @full_precision
    def init(self, params: Any) -> ScaleByMatrixLREState:
        return init_on_devices(self._init, params)

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
        views = self._views(layout)
        matrices = _Matrices.of(layout, views, self.dtype)
        # `optax.tree.map_params` inits a tree without leaves, to find out where parameters are: one
        # number stands for all of this, of which nothing has the structure of the parameters.
        known = lambda make: make() if layout.names else jnp.zeros(())
        through = isinstance(self.complement, optax.GradientTransformation)
        return ScaleByMatrixLREState(
            count=jnp.zeros((), jnp.int32),
            matrices=known(
                lambda: {name: deal(begin(kind), layout.mesh) for name, kind in matrices.items()}
            ),
            rest=known(lambda: self.rest.init(_others(layout, views, params))),
            complement=known(
                lambda: self.complement.init(_others(layout, views, params, matrices=True))
            )
            if through
            else (),
            dropped=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
        )

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any):
        return self.step(updates, state, params, extra)[:2]

    @full_precision
    def step(self, updates: Any, state: Any, params: Any, extra: dict[str, Any]):
        """Updates, state, and which leaves were dropped for something that is not finite."""
        updates = undifferentiated(OWNER, updates)
        params, extra = own_arguments(OWNER, updates, params, extra)
        check_kind(OWNER, state, ScaleByMatrixLREState)
        layout = self.layout(updates, state, params)
        if not layout.names:
            return updates, state._replace(count=linalg.tally(state.count)), []
        check_fits(OWNER, state, self.init, (layout.example,), self._known, but="rest")
        if not self.told:  # what nobody reads need not keep a step from being compiled
            extra = {}
        return step_on_devices(self._step, updates, state, params, extra)

    @cached_property
    def _step(self) -> Step:
        return Step(self._update)

    @cached_property
    def _known(self) -> set[Any]:
        return set()

    def layout(self, updates: Any, state: ScaleByMatrixLREState, params: Any) -> Layout:
        """The layout that ``init`` saw: that of the parameters or, without them, of the state."""
        layout = Layout.of(updates if params is None else params, None, self.dtype, OWNER)
        if params is None:
            dtypes = list(layout.dtypes)
            for name, kind in _Matrices.of(layout, self._views(layout), self.dtype).items():
                if name in state.matrices:
                    short = kind.kept_in(state.matrices[name]).short
                    for i in kind.leaves:
                        same = jnp.promote_types(dtypes[i], jnp.float32) == short.dtype
                        stored = short.dtypes[0] if short.dtypes != kind.short.dtypes else None
                        dtypes[i] = stored or (dtypes[i] if same else short.dtype)
            layout = dataclasses.replace(layout, dtypes=tuple(dtypes))
        return layout.on(updates)

    def _update(self, updates: Any, state: Any, params: Any, arrays: Any, **functions: Any):
        layout, extra = self.layout(updates, state, params), arrays | functions
        views = self._views(layout)
        matrices = _Matrices.of(layout, views, self.dtype)
        matrices = {name: kind.kept_in(state.matrices[name]) for name, kind in matrices.items()}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        leaves, rest, dropped, lost = self._others(
            layout, views, updates, state.rest, params, extra
        )

        # All matrices look at their gradients; the bases that are due turn in one loop.
        given = layout.leaves(updates)
        looked = {
            name: self._look(kind, deal(kind.read(given), layout.mesh), state.matrices[name], k)
            for (name, kind), k in zip(
                matrices.items(), jax.random.split(key, max(1, len(matrices))), strict=False
            )
        }
        turned = self._turned(matrices, looked)

        new, apart = {}, {}
        for name, kind in matrices.items():
            step, rest_of_it, new[name], bad = self._finish(
                kind, looked[name], turned[name], state.matrices[name]
            )
            # Taken from their devices all at once: one by one they would go to every device.
            leaves |= kind.write(split_over_devices(step, layout.mesh, (1, 2)))
            if rest_of_it is not None:
                apart |= kind.write(split_over_devices(rest_of_it, layout.mesh, (1, 2)))
            dropped |= dict(zip(kind.leaves, bad, strict=True))
        leaves, beyond = self._beyond(layout, views, leaves, apart, dropped, state, params, extra)
        leaves = [leaves[i] for i in range(len(layout.names))]
        dropped = [dropped[i] for i in range(len(layout.names))]
        new_state = ScaleByMatrixLREState(
            count=linalg.tally(state.count, period=linalg.DRAWS),
            matrices=new,
            rest=rest,
            complement=beyond,
            dropped=linalg.tally(state.dropped, lost),
            key=state.key,
        )
        return layout.unflatten(leaves, updates), new_state, dropped

    def _others(self, layout: Layout, views, updates, old, params, extra):
        """The step of the leaves that are no matrices, judged leaf by leaf.

        Their updates by place, the state, which of them were dropped, and how many.
        """
        if all(view is not None for view in views):
            return {}, old, {}, 0
        at = [i for i, view in enumerate(views) if view is None]
        given, mine = layout.leaves(updates), partial(_others, layout, views)
        sound, _ = _flags({i: jnp.sum(jnp.square(at_least_float32(given[i]))) for i in at})
        clean = [jnp.where(sound[i], x, 0) if i in sound else x for i, x in enumerate(given)]
        step, new = self.rest.update(
            mine(layout.tree(clean)), old, None if params is None else mine(params), **extra
        )
        step = {i: x for i, x in enumerate(layout.leaves(step)) if i in sound}
        # A second moment that overflowed would divide by infinity for ever.
        burst = [
            jnp.where(jnp.isfinite(y), x, 0)
            for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
            if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        size = {i: jnp.max(jnp.abs(x), initial=0) for i, x in step.items()}
        whole = linalg.finite(*burst, jnp.zeros(()))
        size = {i: jnp.where(sound[i], x, jnp.inf) for i, x in size.items()}
        sound, lost = _flags(size, whole)
        on = [sound.get(i, optax.MaskedNode()) for i in range(len(views))]
        state = advance_where_taken(self.rest, layout, on, new, old)
        step = {i: jnp.where(ok, jnp.reshape(step[i], -1), 0) for i, ok in sound.items()}
        return step, state, {i: ~ok for i, ok in sound.items()}, lost

    def _sides(self, kind: _Matrices) -> tuple[tuple[Basis | None, Layout], ...]:
        """The bases of both sides, their ranks cut to what there is, with their layouts."""
        short, long = (
            None if self.largest is not None and size > self.largest else basis
            for basis, size in zip((self.short, self.long), kind.sizes, strict=True)
        )
        return (_cut(short, kind.short), kind.short), (_cut(long, kind.long), kind.long)

    def _views(self, layout: Layout) -> list[tuple[int, int] | None]:
        """How every leaf is seen."""
        return [
            self._seen(name, path, shape)
            for name, path, shape in zip(layout.names, layout.paths, layout.shapes, strict=True)
        ]

    def _seen(self, name: str, path: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
        view = self.view(path, shape)
        check(
            view is None or (len(view) == 2 and math.prod(view) == math.prod(shape) > 0),
            f"{OWNER}: view gives {view} for the leaf {name or 'of the tree'} of shape {shape};"
            " return two sizes with as many entries, or None.",
        )
        if view is None or self.largest is None:
            return view
        pairs = zip((self.short, self.long), sorted(view), strict=True)
        return view if any(b is not None and size <= self.largest for b, size in pairs) else None

    def _look(self, kind: _Matrices, g: jax.Array, old: MatricesState, key: jax.Array) -> "_Looked":
        """What a step of all matrices of one shape, ``(n, a, b)``, knows before its bases turn."""
        square = jnp.sum(g**2, axis=(1, 2))
        accept = jnp.isfinite(square) & (square > 0)
        every: Any = self.update_every
        period: Any = every(old.steps) if callable(every) else every
        due = accept & ((old.since + 1 >= period) | (old.steps == 0))
        sides, turning, broken = [], jnp.zeros_like(due), jnp.zeros_like(due)
        for (basis, layout), state, y in zip(
            self._sides(kind), (old.short, old.long), (jnp.swapaxes(g, 1, 2), g), strict=True
        ):
            known = SymmetricCorrection(
                [x.astype(t) for x, t in zip(y, layout.rows, strict=True)],
                jnp.ones(y.shape[:2], layout.dtype),
                # Without it a full matrix would start as the identity, which rounds gradients away.
                initial=jnp.zeros(layout.n, layout.dtype),
            )
            # A matrix takes every gradient in, and turns now and then.
            if isinstance(basis, FullMatrix):
                state, ok, bad = basis.gather(layout, state, known, due)
                turning, broken = turning | (ok & basis.turning(state)), broken | bad
            elif basis is not None:
                turning = due
            sides.append((state, known))
        return _Looked(g, square, accept, due, turning, broken, sides, old.inner, key)

    def _turned(self, matrices: dict[str, _Matrices], looked: dict[str, "_Looked"]):
        """The bases and inner states of all shapes after those that are due have turned.

        One loop for all: an accelerator has to wait for each, to know whether it runs.
        """
        start = {
            name: _Turned(
                _bare(seen.sides[0][0]),
                _bare(seen.sides[1][0]),
                seen.inner,
                jnp.zeros_like(seen.due),
            )
            for name, seen in looked.items()
        }
        turn = lambda _, now: {
            name: self._turn(kind, looked[name], now[name]) for name, kind in matrices.items()
        }
        if not matrices:
            return start
        if self._always:
            return turn(0, start)
        return now_and_then(_any([x.turning for x in looked.values()]), turn, start)

    @property
    def _always(self) -> bool:
        """Whether it is known before tracing that every step turns a basis."""
        one = lambda n: isinstance(n, numbers.Integral) and n == 1
        bases = [b for b in (self.short, self.long) if b is not None]
        lazy = [isinstance(b, FullMatrix) and not one(b.every) for b in bases]
        return one(self.update_every) and not all(lazy)

    def _turn(self, kind: _Matrices, seen: "_Looked", now: "_Turned") -> "_Turned":
        """One update of both bases; the inner state carried to them, and which ones failed."""
        given, done = (now.short, now.long), []
        for (basis, layout), state, (gathered, known), k in zip(
            self._sides(kind), given, seen.sides, jax.random.split(seen.key), strict=True
        ):
            if basis is None:
                done.append(None)
            elif isinstance(basis, FullMatrix):
                done.append(basis.turn(gathered.matrix, state, seen.due & basis.turning(state)))
            else:
                done.append(basis.absorb(layout, state, known, seen.due, k))
        failed = _any([now.failed, *(each.failed for each in done if each)], axis=0)
        # Where one side fails a full matrix on the other one stays, too.
        keep = lambda a, b: jnp.where(jnp.reshape(failed, (-1, *[1] * (a.ndim - 1))), b, a)
        done = [
            each._replace(
                state=jax.tree.map(keep, each.state, old),
                c=keep(each.c, jnp.eye(each.c.shape[-1], dtype=each.c.dtype)[None]),
            )
            if isinstance(old, FullMatrixState)
            else each
            for old, each in zip(given, done, strict=True)
        ]
        short, long = (
            old if each is None else each.state for old, each in zip(given, done, strict=True)
        )
        changes = tuple(None if each is None else each.c for each in done)
        # A basis may have learned without turning; one that turned takes the inner state along,
        # also where the other side failed.
        moved = seen.due & _any([_moved(c) for c in changes if c is not None], axis=0)
        move = jax.vmap(partial(carry, self.inner))
        return _Turned(short, long, move(changes, moved, now.inner), failed)

    def _finish(self, kind: _Matrices, seen: "_Looked", now: "_Turned", old: MatricesState):
        """The step of all matrices of one shape, what is left of them outside the bases, the state.

        And which of them were dropped for something that is not finite.
        """
        g, failed = seen.g, now.failed | seen.broken
        accept = seen.accept & ~failed
        (short, _), (long, _) = seen.sides
        now = now._replace(
            short=_whole(failed, now.short, short, old.short),
            long=_whole(failed, now.long, long, old.long),
        )

        # The inner parts run on the flattened coordinates.
        warm = old.steps >= self.warmup_steps
        u0 = self._project(kind, now.short, now.long, g)
        # What is left of entries that are zero in truth; a part such as Adam would blow it up.
        noise = 4 * jnp.finfo(u0.dtype).eps * jnp.sqrt(jnp.where(accept, seen.square, 0))
        heard = accept[:, None, None] & (jnp.abs(u0) > noise[:, None, None])
        u0 = jnp.where(heard, u0, 0)
        context = Context(
            jnp.reshape(u0, (len(u0), -1)),
            self._eigenbasis(kind, now.short, now.long),
            seen.due & ~failed,
        )
        u, inside, fine = jax.vmap(partial(step_inside, self.inner))(
            context.g, now.inner, context, accept & warm
        )
        taken = accept & fine

        # Back to the matrices, with what becomes of the part of them outside the bases.
        u, moves = jnp.reshape(u, u0.shape), (taken & warm)[:, None, None]
        back = partial(self._unproject, kind, now.short, now.long)
        if self.complement is None:
            step, apart = back(u), None
        elif isinstance(self.complement, optax.GradientTransformation):
            step, apart = back(u), jnp.where(moves, g - back(u0), 0)
        else:
            gamma, apart = jnp.asarray(self.complement, g.dtype), None
            step = back(u - jnp.where(moves, gamma * u0, 0)) + gamma * jnp.where(moves, g, 0)
        failures = Events(~jnp.isfinite(seen.square), seen.square == 0, failed, accept & ~fine)
        captured = linalg.safe_divide(jnp.sum(u0**2, axis=(1, 2)), seen.square)
        state = MatricesState(
            steps=linalg.tally(old.steps, taken),
            since=jnp.where(seen.due & ~failed, 0, linalg.tally(old.since, taken)),
            short=now.short,
            long=now.long,
            inner=inside,
            events=jax.tree.map(linalg.tally, old.events, failures),
            captured=jnp.where(taken, captured, old.captured),
        )
        return step, apart, state, failures.nonfinite | failures.eigh | failures.inner

    def _beyond(self, layout, views, leaves, apart, dropped, state, params, extra):
        """The leaves with what an optax transformation makes of the part outside the bases."""
        tx, old = self.complement, state.complement
        if not isinstance(tx, optax.GradientTransformation) or not apart:
            return leaves, old
        theirs = partial(_others, layout, views, matrices=True)
        tree = layout.tree(
            [
                jnp.reshape(apart[i], shape) if i in apart else optax.MaskedNode()
                for i, shape in enumerate(layout.shapes)
            ]
        )
        step, new = tx.update(tree, old, None if params is None else theirs(params), **extra)
        sound = {i: ~dropped[i] for i in apart}
        on = [sound.get(i, optax.MaskedNode()) for i in range(len(views))]
        step = layout.leaves(step)
        return leaves | {
            i: leaves[i] + jnp.where(ok, jnp.reshape(step[i], -1), 0) for i, ok in sound.items()
        }, advance_where_taken(tx, layout, on, new, old)

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


def _flags(sizes: dict[int, jax.Array], whole: Any = True) -> tuple[dict[int, jax.Array], Any]:
    """Which numbers are finite, if ``whole``, and how many are not.

    Found out once: XLA would do it again for each operation that asks.
    """
    flags = jnp.isfinite(jnp.stack(list(sizes.values()))) & whole
    flags = jax.lax.optimization_barrier(flags)
    return {i: flags[k] for k, i in enumerate(sizes)}, jnp.sum(~flags)


def _bare(state: Any) -> Any:
    """A side's state as a loop carries it.

    XLA would decompose a matrix outside of the loop that leaves it as it is.
    """
    return state._replace(matrix=()) if isinstance(state, FullMatrixState) else state


def _whole(failed: jax.Array, new: Any, gathered: Any, old: Any) -> Any:
    """A side's state with its matrix, which where it failed, ``(n,)``, took no gradient in."""
    if not isinstance(new, FullMatrixState):
        return new
    return new._replace(
        matrix=jnp.where(failed[:, None, None], old.matrix, gathered.matrix),
        updates=jnp.where(failed, old.updates, new.updates),
    )


def _moved(c: jax.Array) -> jax.Array:
    """Whether a change of basis, ``(n, r, r)``, is any, ``(n,)``."""
    return jnp.any(c != jnp.eye(c.shape[-1], dtype=c.dtype)[None], axis=(1, 2))


def _any(flags: Sequence[jax.Array], axis: int | None = None) -> jax.Array:
    """Whether any of several arrays of booleans is true."""
    if axis is None:
        return jnp.any(jnp.concatenate(list(flags)))
    return jnp.any(jnp.stack(list(flags)), axis=axis)


def _others(layout: Layout, views: Sequence[Any], tree: Any, matrices: bool = False) -> Any:
    """The tree of the leaves that are no matrices, or of those that are, in float32 at least."""
    return layout.tree(
        [
            at_least_float32(x) if (view is not None) == matrices else optax.MaskedNode()
            for x, view in zip(layout.leaves(tree), views, strict=True)
        ]
    )


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
