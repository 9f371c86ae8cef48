"""Nonlinear least squares, to the precision that the parameters' dtype allows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import as_size, check, check_decay, check_least, require
from lowrank_optax._core.derivatives import undifferentiated
from lowrank_optax._core.entry import check_one_replica, own_arguments
from lowrank_optax._core.functions import flat_residuals
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.precision import full_precision
from lowrank_optax.curvature._curvature import flat, need_params
from lowrank_optax.curvature.examples import jacobian
from lowrank_optax.least_squares._jacobian import SMALL, Solver, by_products, dense
from lowrank_optax.least_squares._search import Around, best
from lowrank_optax.least_squares._vector import as_tree, check_rows, given_rows

OWNER = "levenberg_marquardt"

WIDE = 4096
"""The shorter side up to which the Jacobian is decomposed as one array."""

LARGE = 2**25
"""The number of entries up to which the Jacobian is one array: 256 MB in float64."""

KEPT = 48
"""Number of directions that are kept where nothing else is asked for."""


class LevenbergMarquardtState(NamedTuple):
    """State of `levenberg_marquardt`.

    Attributes:
      count: number of calls of ``update``.
      damping: ``mu`` of the last step, in units of the squared singular values; 0 before it.
      relative: ``mu`` of the last step that was tried relative to the parameters' sizes; 0 before
        it.
      step: the last update, ``(d,)``; 0 if it was refused.
      norms: the columns' norms as ``scaling`` remembers them, ``(d,)``; ``()`` without it.
      rows: the leading right singular vectors of the last Jacobian, ``(rank, d)``, from which the
        next step by products starts; ``()`` where the Jacobian is one array.
      products: number of products with the Jacobian or its transpose in the last step; 0 says that
        it was one array.
      loss: the loss ``½ ‖r‖²`` after the last update.
      refused: number of steps whose trials, up to the largest ``mu`` that changes the parameters,
        all raised the loss by more than rounding; the update was zero.
      nonfinite: number of steps whose residuals, Jacobian or gradient were not finite; the update
        was zero and everything else stayed as it was.
    """

    count: jax.Array
    damping: jax.Array
    relative: jax.Array
    step: jax.Array
    norms: Any
    rows: Any
    products: jax.Array
    loss: jax.Array
    refused: jax.Array
    nonfinite: jax.Array


def levenberg_marquardt(
    *,
    damping: float = 1e-3,
    trials: int | None = None,
    spread: float = 4.0,
    momenta: tuple[float, ...] = (0.0, 0.5, 0.9),
    order: int | None = None,
    scaling: float | None = None,
    chunk: int | None = None,
    rank: int | None = None,
    has_aux: bool = False,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gauss-Newton in the dual whose damping finds itself, along curves that follow the residuals.

    With residuals ``r`` and their Jacobian ``J = U diag(s) V^T``, every damping ``mu`` costs small
    products alone,

    .. math:: J_\mu^+ = V \mathrm{diag}\!\Bigl(\frac{s}{s^2 + \mu}\Bigr) U^T
              = (J^T J + \mu I)^{-1} J^T = J^T (J J^T + \mu I)^{-1}

    so that several are tried at once, each with every momentum ``b`` along the last update ``q``.
    A step is the Taylor polynomial at ``t = 1`` of the curve on which ``r`` falls in a straight
    line, up to every ``order``. The first order is Levenberg's step, the second adds the geodesic
    acceleration. Terms longer than the first are cut to its length:

    .. math:: x(t) = x + \sum_n c_n \frac{t^n}{n!},\quad c_1 = b q - J_\mu^+ (r + b J q),\quad
              c_n = -J_\mu^+\, \frac{d^n}{dt^n}\, r\Bigl(x + \sum_{i<n} c_i \frac{t^i}{i!}\Bigr)

    The trial with the lowest loss is taken. The dampings are powers of ``spread`` around the last
    ``mu``. If all of them raise the loss, the same step tries larger ones with the same
    decomposition, until one lowers the loss or no longer changes the parameters. In that last case
    the update is zero and the step is counted as refused. There is no learning rate: updates are
    complete.

    One ``mu`` for all parameters presumes that they are of similar size. A number for ``scaling``
    lifts that: the diagonal of ``J^T J`` takes the place of ``I``, and fits do not depend on units,

    .. math:: (J^T J + \mu D^2)^{-1} J^T,\quad D_j = \max(\text{scaling}\, D_j, \|J_j\|)

    The default, ``D = I``, serves networks best, whose weights are of similar size. Fits of curves,
    with fewer parameters than residuals and at most 256 of them, get two guards. A step that lowers
    the loss by less than a twentieth is tried once more with ``D_j = 1/|x_j|``, and the better one
    is taken. A curve whose second term is longer than 0.75 of the first is not followed, because
    that is how parameters start to run off to infinity. The default fits NIST's 27 problems from
    both starts.

    How a step is computed follows from the sizes:

    * Up to 256 on the shorter side of ``J``: its singular values, and every trial.
    * Up to 4096 on it and 2^25 entries: the eigenvalues of ``J J^T`` or ``J^T J``, while ``mu`` is
      above 16 ``eps`` of the largest; below, where these have lost what a step needs, the singular
      values by way of a QR decomposition. Straight lines are tried for every ``mu`` and ``b``,
      curves for the damping of the best line and the three below it.
    * Above: products ``J v`` and ``J^T w`` alone. The step is the best one in a space of ``2 rank +
      1`` directions: ``rank`` right singular vectors of the last step's Jacobian in its space,
      which the state keeps, the last update, and ``rank`` directions of the bidiagonalisation of
      Golub and Kahan that LSMR runs, from the gradient on. The space does not depend on ``mu``, so
      that all trials come from one small decomposition, as above. ``state.products`` is the number
      of products then, and 0 where ``J`` was one array.

    ``update`` takes the parameters and ``residuals_fn`` (params -> residuals), which must be
    differentiable forwards ``order`` times. The gradient that it is given is only checked to be
    finite. Residuals are an array or a tree of arrays of any shape; a complex one counts as its
    real and its imaginary part. A tuple is such a tree, unless ``has_aux`` says that its second
    part is something else. Where residuals do not share examples, ``per_example_grads`` saves the
    ``k`` backward passes: a tree of ``(k, *leaf.shape)``, such as ``jax.vmap(jax.grad(residual),
    (None, 0))`` or `lowrank_optax.least_squares.at_points` gives. Call ``update`` under `jax.jit`;
    outside, every call takes some hundred times as long.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> residuals = lambda x: jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])   # Rosenbrock
      >>> tx = lro.levenberg_marquardt()
      >>> x = jnp.array([-1.2, 1.0]); state = tx.init(x)
      >>> grad = jax.grad(lambda x: jnp.sum(residuals(x) ** 2) / 2)
      >>> step = jax.jit(lambda x, state: tx.update(grad(x), state, x, residuals_fn=residuals))
      >>> for _ in range(15):
      ...     updates, state = step(x, state)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(jnp.max(jnp.abs(x - 1)) < 1e-5)
      True

    Args:
      damping: the first ``mu``, relative to the largest squared singular value, 1e-3 by default.
      trials: number of values of ``mu`` in a step, 6 by default.
      spread: ratio of one value of ``mu`` to the next, above 1, 4 by default.
      momenta: values of ``b``, in [0, 1], each of which multiplies the trials; 0, 0.5 and 0.9 by
        default, ``(0.0,)`` for none.
      order: number of terms of the curve, 3 by default; the cost doubles from one term to the next.
      scaling: the share of the columns' norms that is remembered from one step to the next, in [0,
        1]: 0 for the norms of the step alone (Marquardt), 1 for the largest so far (Moré);
        ``None``, the default, for ``D = I`` with the guards above.
      chunk: number of residuals that are pulled back at a time, which bounds the memory; ``None``,
        the default, for all. Of no use with products alone.
      rank: number of directions that are kept from one step by products to the next, and of those
        that are added in it; 0 for one array whatever the size; ``None``, the default, chooses by
        the sizes, and 48 directions.
      has_aux: whether ``residuals_fn`` returns ``(residuals, aux)``, of which ``aux`` is left
        alone; ``False`` by default.
      axis_name: axes of `jax.pmap` or `jax.shard_map` over which the devices have residuals of
        their own. With one array they are gathered, with their gradients; with products alone only
        sums over them are exchanged. Every device takes the same step.
        ``()`` says that every device goes its own way; ``None``, the default, that there is one
        device.

    Returns:
      An optax transformation whose state is a `LevenbergMarquardtState`.

    Raises:
      ValueError: for values out of range; for ``trials``, ``order``, ``chunk`` or ``rank`` that is
        traced (to `optax.inject_hyperparams` pass ``static_args=("trials", "order")``); by
        ``update`` without params or ``residuals_fn``, for residuals that are not floating-point or
        complex, and for ``per_example_grads`` of other shapes.

    Cost: with ``m = min(k, d)`` and one array, memory ``2 k d`` in a step and ``d`` between steps,
      ``2 d`` with ``scaling``; ``k`` backward passes, ``k d m + 9 m³`` flops while the eigenvalues
      serve and ``6 k d m + 20 m³`` for singular values, and for every trial the residuals ``order``
      times and their derivatives along a line, up to that order. A second try decomposes twice.
      With products alone, memory ``(2 rank + 1) (k + d)`` in a step and ``rank d`` between steps;
      ``2 rank + 3`` products ``J v`` and ``rank + 1`` products ``J^T w``, ``10 rank² (k + d)``
      flops beside them.

    Source: Levenberg, 1944, and Marquardt, 1963; Moré, "The Levenberg-Marquardt algorithm:
    implementation and theory", 1978, for the norms' maximum; acceleration and its bound are those
    of Transtrum and Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear
    least-squares minimization", 2012; the momentum that of Goldshlager, Abrahamsen and Lin, "A
    Kaczmarz-inspired approach to accelerate the optimization of neural network wavefunctions",
    2024. One Krylov space for all dampings, kept in part from step to step: Lin, O'Malley and
    Vesselinov, "A computationally efficient parallel Levenberg-Marquardt algorithm for highly
    parameterized inverse model analyses", 2016; the process is that of Fong and Saunders, "LSMR: An
    iterative algorithm for sparse least-squares problems", 2011.
    """
    check_least(OWNER, "damping", damping, strict=True)
    # None by default: `optax.inject_hyperparams` traces default numbers.
    trials = 6 if trials is None else as_size(OWNER, "trials", trials)
    order = 3 if order is None else as_size(OWNER, "order", order)
    check_least(OWNER, "spread", spread, 1.0, strict=True)
    check(len(momenta) > 0, f"{OWNER}: momenta is empty; pass (0.0,) for none.")
    for b in momenta:
        check_decay(OWNER, "momenta", b, closed=True)
    if scaling is not None:
        check_decay(OWNER, "scaling", scaling, closed=True)
    if chunk is not None:
        chunk = as_size(OWNER, "chunk", chunk)

    if rank is not None:
        rank = as_size(OWNER, "rank", rank, 0)
    options = _Options(
        damping, trials, spread, tuple(momenta), order, scaling, chunk, rank, has_aux, axis_name
    )
    return optax.GradientTransformationExtraArgs(
        partial(_init, options), full_precision(partial(_update, options))
    )


