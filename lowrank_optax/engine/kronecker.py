"""Momentum whitened along both sides of every matrix, and made orthogonal if asked for."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import as_size, check, check_decay, check_least
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.loops import now_and_then
from lowrank_optax._core.precision import callers_precision
from lowrank_optax._core.types import Eigenbasis, Inner
from lowrank_optax.engine.leaves import MatricesEngine
from lowrank_optax.engine.matrix_space import Sides
from lowrank_optax.engine.orthogonal import polar
from lowrank_optax.engine.space import Given, GroupState, Seen, Turned, begin
from lowrank_optax.engine.spikes import Side, Split, joined, sizes, split, start, turned
from lowrank_optax.engine.stacks import Matrices
from lowrank_optax.engine.views import View

OWNER = "scale_by_kronecker"

MANY = 64
"""Directions that a side keeps which is too long to keep all."""

SETTLING = 10
"""First steps at each of which the sides turn, from axes that are nobody's."""


def scale_by_kronecker(
    short: int | None,
    long: int | None,
    inner: Inner | Sequence[Inner],
    *,
    b1: float = 0.95,
    beta: float = 0.95,
    nesterov: bool = True,
    crosswise: bool = True,
    orthogonal: float | jax.Array | None = None,
    update_every: int = 1,
    warmup_steps: int = 1,
    largest: int | None = None,
    aspect: float | None = None,
    groups: Callable[[Any], Hashable] | None = None,
    view: View | None = None,
    rest: optax.GradientTransformation | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on the momentum of every matrix, in leading eigenbases of both sides.

    With the gradient ``G`` seen so that its columns are not longer than its rows, ``(a, b)``, its
    momentum ``M``, and of each side a few directions and one eigenvalue for all others (*spike and
    flat*):

    .. math:: \begin{aligned}
       M &\leftarrow b_1 M + (1-b_1) G, &
       L &\leftarrow \beta L + (1-\beta)\,\tfrac1b\,G R^{-1} G^T, &
       R &\leftarrow \beta R + (1-\beta)\,\tfrac1a\,G^T L^{-1} G \\
       L &\approx Q_L \Lambda_L Q_L^T + \lambda_L (I - Q_L Q_L^T), &
       U &= Q_L^T M\,Q_R, & \Delta &= Q_L\,\mathrm{inner}(U)\,Q_R^T + \dots
       \end{aligned}

    Here ``L`` belongs to the shorter side and ``R`` to the longer one. What a side does not hold is
    one more coordinate: for every direction of one side, the root mean square of the momentum
    outside of the other. That part is multiplied as its coordinate is. So nothing of a gradient is
    dropped, and without any directions this is Muon.

    The directions follow by matrix products alone: one simultaneous Jacobi rotation among
    themselves, and one step of orthogonal iteration towards what is outside. No step factorises.

    =========== ============== ============================== ===========================
    short, long orthogonal     inner                          is
    =========== ============== ============================== ===========================
    0, 0        a number       any                            Muon (`muon`)
    None, None  a number       root mean square               `soap_muon`
    None, None  ``None``       root mean square               `kl_soap`
    None, None  ``None``       LInvSqrt                       `kl_shampoo`
    =========== ============== ============================== ===========================

    Like every ``scale_by_...`` of optax it returns a direction of ascent. A matrix whose gradient
    is zero or not finite gets a zero update, its state stays as it was, and the step is counted in
    its ``events``; others go on.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = optax.chain(
      ...     lro.scale_by_kronecker(2, 2, lro.inner.LInvSqrt()),
      ...     optax.scale_by_schedule(optax.linear_schedule(-0.3, 0.0, 150)))
      >>> target = jnp.outer(jnp.arange(4.0), jnp.ones(6))
      >>> loss = lambda p: jnp.sum((p["w"] - target) ** 2) + p["b"] ** 2
      >>> p = {"w": jnp.zeros((4, 6)), "b": jnp.ones(())}; state = tx.init(p)
      >>> update = jax.jit(tx.update)
      >>> for _ in range(150):
      ...     updates, state = update(jax.grad(loss)(p), state)
      ...     p = optax.apply_updates(p, updates)
      >>> bool(loss(p) < 1)                     # 85 at first
      True

    Args:
      short: number of directions of the shorter side, cut to ``a``; ``None`` for all, 0 for none.
      long: number of directions of the longer side, cut to ``b``.
      inner: what runs inside: one part or a sequence of them. A matrix has ``(r + 1)(s + 1)``
        coordinates at most. Their states stay as they are when the sides turn.
      b1: decay of the momentum, in [0, 1).
      beta: decay of both sides' averages from one turn to the next, in [0, 1).
      nesterov: whether the momentum looks one step ahead.
      crosswise: whether each side sees the gradient whitened by the other one (KL-Shampoo), or as
        it is (Shampoo).
      orthogonal: root mean square of updates made orthogonal; ``None`` to leave them as they are.
      update_every: number of steps from one turn of a matrix's sides to the next. Only the
        gradients of those steps are seen. Matrices take turns, so that no step has to turn them
        all, but for the first ten.
      warmup_steps: number of first steps that build the sides and return zeros for the matrices.
      largest: sides longer than this keep 64 directions at most; ``None`` for no limit.
      aspect: longer sides of more than this times the shorter one keep no directions; ``None`` for
        no limit.
      groups: a function of a leaf's path to a label; matrices of one shape that share a label
        share their sides and are one problem. By default every matrix has its own.
      view: a function of a leaf's path and shape to the `MatrixAxes` it is seen by, or ``None`` to
        leave it to ``rest``; by default `default_matrix_view`.
      rest: optax transformation for the leaves that are not seen as matrices, by default
        `optax.scale_by_adam`. It sees them in float32 at least.
      seed: seed of the first directions.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state `ScaleByMatrixLREState`; extra
      arguments go to ``rest``.

    Raises:
      ValueError: for arguments out of range, parts that hold matrices over the coordinates, leaves
        that are not floating point, and views that are not axes of the leaf.

    Cost: with ``r`` and ``s`` directions a step ``4 r a b + 4 r s b`` flops a matrix, a turn as
    much again and ``14 (r³ + s³)``, for a side that is not complete ``12 r² a`` in place of some of
    that; `orthogonalize` in addition. State: ``a b + r a + s b + r² + s²`` numbers and those of the
    inner parts. Matrices of one shape are treated together.

    Source: Lin et al., "Understanding and improving Shampoo and SOAP via Kullback-Leibler
    minimization", 2025 (arXiv 2509.03378); the spike and the flat rest: "Pro-KLShampoo", 2026
    (arXiv 2605.06316); simultaneous rotations: Jacobi, 1846.
    """
    return KroneckerEngine(
        short=short,
        long=long,
        inner=inner,
        b1=b1,
        beta=beta,
        nesterov=nesterov,
        crosswise=crosswise,
        orthogonal=orthogonal,
        update_every=update_every,
        warmup_steps=warmup_steps,
        largest=largest,
        aspect=aspect,
        groups=groups,
        view=view,
        rest=rest,
        seed=seed,
    ).transformation


class KroneckerParts(NamedTuple):
    """What the step of a matrix is made of: see `scale_by_kronecker`."""

    short: int | None
    long: int | None
    inner: Inner
    b1: Any
    beta: Any
    nesterov: bool
    crosswise: bool
    update_every: int
    largest: int | None
    aspect: float | None
    dtype: Any = None

    def ranks(self, a: int, b: int) -> tuple[int, int]:
        """The number of directions of both sides."""
        return directions(self.short, self.long, self.largest, self.aspect, a, b)


def directions(
    short: int | None, long: int | None, largest: int | None, aspect: float | None, a: int, b: int
) -> tuple[int, int]:
    """How many directions both sides of a matrix keep: see `scale_by_kronecker`."""
    bound = math.inf if largest is None else largest
    most = lambda d: d if d <= bound else MANY
    kept = lambda rank, d: min(d if rank is None else rank, d, most(d))
    narrow = aspect is None or b <= aspect * a
    return kept(short, a), kept(long, b) if narrow else 0


@dataclasses.dataclass(frozen=True, eq=False)
class KroneckerSpace(Matrices):
    """Matrices whose momentum is whitened along both sides."""

    parts: KroneckerParts
    offset: int = 0
    """The step, of ``update_every``, in which the first block turns."""

    def kept_in(self, state: GroupState) -> "KroneckerSpace":
        dtype = state.metrics.captured.dtype
        columns, rows = (each.kept_in(dtype, ()) for each in (self.columns, self.rows))
        return dataclasses.replace(self, columns=columns, rows=rows)

    def init(self, keys: Sequence[jax.Array]) -> GroupState:
        """The state before the first step."""
        n, m, a, b = self.shape
        ranks = self.parts.ranks(a, b)
        sides = Sides(
            *(
                start(n, d, rank, key, self.dtype)
                for d, rank, key in zip((a, b), ranks, keys, strict=True)
            )
        )
        (_, _, r), (_, _, s) = (side.directions.shape for side in sides)
        grid = (r + (not sides.short.complete)) * (s + (not sides.long.complete))
        inner = self.parts.inner.init(m * grid, self.dtype)
        momentum = jnp.zeros(self.shape, self.dtype)
        return begin(self.n, self.dtype, momentum, sides, inner)

    # The phases ---------------------------------------------------------------------------------

    @property
    def block(self) -> int:
        """How many groups turn in one step, so that all do in ``update_every`` steps."""
        return -(-self.n // self.parts.update_every)

    def look(self, g: jax.Array, square, accept, due, old: GroupState, given: Given) -> Seen:
        """Groups turn in blocks, one block a step; the first steps turn all of them."""
        clock = jnp.max(old.steps)
        now = (clock + self.offset) % self.parts.update_every
        mine = jnp.arange(self.n) // self.block == now
        due = accept & (mine | (clock < SETTLING))
        return Seen(g, square, accept, due, due, jnp.zeros_like(due), (old.steps, clock, now))

    def still(self, seen: Seen, old: GroupState) -> Turned:
        zeros = jnp.zeros(self.n, self.dtype)
        return Turned(old.basis, old.curvature, old.inner, jnp.zeros_like(seen.due), zeros)

    def absorb(self, seen: Seen, now: Turned) -> tuple[Turned, None]:
        """A loop over the blocks that are due, mostly one: no others are touched."""
        steps, clock, turn = seen.measured
        settling, size = clock < SETTLING, self.block
        blocks = -(-self.n // size)

        def one(i, carry):
            number = jnp.where(settling, i, turn)
            first = jnp.minimum(number * size, self.n - size)
            cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
            # The last block may overlap the one before it, whose groups are not its own.
            mine = cut(seen.due) & ((first + jnp.arange(size)) // size == number)
            mine &= settling | (i == 0)  # under `jax.vmap` others may ask for more
            old = jax.tree.map(cut, carry)
            new = self._turned(old, cut(seen.g), cut(seen.square), cut(steps) == 0, mine)
            put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, 0)
            return jax.tree.map(put, carry, new)

        times = jnp.where(settling, blocks, jnp.any(seen.due))
        sides, failed, change = now_and_then(times, one, (now.basis, now.failed, now.drift))
        return now._replace(basis=sides, failed=failed, drift=change), None

    def _turned(self, old, g: jax.Array, square: jax.Array, first: jax.Array, due: jax.Array):
        """Sides, failures and changes of some groups after those that are ``due`` turned."""
        sides, failed, change = old
        _, m, a, b = self.shape
        g = jnp.where(self.each(due), g, 0)
        # Before anything is known both sides are isotropic, and their product has the right size.
        level = jnp.sqrt(jnp.where(first & due, square / (m * a * b), 0))
        short, long = (_isotropic(side, level, first) for side in sides)
        decay = jnp.where(first, 0, jnp.asarray(self.parts.beta, self.dtype))
        new = Sides(*turned(short, long, split(short, long, g), decay, self.parts.crosswise))
        whole = [jnp.all(jnp.isfinite(x), axis=(1, 2)) for each in new for x in each[:2]]
        whole = jnp.all(jnp.stack(whole), axis=0)
        take = due & whole
        pick = lambda x, y: jnp.where(jnp.reshape(take, (-1, *[1] * (x.ndim - 1))), x, y)
        new = jax.tree.map(pick, new, sides)
        moved = jnp.where(take & ~first, _change(sides, new), change)
        return new, failed | (due & ~whole), moved

    def settle(self, seen: Seen, now: Turned, old: GroupState, again: jax.Array) -> Turned:
        """The momentum, which took the gradient in where nothing failed."""
        b1 = jnp.asarray(self.parts.b1, self.dtype)
        on = self.each(seen.accept & ~now.failed)
        momentum = jnp.where(on, b1 * old.curvature + (1 - b1) * seen.g, old.curvature)
        return now._replace(curvature=momentum)

    def follow(self, seen: Seen, now: Turned) -> tuple[Split, jax.Array]:
        b1, steps = jnp.asarray(self.parts.b1, self.dtype), seen.measured[0] + 1
        x, ahead = now.curvature, steps
        if self.parts.nesterov:
            clean = jnp.where(self.each(seen.accept), seen.g, 0)
            x, ahead = b1 * x + (1 - b1) * clean, steps + 1
        x = x / self.each(1 - b1 ** ahead.astype(self.dtype))
        return split(now.basis.short, now.basis.long, x), self.square(x)

    def project(self, basis: Sides, g: Split) -> jax.Array:
        """Coordinates, 0 where they cannot be told from rounding."""
        u = sizes(basis.short, basis.long, g)
        square = jnp.sum(u**2, axis=(1, 2, 3), keepdims=True)
        u = jnp.where(jnp.abs(u) > 4 * jnp.finfo(u.dtype).eps * jnp.sqrt(square), u, 0)
        return jnp.reshape(u, (self.n, -1))

    def joined(self, basis: Sides, g: Split, u0: jax.Array, u: jax.Array) -> jax.Array:
        """The step of the coordinates ``u``, which were ``u0``, ``(n, m, a, b)``."""
        n, m = self.shape[:2]
        r, s = (side.directions.shape[2] + (not side.complete) for side in basis)
        grid = lambda x: jnp.reshape(x, (n, m, r, s))
        return joined(basis.short, basis.long, g, grid(u0), grid(u))

    def shares(self, u0: jax.Array, u: jax.Array, square: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The share that a direction of either side holds, and the cosine of the coordinates."""
        n, m, a, b = self.shape
        r, s = self.parts.ranks(a, b)
        corner = jnp.zeros(n, u0.dtype)
        if r < a and s < b:
            last = jnp.reshape(u0, (n, m, -1))[:, :, -1]
            corner = jnp.sum(last**2, axis=1) * ((a - r) * (b - s))
        size = jnp.linalg.norm(u, axis=1) * jnp.linalg.norm(u0, axis=1)
        inside = linalg.safe_divide(jnp.maximum(square - corner, 0), square)
        return inside, linalg.safe_divide(jnp.sum(u * u0, axis=1), size)

    def eigenbasis(self, basis: Sides) -> Eigenbasis:
        """Products of both sides' eigenvalues."""
        one, two = (_all(side) for side in basis)
        lam = jnp.reshape(one[:, :, None] * two[:, None], (self.n, -1))
        lam = jnp.tile(lam, (1, self.shape[1]))
        return Eigenbasis(lam, jnp.ones(lam.shape, bool))


def _isotropic(side: Side, level: jax.Array, first: jax.Array) -> Side:
    """The side; before the ``first`` step with ``level``, ``(n,)``, for all eigenvalues."""
    eye = jnp.eye(side.moments.shape[1], dtype=level.dtype)[None]
    moments = jnp.where(first[:, None, None], level[:, None, None] * eye, side.moments)
    return side._replace(moments=moments, rest=jnp.where(first, level, side.rest))


def _all(side: Side) -> jax.Array:
    """Eigenvalues of all coordinates of a side, ``(n, r + 1)``, of a complete one ``(n, r)``."""
    along, outside = side.eigenvalues
    return along if side.complete else jnp.concatenate([along, outside], axis=1)


def _change(old: Sides, new: Sides) -> jax.Array:
    """The share of the directions that is not where it was, ``(n,)``: the mean of ``1 - C_ii²``."""
    pairs = [(x.directions, y.directions) for x, y in zip(old, new, strict=True)]
    kept = jnp.concatenate([jnp.sum(x * y, axis=1) ** 2 for x, y in pairs], axis=1)
    return jnp.sum(1 - kept, axis=1) / max(kept.shape[1], 1)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KroneckerEngine(MatricesEngine):
    """The engine of `scale_by_kronecker`."""

    owner: ClassVar[str] = OWNER
    space: ClassVar[type[Matrices]] = KroneckerSpace

    short: int | None
    long: int | None
    b1: Any = 0.95
    beta: Any = 0.95
    nesterov: bool = True
    crosswise: bool = True
    orthogonal: Any = None
    largest: int | None = None
    aspect: float | None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "update_every", as_size(OWNER, "update_every", self.update_every))
        for name, least in (("short", 0), ("long", 0), ("largest", 1)):
            size = getattr(self, name)
            if size is not None:
                object.__setattr__(self, name, as_size(OWNER, name, size, least))
        if self.aspect is not None:
            check_least(OWNER, "aspect", self.aspect, 1)
        check_decay(OWNER, "b1", self.b1)
        check_decay(OWNER, "beta", self.beta)
        if self.orthogonal is not None:
            check_least(OWNER, "orthogonal", self.orthogonal, strict=True)
        laws = jax.tree.leaves(self.inner.laws, is_leaf=lambda x: hasattr(x, "axes"))
        check(
            all(law.axes < 2 for law in laws),
            f"{OWNER}: {self.inner} holds matrices over all coordinates of a matrix; pass "
            "elementwise parts such as lro.inner.LInvSqrt().",
        )

    @property
    def parts(self) -> KroneckerParts:
        return KroneckerParts(
            self.short,
            self.long,
            self.inner,
            self.b1,
            self.beta,
            self.nesterov,
            self.crosswise,
            self.update_every,
            self.largest,
            self.aspect,
        )

    def spaces(self, layout: Layout, state: Any) -> dict[str, Any]:
        spaces: dict[str, Any] = super().spaces(layout, state)
        # Shapes take turns, too.
        return {
            name: dataclasses.replace(space, offset=i)
            for i, (name, space) in enumerate(spaces.items())
        }

    def _absorb(self, spaces, seen, states) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every space has a loop of its own, over the blocks that turn."""
        new = {
            name: space.absorb(seen[name], space.still(seen[name], states[name]))[0]
            for name, space in spaces.items()
        }
        return new, {}

    def _fits(self, a: int, b: int) -> bool:
        return True

    def _unproject(self, space: Any, now: Turned, g: Any, u: Any, u0: Any, active: jax.Array):
        moves = space.joined(now.basis, g, jnp.where(active[:, None], u0, 0), u)
        if self.orthogonal is None:
            return moves, None
        factor, sound = callers_precision(polar)(moves)
        size = jnp.asarray(self.orthogonal, moves.dtype) * moves.shape[3] ** 0.5
        return jnp.where(sound[:, :, None, None], size * factor, 0), None
