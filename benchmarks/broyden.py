"""Self-scaled Broyden, for which no JAX package serves: a reference for the benchmarks.

Written from the papers' formulas; no part of the library.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree


class BroydenState(NamedTuple):
    """The inverse Hessian's estimate ``H``, and parameters and gradient of the last step."""

    count: jax.Array
    h: jax.Array
    x: jax.Array
    g: jax.Array


def scale_by_self_scaled_broyden() -> optax.GradientTransformation:
    """``H g`` with the self-scaled update of Broyden's family (SSBroyden).

    With ``b = s^T B s / y^T s``, ``h = y^T H y / y^T s`` and ``a = b h - 1``, the update is

        H <- (H - H y y^T H / y^T H y + phi v v^T) / tau + s s^T / y^T s,
        v = sqrt(y^T H y) (s / y^T s - H y / y^T H y)

    with ``phi`` and ``tau`` from ``a, b, h`` as Al-Baali and Khalfan give them. Steps whose
    curvature is not positive leave ``H`` as it is; the first one scales the identity.

    Source: Al-Baali and Khalfan, "Wide interval for efficient self-scaling quasi-Newton
    algorithms", 2005; Urbán, Stefanou and Pons, "Unveiling the optimization process of physics
    informed neural networks: How accurate and competitive can PINNs be?", 2025.
    """

    def init(params: Any) -> BroydenState:
        x, _ = ravel_pytree(params)
        eye = jnp.eye(len(x), dtype=x.dtype)
        return BroydenState(jnp.zeros((), jnp.int32), eye, x, jnp.zeros_like(x))

    def learn(state: BroydenState, s: jax.Array, y: jax.Array) -> jax.Array:
        n, ys = len(s), y @ s
        scaled = state.h * jnp.where(state.count == 1, ys / (y @ y), 1)
        hy = scaled @ y
        yhy = y @ hy
        # s = -alpha H g, so that B s = -alpha g, in the estimate that made the step.
        went = state.h @ state.g
        alpha = jnp.linalg.norm(s) / jnp.linalg.norm(went)
        b = -alpha * (s @ state.g) / ys / jnp.where(state.count == 1, ys / (y @ y), 1)
        h = yhy / ys
        a = jnp.maximum(h * b - 1, 1e-14)
        c = jnp.sqrt(a / (a + 1))
        low = jnp.minimum(1, h * (1 - c))
        theta = jnp.maximum((low - 1) / a, jnp.minimum(1 / low, (1 - b) / b))
        sigma = 1 + theta * a
        root = jnp.abs(sigma) ** (1 / (1 - n))
        high = jnp.minimum(1, 1 / b)
        tau = jnp.where(
            theta <= 0, jnp.minimum(high * root, sigma), high * jnp.minimum(root, 1 / theta)
        )
        phi = (1 - theta) / (1 + a * theta)
        v = jnp.sqrt(yhy) * (s / ys - hy / yhy)
        new = scaled - jnp.outer(hy, hy) / yhy + phi * jnp.outer(v, v)
        new = new / tau + jnp.outer(s, s) / ys
        good = (ys > 0) & (yhy > 0) & (b > 0) & jnp.all(jnp.isfinite(new))
        return jnp.where(good & (state.count > 0), new, state.h)

    def update(updates: Any, state: BroydenState, params: Any = None):
        g, back = ravel_pytree(updates)
        x, _ = ravel_pytree(params)
        h = learn(state, x - state.x, g - state.g)
        return back(h @ g), BroydenState(state.count + 1, h, x, g)

    return optax.GradientTransformation(init, update)


def self_scaled_broyden() -> optax.GradientTransformationExtraArgs:
    """SSBroyden with optax's zoom line search, as `optax.lbfgs` has it."""
    return optax.chain(
        scale_by_self_scaled_broyden(),
        optax.scale(-1.0),
        optax.scale_by_zoom_linesearch(max_linesearch_steps=20, initial_guess_strategy="one"),
    )