class _Options(NamedTuple):
    """The arguments of `levenberg_marquardt`, checked and with their defaults."""

    damping: float
    trials: int
    spread: float
    momenta: tuple[float, ...]
    order: int
    scaling: float | None
    chunk: int | None
    rank: int | None
    has_aux: bool
    axis_name: str | Sequence[str] | None

    def kept(self, d: int) -> int:
        """Number of rows in the state for ``d`` parameters."""
        return min(d, (KEPT if d > WIDE else 0) if self.rank is None else self.rank)

    def one_array(self, k: int, d: int, given: bool) -> bool:
        """Whether the Jacobian ``(k, d)`` is one array that is decomposed."""
        if self.rank is not None:
            return self.rank == 0
        return min(k, d) <= WIDE and (given or k * d <= LARGE)


def _init(options: _Options, params: Any) -> LevenbergMarquardtState:
    layout = Layout.of(params, None, owner=OWNER)
    d = sum(layout.sizes)
    zero = lambda: jnp.zeros((), jnp.int32)
    real = lambda *shape: jnp.zeros(shape, layout.dtype)
    kept = options.kept(d)
    return LevenbergMarquardtState(
        count=zero(),
        damping=real(),
        relative=real(),
        step=real(d),
        norms=() if options.scaling is None else real(d),
        rows=real(kept, d) if kept else (),
        products=zero(),
        loss=real(),
        refused=zero(),
        nonfinite=zero(),
    )


