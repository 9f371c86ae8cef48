"""Differential equations for networks to solve: residuals, points and reference solutions.

Evolution equations have their initial values built in, ``u = u(x, 0) + t w(x) N``, and periodic
ones see ``cos πx, sin πx`` for ``x``: all that is left is one residual a point. Poisson's equation
in two dimensions has its boundary as residuals, in more dimensions too. Networks have three layers
of 20 tanh units everywhere.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation to solve.

    Attributes:
      inputs: number of inputs of the network.
      u: ``(params, point) -> u``.
      inside: ``(params, point) -> residual``.
      draw: ``(generator, n) -> points`` inside.
      edge: points on the boundary, where ``u - value`` is a residual; none for an empty array.
      value: the boundary's values at a point.
      test: points and true values for the error.
    """

    inputs: int
    u: Callable[[Any, jax.Array], jax.Array]
    inside: Callable[[Any, jax.Array], jax.Array]
    draw: Callable[[np.random.Generator, int], np.ndarray]
    edge: np.ndarray
    value: Callable[[jax.Array], jax.Array]
    test: tuple[np.ndarray, np.ndarray]

    def init(self, seed: int) -> Any:
        """Weights, normal after Glorot, and biases of zero."""
        sizes = (self.inputs, WIDTH, WIDTH, WIDTH, 1)
        rng = np.random.default_rng(seed)
        return [
            (jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / (a + b)), float), jnp.zeros(b))
            for a, b in itertools.pairwise(sizes)
        ]

    def error(self, params: Any) -> jax.Array:
        """The relative error in L2."""
        x, truth = (jnp.asarray(a, float) for a in self.test)
        found = jax.lax.map(partial(self.u, params), x, batch_size=2000)
        return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)


