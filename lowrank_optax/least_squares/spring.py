"""Stochastic natural gradient with momentum: residuals whose points change at every step."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import as_size, check_decay, check_least, require
from lowrank_optax._core.derivatives import undifferentiated
from lowrank_optax._core.entry import check_one_replica, own_arguments
from lowrank_optax._core.functions import flat_residuals
from lowrank_optax._core.layout import Layout
from lowrank_optax._core.precision import full_precision
from lowrank_optax.curvature._curvature import need_params
from lowrank_optax.curvature.examples import jacobian
from lowrank_optax.least_squares._jacobian import dense
from lowrank_optax.least_squares._vector import as_tree, check_rows, given_rows

OWNER = "spring"

MEMORY = 0.9
"""Decay of the averages that the damping follows."""

LITTLE, MUCH = 0.1, 0.3
"""Shares of the promise: below the one the damping grows, above the other it falls.

They are far below 1, because a batch shows a part of the parameters only.
"""

FACTOR = 1.2
"""What the damping is multiplied or divided by in a step."""


class SpringState(NamedTuple):
    """State of `spring`.

    Attributes:
      count: number of calls of ``update``.
      direction: ``phi`` of the last step, ``(d,)``.
      rate: what the last ``phi`` was multiplied by.
      damping: ``mu`` of the last step; 0 before it.
      gain: average of what steps took off the loss of the next batch.
      promise: average of what the linear model said they would take off that of their own.
      loss: the loss ``½ ‖r‖²`` of the last batch before its step.
      nonfinite: number of steps whose residuals, Jacobian or gradient were not finite; the update
        was zero and everything else stayed as it was.
    """

    count: jax.Array
    direction: jax.Array
    rate: jax.Array
    damping: jax.Array
    gain: jax.Array
    promise: jax.Array
    loss: jax.Array
    nonfinite: jax.Array


class _Options(NamedTuple):
    """The arguments of `spring`, checked."""

    learning_rate: Any
    momentum: float | None
    damping: float | None
    max_norm: float | None
    chunk: int | None
    axis_name: str | Sequence[str] | None


def spring(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    *,
    momentum: float | None = None,
    damping: float | None = None,
    max_norm: float | None = None,
    chunk: int | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient in the dual on batches that change, which remembers earlier ones (SPRING).

    With the residuals ``r`` of a batch and their Jacobian ``J``, the step is the one that fits the
    batch and stays close to the last one,

    .. math:: \phi \leftarrow b\,\phi + J^T (J J^T + \mu I)^{-1} (r - b\,J \phi),\qquad
              x \leftarrow x - \min(\eta, \text{max\_norm} / \|\phi\|)\, \phi

    so that ``phi`` gathers from many batches what each shows a part of: the step to the minimum of
    them all. Once a share ``eta`` of it was taken, ``1 - eta`` is left, which is the default ``b``.
    With ``momentum=0`` it is Gauss-Newton of the batch (MinSR of a wavefunction).

    Without a number for ``damping`` it adapts. A batch cannot judge a step that was made to fit it,
    so each step is judged by the next batch: what it took off that one's loss, averaged over some
    ten steps, over what the linear model promised for its own. Below a tenth ``mu`` grows by a
    fifth, up to the largest squared singular value, above three tenths it falls as much. This needs
    the residuals to be those of a loss; for `lowrank_optax.least_squares.energy_residuals` pass a
    number.

    ``update`` takes the parameters and ``residuals_fn`` (params -> residuals of the batch), or with
    it ``per_example_grads``, as `lowrank_optax.levenberg_marquardt` does. Divide residuals by the
    root of their number, so that ``mu`` does not depend on it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
      >>> tx = lro.spring(0.2)
      >>> x = jnp.zeros(20); state = tx.init(x)
      >>> @jax.jit
      ... def step(key, x, state):
      ...     a = jax.random.normal(key, (8, 20))                     # another batch every time
      ...     updates, state = tx.update(x, state, x, residuals_fn=lambda x: a @ (x - 1) / 8**0.5)
      ...     return optax.apply_updates(x, updates), state
      >>> for key in jax.random.split(jax.random.key(0), 60):
      ...     x, state = step(key, x, state)
      >>> bool(jnp.max(jnp.abs(x - 1)) < 1e-2)
      True

    Args:
      learning_rate: number or schedule ``eta``, 0.1 by default.
      momentum: the share ``b`` of the last step, in [0, 1); ``None``, the default, for ``1 - eta``,
        at most 0.99. The source has 0.99 with rates from 0.02 down.
      damping: ``mu``, in units of the squared singular values of ``J``; ``None``, the default,
        adapts it from a thousandth of the largest.
      max_norm: the largest length of an update; ``None``, the default, for any. The source has the
        root of 1e-3 for wavefunctions.
      chunk: number of residuals that are pulled back at a time, which bounds the memory; ``None``,
        the default, for all.
      axis_name: axes of `jax.pmap` or `jax.shard_map` over which the devices have residuals of
        their own. They are gathered, with their gradients. ``()`` says that every device goes its
        own way; ``None``, the default, that there is one device.

    Returns:
      An optax transformation whose state is a `SpringState`.

    Raises:
      ValueError: for values out of range; by ``update`` without params or ``residuals_fn``, and for
        ``per_example_grads`` of other shapes.

    Cost: with ``m = min(k, d)``, memory ``k d`` in a step and ``d`` between steps; ``k`` backward
      passes, ``k d m + 9 m³`` flops, and the residuals once more where the damping adapts.

    Source: Goldshlager, Abrahamsen and Lin, "A Kaczmarz-inspired approach to accelerate the
    optimization of neural network wavefunctions", 2024; on residuals of differential equations
    Guzmán-Cordero et al., "Improving energy natural gradient descent through Woodbury, momentum,
    and randomization", 2025. The rule for the damping is this library's own.
    """
    if momentum is not None:
        check_decay(OWNER, "momentum", momentum)
    if not callable(learning_rate):
        check_least(OWNER, "learning_rate", learning_rate)
    if damping is not None:
        check_least(OWNER, "damping", damping, strict=True)
    if max_norm is not None:
        check_least(OWNER, "max_norm", max_norm, strict=True)
    if chunk is not None:
        chunk = as_size(OWNER, "chunk", chunk)
    options = _Options(learning_rate, momentum, damping, max_norm, chunk, axis_name)
    return optax.GradientTransformationExtraArgs(_init, full_precision(partial(_update, options)))