def _update(options: _Options, updates: Any, state: Any, params: Any = None, **extra: Any):
    updates = undifferentiated(OWNER, updates)
    params, extra = own_arguments(OWNER, updates, params, extra)
    if options.axis_name is None:
        check_one_replica(OWNER, extra)
    params = need_params(OWNER, params)
    fn = require(OWNER, extra, "residuals_fn", "params -> residuals (k,)")
    if options.has_aux:
        fn = _without_aux(fn)
    fn = flat_residuals(OWNER, "residuals_fn", fn)
    layout = Layout.of(params, None, owner=OWNER)

    def own(p: jax.Array) -> jax.Array:
        """At the parameters as they will be after the update ``p``, rounding included."""
        return fn(optax.apply_updates(params, as_tree(layout, p))).astype(layout.dtype)

    zero = jnp.zeros_like(state.step)
    given = extra.get("per_example_grads")
    shards = jax.lax.psum(1, options.axis_name) if options.axis_name else 1
    k = jax.eval_shape(own, zero).size * shards
    if not k or not zero.size:  # nothing to fit, or nothing to fit it with
        here = jnp.sum(own(zero) ** 2) / 2
        counted = state._replace(count=linalg.tally(state.count), loss=here)
        return as_tree(layout, zero, updates), counted
    x = jnp.concatenate(flat(layout, params))
    sources = jax.tree.leaves(updates)
    if options.one_array(k, zero.size, given is not None):
        j = None if given is None else given_rows(layout, given)
        parts = _whole(options, own, j, state, x, sources)
    else:
        parts = _by_products(options, own, state, x, sources)
    around, norms, finish = parts
    found, other, chosen = best(options, around, state, x, norms)
    rows, products = finish()

    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(around.sound, a, b), new, old)
    return as_tree(layout, chosen.step, updates), LevenbergMarquardtState(
        count=linalg.tally(state.count),
        damping=keep(found.mu, state.damping),
        relative=keep(other.mu, state.relative),
        step=keep(chosen.step, state.step),
        norms=keep(norms, state.norms),
        rows=keep(rows, state.rows),
        products=keep(products, state.products),
        loss=keep(chosen.loss, state.loss),
        refused=linalg.tally(state.refused, around.sound & ~chosen.better),
        nonfinite=linalg.tally(state.nonfinite, ~around.sound),
    )