def network(params: Any, x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return (x @ w + b)[0]


def derivatives(u: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int, order: int):
    """``u`` and its derivatives along an axis, up to ``order``, at a point."""
    e = jnp.eye(len(x))[axis]
    fn = lambda h: u(x + h * e)
    out = []
    for _ in range(order + 1):
        out.append(fn)
        fn = (lambda f: lambda h: jax.jvp(f, (h,), (jnp.ones_like(h),))[1])(fn)
    return [f(jnp.zeros((), x.dtype)) for f in out]


def box(low: Any, high: Any) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, n: rng.uniform(low, high, (n, len(np.atleast_1d(low))))


def grid(*axes: Any) -> np.ndarray:
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


NOTHING = np.zeros((0, 2))
STRIP = box([-1.0, 0.0], [1.0, 1.0])


def burgers(viscosity: float) -> Equation:
    """``u_t + u u_x = viscosity u_xx``, ``u(x, 0) = -sin πx``, zero at both ends."""

    def u(params, p):
        return -jnp.sin(jnp.pi * p[0]) + p[1] * (1 - p[0] ** 2) * network(params, p)

    def inside(params, p):
        at = partial(u, params)
        value, slope, bend = derivatives(at, p, 0, 2)
        return derivatives(at, p, 1, 1)[1] + value * slope - viscosity * bend

    places, times = np.linspace(-1, 1, 401), np.linspace(0, 1, 41)
    truth = np.stack([cole_hopf(places, t, viscosity) for t in times], -1)
    zero = lambda p: jnp.zeros(())
    return Equation(2, u, inside, STRIP, NOTHING, zero, (grid(places, times), truth.ravel()))


def cole_hopf(x: np.ndarray, t: float, viscosity: float) -> np.ndarray:
    """The solution of Burgers' equation by the trapezoidal rule, which is spectral here."""
    if t == 0:
        return -np.sin(np.pi * x)
    z = np.linspace(-1.5, 1.5, 6001)
    y = x[:, None] - z
    power = -(1 + np.cos(np.pi * y)) / (2 * np.pi * viscosity) - z**2 / (4 * viscosity * t)
    weight = np.exp(power - power.max(1, keepdims=True))
    return (weight @ z) / weight.sum(1) / t


def periodic(start: Callable, right: Callable, order: int, truth: Any) -> Equation:
    """``u_t = right(u, u_x, ..)`` with period 2 in ``x``."""

    def u(params, p):
        x, t = p
        inputs = jnp.stack([jnp.cos(jnp.pi * x), jnp.sin(jnp.pi * x), t])
        return start(x) + t * network(params, inputs)

    def inside(params, p):
        at = partial(u, params)
        return derivatives(at, p, 1, 1)[1] - right(*derivatives(at, p, 0, order))

    zero = lambda p: jnp.zeros(())
    return Equation(3, u, inside, STRIP, NOTHING, zero, truth)


def allen_cahn() -> Equation:
    """``u_t = 1e-4 u_xx + 5 u - 5 u³``, ``u(x, 0) = x² cos πx``, period 2."""
    truth = spectral(
        lambda x: x**2 * np.cos(np.pi * x),
        lambda k: -1e-4 * k**2 + 5,
        lambda u, k: -5 * np.fft.rfft(u**3),
        4096,
        1000,
    )
    right = lambda u, slope, bend: 1e-4 * bend + 5 * u - 5 * u**3
    return periodic(lambda x: x**2 * jnp.cos(jnp.pi * x), right, 2, truth)


def korteweg_de_vries() -> Equation:
    """``u_t + u u_x + 0.022² u_xxx = 0``, ``u(x, 0) = cos πx``, period 2."""
    truth = spectral(
        lambda x: np.cos(np.pi * x),
        lambda k: 0.022**2 * 1j * k**3,
        lambda u, k: -0.5j * k * np.fft.rfft(u**2),
        512,
        8000,
    )
    right = lambda u, slope, bend, third: -u * slope - 0.022**2 * third
    return periodic(lambda x: jnp.cos(jnp.pi * x), right, 3, truth)


def spectral(start, linear, nonlinear, n: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A reference with period 2 by Fourier modes in space and ETDRK4 in time.

    Source: Kassam and Trefethen, "Fourth-order time-stepping for stiff PDEs", 2005, whose contour
    integrals the coefficients are.
    """
    x = np.arange(n) / n * 2 - 1
    k = np.pi * np.arange(n // 2 + 1)
    h, lin = 1 / steps, linear(k)
    z = h * lin[:, None] + np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)[None]
    mean = lambda f: h * f(z).mean(1)
    half, whole = np.exp(h * lin / 2), np.exp(h * lin)
    q = mean(lambda z: (np.exp(z / 2) - 1) / z)
    a = mean(lambda z: (-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    b = mean(lambda z: (2 + z + np.exp(z) * (z - 2)) / z**3)
    c = mean(lambda z: (-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)
    # Two thirds of the modes, so that products of two do not come back as others.
    cut = (np.arange(n // 2 + 1) < n / 3).astype(float)
    term = lambda v: cut * nonlinear(np.fft.irfft(v, n), k)
    v, seen = np.fft.rfft(start(x)), [start(x)]
    for i in range(steps):
        n0 = term(v)
        v1 = half * v + q * n0
        n1 = term(v1)
        v2 = half * v + q * n1
        n2 = term(v2)
        v3 = half * v1 + q * (2 * n2 - n0)
        v = whole * v + a * n0 + 2 * b * (n1 + n2) + c * term(v3)
        if (i + 1) % (steps // 40) == 0:
            seen.append(np.fft.irfft(v, n))
    every = max(1, n // 512)
    return grid(x[::every], np.linspace(0, 1, 41)), np.stack(seen, -1)[::every].ravel()


def poisson(d: int, u: Callable, source: Callable) -> Equation:
    """``Δu = source`` in the unit cube with ``u`` on its boundary."""

    def inside(params, p):
        at = partial(network, params)
        second = lambda e: jax.jvp(lambda p: jax.jvp(at, (p,), (e,))[1], (p,), (e,))[1]
        return jnp.sum(jax.vmap(second)(jnp.eye(d))) - source(p)

    rng = np.random.default_rng(1)
    edge = rng.uniform(size=(500, d))
    edge[np.arange(500), rng.integers(d, size=500)] = rng.integers(2, size=500)
    test = rng.uniform(size=(10000, d))
    truth = np.asarray(jax.vmap(u)(jnp.asarray(test, float)))
    draw = box(np.zeros(d), np.ones(d))
    return Equation(d, network, inside, draw, edge, u, (test, truth))


def pairs(p: jax.Array) -> jax.Array:
    return jnp.sum(p[::2] * p[1::2])


EQUATIONS = {
    "Poisson 2-D": lambda: poisson(
        2,
        lambda p: jnp.prod(jnp.sin(jnp.pi * p)),
        lambda p: -2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * p)),
    ),
    "Burgers 0.01/π": lambda: burgers(0.01 / np.pi),
    "Burgers 1/1000": lambda: burgers(1e-3),
    "Allen-Cahn": allen_cahn,
    "KdV": korteweg_de_vries,
    "Poisson 5-D": lambda: poisson(
        5,
        lambda p: jnp.sum(jnp.cos(jnp.pi * p)),
        lambda p: -(jnp.pi**2) * jnp.sum(jnp.cos(jnp.pi * p)),
    ),
    "Poisson 10-D": lambda: poisson(10, pairs, lambda p: jnp.zeros(())),
}
