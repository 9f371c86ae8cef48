"""Following: the default optimizer of a `learner`, whose rate and memory come from the stream."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg

# Steps are 3/n of a Newton step, moments average about n/2 vectors: what was learned before the
# subspace had settled is forgotten with a power of n.
GAIN, MOMENTS, TREND, SHARPNESS, LONGEST = 3.0, 2.0, 8.0, 3.0, 1.0


class FollowingState(NamedTuple):
    """State of `following`.

    Attributes:
      memory: number ``n`` of vectors for which the present subspace stands.
      waiting: number of vectors whose gradients have been collected since the last step.
      gathered: the sum of these gradients, shaped like the parameters.
      trend: running average of the directions of past steps, shaped like the rows.
      curvature: running average ``B`` of the curvature, ``(r, r)``.
      spread: running average of ``G G^T``, which stands for a curvature that is not known.
      agreement: running average of the cosine between a step and the trend, and of its square.
      length: running average of a Newton step's squared length.
      theta: Adam's state for the purposes' own parameters.
    """

    memory: jax.Array
    waiting: jax.Array
    gathered: Any
    trend: Any
    curvature: jax.Array
    spread: jax.Array
    agreement: tuple[jax.Array, jax.Array]
    length: jax.Array
    theta: Any


def following(every: int = 8, learning_rate: float = 1e-2) -> optax.GradientTransformationExtraArgs:
    r"""Newton's steps for rows, with a memory that grows on a still stream and shrinks on a turn.

    .. math:: A \leftarrow A - \frac{3 m}{n} B^{-1} G, \qquad n \leftarrow n + m

    ``G`` is the gradient's mean over the ``m`` vectors since the last step, and ``B``, ``(r, r)``,
    the running average of the purposes' curvature from the left. So a step has no unit, whatever
    the stream's scale and its number of dimensions are. While the stream stands still the step
    falls like ``1/n``, as in recursive least squares. Where steps keep pointing along those before
    them by more than chance explains (a one-sided test on their running cosine), the subspace lags
    behind, and ``n`` shrinks until they no longer do. It does not shrink so far that noise alone
    would turn the rows. Where a purpose knows no curvature, the root of the average of ``G G^T``
    takes its place. Steps are at most of length 1.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> learner = lro.online.learner(2)               # this is its optimizer
      >>> state = learner.init(jax.random.key(0), jnp.zeros(6))
      >>> for i in range(4):
      ...     state, _ = learner.update(state, jnp.ones((16, 6)))
      >>> print(state.opt_state.memory)
      64.0

    Args:
      every: number of vectors whose gradients make one step, at least 1, default 8.
      learning_rate: Adam's rate for parameters that purposes learn besides ``A``, default 0.01.

    Returns:
      A transformation for `learner`, which passes it ``curvature`` and ``count``.

    Cost: memory ``2 r d``; ``6 r d + 2 r² d`` flops a step.

    Source: Yang, "Projection approximation subspace tracking", IEEE Transactions on Signal
    Processing 1995, for the step; the memory is this library's own.
    """
    adam = optax.adam(learning_rate)

    def init(params: Any) -> FollowingState:
        rows, theta = params
        leaves = jax.tree.leaves(rows)
        r = leaves[0].shape[0] if leaves else 1
        dtype = jnp.result_type(jnp.float32, *(x.dtype for x in leaves))
        zeros = lambda *shape: jnp.zeros(shape, dtype)
        blank = lambda: jax.tree.map(jnp.zeros_like, rows)
        small = zeros(r, r), zeros(r, r), (zeros(), zeros() + 1), zeros()
        first = zeros(), zeros(), (blank(), jax.tree.map(jnp.zeros_like, theta)), blank()
        return FollowingState(*first, *small, adam.init(theta))

    def update(
        updates: Any,
        state: FollowingState,
        params: Any = None,
        *,
        curvature: jax.Array | None = None,
        known: bool = False,
        count: jax.Array | float = 1.0,
        **extra: Any,
    ) -> tuple[Any, FollowingState]:
        count = jnp.asarray(count, state.memory.dtype)
        add = lambda a, b: a + count.astype(a.dtype) * b
        gathered = jax.tree.map(add, state.gathered, updates)
        waiting, n = state.waiting + count, state.memory + count
        given = 0 if curvature is None else curvature
        rate = share(n, count)
        b = (1 - rate) * state.curvature + rate * given
        mean = jax.tree.map(lambda x: x / jnp.maximum(waiting, 1).astype(x.dtype), gathered)
        due = waiting >= every
        spread = (1 - rate) * state.spread + rate * _gram(updates[0], updates[0])
        whole = b if known else b + linalg.matrix_power(spread, 0.5, damping=0, rdamping=0)
        newton = _newton(whole, mean[0])
        moved = _judge(state, newton, n, waiting)
        step = jax.tree.map(lambda x: -moved.gain.astype(x.dtype) * x, newton)
        theta, adam_state = adam.update(mean[1], state.theta, None if params is None else params[1])
        turn = linalg.matrix_power(
            jnp.eye(b.shape[0], dtype=b.dtype) + moved.gain**2 * moved.square,
            -0.5,
            damping=0,
            rdamping=0,
        )
        done = FollowingState(
            moved.memory,
            jnp.zeros_like(waiting),
            jax.tree.map(jnp.zeros_like, gathered),
            moved.trend,
            turn @ b @ turn,
            turn @ spread @ turn,
            moved.agreement,
            moved.length,
            adam_state,
        )
        wait = state._replace(
            memory=n, waiting=waiting, gathered=gathered, curvature=b, spread=spread
        )
        pick = lambda yes, no: jnp.where(due, yes, no)
        out = jax.tree.map(lambda x: jnp.where(due, x, 0), (step, theta))
        return out, jax.tree.map(pick, done, wait)

    return optax.GradientTransformationExtraArgs(init, update)


def share(memory: jax.Array, count: jax.Array) -> jax.Array:
    """The share that ``count`` new vectors have in running averages."""
    return jnp.minimum(1, MOMENTS * count / jnp.maximum(memory, 1))


class _Move(NamedTuple):
    memory: jax.Array
    gain: jax.Array
    square: jax.Array
    trend: Any
    agreement: tuple[jax.Array, jax.Array]
    length: jax.Array


def _judge(state: FollowingState, newton: Any, n: jax.Array, waiting: jax.Array) -> _Move:
    """The gain of a Newton step, and the memory after it."""
    r = state.curvature.shape[0]
    tiny = jnp.finfo(n.dtype).tiny
    square = _gram(newton, newton)
    length = jnp.trace(square)
    trend = _gram(state.trend, state.trend).trace()
    rate = jnp.minimum(1, TREND * waiting / jnp.maximum(n, 1))
    blend = lambda old, new: old + rate * (new - old)
    cosine = _gram(newton, state.trend).trace() * jax.lax.rsqrt(
        jnp.maximum(length, tiny)
    ) * jax.lax.rsqrt(jnp.maximum(trend, tiny))
    judged = trend > 0
    mean = jnp.where(judged, blend(state.agreement[0], cosine), state.agreement[0])
    second = jnp.where(judged, blend(state.agreement[1], cosine**2), state.agreement[1])
    steps = jnp.maximum(1, n / (TREND * jnp.maximum(waiting, 1)))
    chance = jnp.sqrt(jnp.maximum(second - mean**2, 0.01) / steps)
    excess = jnp.maximum(0, mean / chance - 1)
    shrunk = n * jnp.exp(-jnp.minimum(1, SHARPNESS * waiting / jnp.maximum(n, 1) * excess))
    size = jnp.where(state.length > 0, blend(state.length, length), length)
    # Noise may turn the rows by about half a radian in all.
    noise = size * (1 - jnp.maximum(mean, 0) ** 2)
    least = jnp.maximum(GAIN * 8, GAIN * waiting * noise / (0.3 * r))
    memory = jnp.maximum(shrunk, jnp.minimum(n, least))
    memory = jnp.where(judged & jnp.isfinite(memory), memory, n)
    gain = jnp.minimum(1, GAIN * waiting / jnp.maximum(n, 1))
    gain = jnp.minimum(gain, LONGEST * jax.lax.rsqrt(jnp.maximum(length, tiny)))
    unit = jax.lax.rsqrt(jnp.maximum(length, tiny))
    along = jax.tree.map(
        lambda t, s: blend(t, (unit.astype(s.dtype) * s)).astype(t.dtype), state.trend, newton
    )
    return _Move(memory, gain, square, along, (mean, second), size)


def _gram(a: Any, b: Any) -> jax.Array:
    """``A B^T``, ``(r, r)``."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    parts = [x @ y.T for x, y in pairs]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros((1, 1))


def _newton(b: jax.Array, gradient: Any) -> Any:
    """``B^{-1} G``; directions of no curvature have none."""
    inverse = linalg.matrix_power(b, -1.0, damping=0, rdamping=1e-6)
    return jax.tree.map(lambda g: inverse.astype(g.dtype) @ g, gradient)