Parts = tuple[Around, Any, Callable[[], tuple[Any, jax.Array]]]
"""What a search needs, the columns' norms, and what gives the new rows and number of products."""


def _whole(options: _Options, own: Any, j: Any, state: Any, x: jax.Array, sources: Any) -> Parts:
    """With the Jacobian as one array, gathered from all devices."""
    axes = options.axis_name
    gather = lambda x: jax.lax.all_gather(x, axes, tiled=True) if axes else x
    residuals = lambda p: gather(own(p))
    zero = jnp.zeros_like(x)
    r = residuals(zero)
    here = jnp.sum(r**2) / 2
    j = gather(jacobian(own, zero, options.chunk)[0] if j is None else j)
    check_rows(OWNER, j, (r.size, zero.size))
    sound = linalg.finite(r, j, *map(jnp.asarray, sources))
    j = jnp.where(sound, j, 0)
    norms = state.norms
    if options.scaling is not None:
        norms = jnp.maximum(options.scaling * norms, jnp.linalg.norm(j, axis=0))
    small = min(j.shape) <= SMALL
    around = Around(
        residuals=residuals,
        solver=lambda units, finest: dense(j * units[None], finest),
        total=lambda x: x,
        r=r,
        pushed=j @ state.step,
        last=state.step,
        here=here,
        noise=_noise(here, jnp.linalg.norm(r[:, None] * j * x[None])),
        sound=sound,
        # On a network no weight means anything by itself.
        fewer=small and j.shape[1] < j.shape[0],
        dear=not small,
    )
    return around, norms, lambda: (state.rows, jnp.zeros((), jnp.int32))