def _init(params: Any) -> SpringState:
    layout = Layout.of(params, None, owner=OWNER)
    real = lambda *shape: jnp.zeros(shape, layout.dtype)
    zero = lambda: jnp.zeros((), jnp.int32)
    return SpringState(
        zero(), real(sum(layout.sizes)), real(), real(), real(), real(), real(), zero()
    )


def _update(options: _Options, updates: Any, state: Any, params: Any = None, **extra: Any):
    updates = undifferentiated(OWNER, updates)
    params, extra = own_arguments(OWNER, updates, params, extra)
    axes = options.axis_name
    if axes is None:
        check_one_replica(OWNER, extra)
    params = need_params(OWNER, params)
    fn = require(OWNER, extra, "residuals_fn", "params -> residuals (k,)")
    fn = flat_residuals(OWNER, "residuals_fn", fn)
    layout = Layout.of(params, None, owner=OWNER)
    gather = lambda x: jax.lax.all_gather(x, axes, tiled=True) if axes else x

    def own(p: jax.Array) -> jax.Array:
        return fn(optax.apply_updates(params, as_tree(layout, p))).astype(layout.dtype)

    zero = jnp.zeros_like(state.direction)
    r = gather(own(zero))
    here = jnp.sum(r**2) / 2
    if not r.size or not zero.size:
        counted = state._replace(count=linalg.tally(state.count), loss=here)
        return as_tree(layout, zero, updates), counted
    given = extra.get("per_example_grads")
    j = jacobian(own, zero, options.chunk)[0] if given is None else given_rows(layout, given)
    j = gather(j)
    check_rows(OWNER, j, (r.size, zero.size))
    sound = linalg.finite(r, j, *map(jnp.asarray, jax.tree.leaves(updates)))
    j, r = jnp.where(sound, j, 0), jnp.where(sound, r, 0)

    gain = state.gain
    if options.damping is None:
        # The last step on this batch: from where it came to here.
        before = gather(own(state.rate * state.direction))
        gain = MEMORY * gain + (1 - MEMORY) * (jnp.sum(before**2) / 2 - here)
    solver = dense(j, lambda top: _damping(options, state, gain, top))
    mu = _damping(options, state, gain, solver.top)
    rate, b = _rates(options, state.count, r.dtype)
    phi = b * state.direction
    phi = phi + solver.solve(mu, r - j @ phi)
    if options.max_norm is not None:
        length = jnp.linalg.norm(phi)
        rate = jnp.minimum(rate, options.max_norm / jnp.where(length > 0, length, 1))
    promise = jnp.sum(r**2) / 2 - jnp.sum((r - rate * (j @ phi)) ** 2) / 2
    promise = MEMORY * state.promise + (1 - MEMORY) * promise

    sound = sound & linalg.finite(phi, gain, promise, rate, mu)
    keep = lambda new, old: jnp.where(sound, new, old)
    return as_tree(layout, jnp.where(sound, -rate * phi, 0), updates), SpringState(
        count=linalg.tally(state.count),
        direction=keep(phi, state.direction),
        rate=keep(rate, state.rate),
        damping=keep(mu, state.damping),
        gain=keep(gain, state.gain),
        promise=keep(promise, state.promise),
        loss=keep(here, state.loss),
        nonfinite=linalg.tally(state.nonfinite, ~sound),
    )


def _rates(options: _Options, count: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The learning rate and the momentum of a step."""
    rate = options.learning_rate
    rate = jnp.asarray(rate(count) if callable(rate) else rate, dtype)
    b = options.momentum
    return rate, jnp.clip(1 - rate, 0, 0.99) if b is None else jnp.asarray(b, dtype)


def _damping(options: _Options, state: SpringState, gain: jax.Array, top: jax.Array) -> jax.Array:
    """The damping of a step; gains and promises have been seen from the second step on."""
    if options.damping is not None:
        return jnp.asarray(options.damping, top.dtype)
    eps = jnp.finfo(top.dtype).eps
    grow = jnp.where(gain < LITTLE * state.promise, FACTOR, 1.0)
    shrink = jnp.where(gain > MUCH * state.promise, 1 / FACTOR, 1.0)
    mu = jnp.where(state.promise > 0, state.damping * grow * shrink, state.damping)
    # From a thousandth of the largest squared singular value. Above that one steps would be
    # gradients whose length falls with the damping, and nothing would be learned any more.
    return jnp.clip(jnp.where(mu > 0, mu, 1e-3 * top), eps * top, top)
