"""Following: the default optimizer of a `learner`, whose rate and memory come from the stream."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._core import linalg
from lowrank_optax._core.checks import check_count, check_least

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
      >>> stream = jax.random.normal(jax.random.key(1), (50, 16, 6)) * jnp.arange(1., 7)
      >>> state, _ = jax.lax.scan(learner.update, state, stream)
      >>> print(state.opt_state.memory)                 # it stood still
      800.0

    Args:
      every: number of vectors whose gradients make one step, at least 1, default 8.
      learning_rate: Adam's rate for parameters that purposes learn besides ``A``, default 0.01.

    Returns:
      A transformation for `learner`, which passes it ``curvature`` and ``count``.

    Raises:
      ValueError: for numbers out of range.

    Cost: memory ``2 r d``; ``6 r d + 2 r² d`` flops a step.

    Source: Yang, "Projection approximation subspace tracking", IEEE Transactions on Signal
    Processing 1995, for the step; the memory is this library's own.
    """
    check_count("following", "every", every)
    check_least("following", "learning_rate", learning_rate, strict=True)
    rule = _Following(every, optax.adam(learning_rate))
    update: Any = rule.update
    return optax.GradientTransformationExtraArgs(rule.init, update)


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


def _judge(state: FollowingState, newton: Any) -> _Move:
    """The gain of a Newton step, and the memory after it."""
    r, n, waiting = state.curvature.shape[0], state.memory, state.waiting
    tiny = jnp.finfo(n.dtype).tiny
    square = _gram(newton, newton)
    length = jnp.trace(square)
    trend = _dot(state.trend, state.trend)
    rate = jnp.minimum(1, TREND * waiting / jnp.maximum(n, 1))
    blend = lambda old, new: old + rate * (new - old)
    cosine = (
        _dot(newton, state.trend)
        * jax.lax.rsqrt(jnp.maximum(length, tiny))
        * jax.lax.rsqrt(jnp.maximum(trend, tiny))
    )
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
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros((1, 1))


def _dot(a: Any, b: Any) -> jax.Array:
    """``tr(A B^T)``."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    parts = [jnp.sum(x * y) for x, y in pairs]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros(())


def _newton(b: jax.Array, gradient: Any) -> Any:
    """``B^{-1} G``; directions of no curvature have none."""
    inverse = linalg.matrix_power(b, -1.0, damping=0, rdamping=1e-6)
    return jax.tree.map(lambda g: inverse.astype(g.dtype) @ g, gradient)


class _Following(NamedTuple):
    """The two functions of `following`."""

    every: int
    adam: Any

    def init(self, params: Any) -> FollowingState:
        rows, theta = params
        leaves = jax.tree.leaves(rows)
        r = leaves[0].shape[0] if leaves else 1
        dtype = jnp.result_type(jnp.float32, *(x.dtype for x in leaves))
        zeros = lambda *shape: jnp.zeros(shape, dtype)
        blank = lambda: jax.tree.map(jnp.zeros_like, rows)
        small = zeros(r, r), zeros(r, r), (zeros(), zeros() + 1), zeros()
        first = zeros(), zeros(), (blank(), jax.tree.map(jnp.zeros_like, theta)), blank()
        return FollowingState(*first, *small, self.adam.init(theta))

    def update(
        self,
        updates: Any,
        state: FollowingState,
        params: Any = None,
        *,
        curvature: jax.Array | None = None,
        known: bool = False,
        count: jax.Array | float = 1.0,
        **extra: Any,
    ) -> tuple[Any, FollowingState]:
        state = self._gather(updates, state, curvature, jnp.asarray(count, state.memory.dtype))
        out, done = self._step(state, params, known)
        due = state.waiting >= self.every
        out = jax.tree.map(lambda x: jnp.where(due, x, 0), out)
        return out, jax.tree.map(lambda yes, no: jnp.where(due, yes, no), done, state)

    def _gather(self, updates, state: FollowingState, curvature, count) -> FollowingState:
        """The state with one more gradient and its curvature."""
        add = lambda a, b: a + count.astype(a.dtype) * b
        n = state.memory + count
        rate = share(n, count)
        blend = lambda old, new: (1 - rate) * old + rate * new
        return state._replace(
            memory=n,
            waiting=state.waiting + count,
            gathered=jax.tree.map(add, state.gathered, updates),
            curvature=blend(state.curvature, 0 if curvature is None else curvature),
            spread=blend(state.spread, _gram(updates[0], updates[0])),
        )

    def _step(self, state: FollowingState, params: Any, known: bool):
        """The step that is due, and the state after it."""
        many, b = jnp.maximum(state.waiting, 1), state.curvature
        gradient, own = jax.tree.map(lambda x: x / many.astype(x.dtype), state.gathered)
        root = lambda a, power: linalg.matrix_power(a, power, damping=0, rdamping=0)
        newton = _newton(b if known else b + root(state.spread, 0.5), gradient)
        move = _judge(state, newton)
        step = jax.tree.map(lambda x: -move.gain.astype(x.dtype) * x, newton)
        theta, adam_state = self.adam.update(
            own, state.theta, None if params is None else params[1]
        )
        # The rows' polar factor turns codes by (I + S S^T)^{-1/2}.
        turn = root(jnp.eye(b.shape[0], dtype=b.dtype) + move.gain**2 * move.square, -0.5)
        done = FollowingState(
            move.memory,
            jnp.zeros_like(state.waiting),
            jax.tree.map(jnp.zeros_like, state.gathered),
            move.trend,
            turn @ b @ turn,
            turn @ state.spread @ turn,
            move.agreement,
            move.length,
            adam_state,
        )
        return (step, theta), done