def _by_products(options: _Options, own: Any, state: Any, x: jax.Array, sources: Any) -> Parts:
    """With products alone; residuals stay on their devices, sums over them are exchanged."""
    axes = options.axis_name
    total = lambda x: jax.lax.psum(x, axes) if axes else x
    zero = jnp.zeros_like(x)
    r, push = jax.linearize(own, zero)
    transpose = jax.linear_transpose(push, zero)
    here = total(jnp.sum(r**2)) / 2
    # Entry i of J (s x) has, over random signs s, the mean square sum_j J_ij² x_j². It is not
    # finite where an entry of J is not.
    signs = jax.random.rademacher(jax.random.fold_in(jax.random.key(0), state.count), x.shape)
    mixed = push(signs.astype(x.dtype) * x)
    spread = jnp.sqrt(total(jnp.sum((r * mixed) ** 2)))
    sound = linalg.finite(here, spread, *map(jnp.asarray, sources))
    found = []

    def solver(units: jax.Array, finest: Any) -> Solver:
        kept = state.rows if options.kept(zero.size) else jnp.zeros((0, zero.size), x.dtype)
        last = linalg.safe_divide(state.step, units)[None]
        start = jnp.concatenate([kept, last])
        out, w, products = by_products(
            lambda v: push(units * v),
            lambda y: units * total(transpose(y)[0]),
            total,
            jnp.where(sound, r, 0),
            jnp.where(sound, start, 0),
            min(zero.size, KEPT if options.rank is None else options.rank),
            sound,
        )
        found.append((w[: len(kept)] if len(kept) else (), products + 2))
        return out

    around = Around(
        residuals=own,
        solver=solver,
        total=total,
        r=jnp.where(sound, r, 0),
        pushed=push(state.step),
        last=state.step,
        here=here,
        noise=_noise(here, spread),
        sound=sound,
        fewer=False,
        dear=True,
    )
    norms = state.norms
    if options.scaling is not None:
        # The same signs on the residuals: the mean square of (J^T s)_j is the column's.
        norms = _column_norms(options, transpose, total, r, state)
    return around, norms, lambda: found[0]


def _column_norms(options: _Options, transpose: Any, total: Any, r: jax.Array, state: Any):
    """The columns' norms from one product: over random signs ``E (J^T s)_j² = ‖J_j‖²``."""
    key = jax.random.fold_in(jax.random.key(1), state.count)
    for axis in jax.tree.leaves(options.axis_name or ()):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    signs = jax.random.rademacher(key, r.shape).astype(r.dtype)
    seen = jnp.abs(total(transpose(signs)[0]))
    return jnp.maximum(options.scaling * state.norms, jnp.where(jnp.isfinite(seen), seen, 0))


def _noise(here: jax.Array, spread: jax.Array) -> jax.Array:
    """What rounding of the losses' sum, or of the parameters, can change of a loss."""
    noise = 4 * jnp.finfo(here.dtype).eps * (2 * here + spread)
    return jnp.minimum(noise, here)  # where it overflows


def _without_aux(fn: Any) -> Callable[[Any], Any]:
    """Residuals of a function that returns them with something else."""

    def first(params: Any) -> Any:
        out = fn(params)
        check(
            isinstance(out, tuple) and len(out) == 2,
            f"{OWNER}: has_aux=True and residuals_fn returned {type(out).__name__}; pass a "
            "function that returns (residuals, aux), or leave has_aux out.",
        )
        return out[0]

    return first
