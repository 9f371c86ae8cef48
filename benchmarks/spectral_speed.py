"""Milliseconds a training step at the network of the original, by how the Laplacian is taken.

Two-dimensional hydrogen, 16 softplus networks of 128-128-128 on 1024 fixed Fourier features,
sequential nesting, RMSprop: the setup of Ryu et al., "Operator SVD with Neural Networks via Nested
Low-Rank Approximation", ICML 2024. Three steps that differ in the Laplacian alone: one forward pass
that carries it, central differences (5 evaluations, two of them a coordinate), and the trace of a
nested `jax.hessian`. Variants take turns, so that a busy moment of the machine hits all of them;
reported are medians. Beside them stands how far each Laplacian is from the trace of the Hessian in
float64.

    python benchmarks/spectral_speed.py [--batches 128 512] [--repeats 5] [--out DIR]
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

from lowrank_optax import spectral
from lowrank_optax.spectral import operators

MODES = 16
STEP = 0.01
"""Of the central differences, in units of the coordinates, as in the original."""

LAPLACIANS: dict[str, Callable] = {}


def laplacian(function: Callable) -> Callable:
    LAPLACIANS[function.__name__] = function
    return function


@laplacian
def forward(function, x):
    jet = spectral.laplacian(function, x)
    return jet.value, jet.laplacian


@laplacian
def differences(function, x):
    value = function(x)
    moves = STEP * jnp.concatenate(
        [jnp.eye(len(x), dtype=x.dtype), -jnp.eye(len(x), dtype=x.dtype)]
    )
    around = jax.vmap(lambda move: function(x + move))(moves)
    return value, (jnp.sum(around, 0) - 2 * len(x) * value) / STEP**2


@laplacian
def hessian(function, x):
    return function(x), jnp.trace(jax.hessian(function)(x), axis1=-2, axis2=-1)


def network() -> spectral.networks.MLP:
    features = spectral.networks.FourierFeatures(1024, 2 * np.pi * 0.1)
    return spectral.networks.MLP(MODES, (128, 128, 128), features=features)


def trainer(size: int, apply: Callable) -> Callable[[], float]:
    """Takes a step and says how many seconds it took."""
    module, method = network(), spectral.NestedLoRA()
    proposal, potential = operators.gaussian(2, 16.0), operators.Hydrogen()
    optimizer = optax.rmsprop(1e-4)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(2))
    state = optimizer.init(params)
    envelope = lambda x: proposal.log_density(x, proposal.init()) / 2

    @jax.jit
    def step(params, state, key):
        points = proposal.draw(key, size, proposal.init())

        def loss(params):
            # The functions are the network times the root of the density, 100 times the operator.
            def at(x):
                size = envelope(x)
                psi = lambda y: module.apply(params, y) * jnp.exp(envelope(y) - size)
                value, laplace = apply(psi, x)
                return value, 100 * (laplace - potential(x) * value)

            f, tf = jax.vmap(at)(points)
            out: Any = spectral.surrogate(method, ((f, jax.lax.stop_gradient(tf)),))
            return out[0]

        updates, new = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), new

    keys = iter(jax.random.split(jax.random.key(1), 1000))

    def timed() -> float:
        nonlocal params, state
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, next(keys)))
        return time.perf_counter() - start

    timed()  # compiles
    return timed


def errors() -> dict[str, float]:
    """Of every Laplacian in float32, relative in norm, to the Hessian's trace in float64."""
    trunk = spectral.networks.MLP(MODES, (128, 128, 128))
    params = jax.jit(trunk.init)(jax.random.key(0), jnp.zeros(2048))
    waves = 2 * np.pi * 0.1 * jax.random.normal(jax.random.key(1), (1024, 2))
    points = 16 * jax.random.normal(jax.random.key(2), (64, 2))

    @partial(jax.jit, static_argnums=0)
    def take(apply, params, waves, points):
        features = lambda x: jnp.concatenate([jnp.sin(waves @ x), jnp.cos(waves @ x)])
        return jax.vmap(lambda x: apply(lambda x: trunk.apply(params, features(x)), x)[1])(points)

    narrow = jax.tree.map(np.asarray, (params, waves, points))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(np.float64), narrow)
        exact = np.asarray(take(hessian, *wide))
    out = {}
    for name, apply in LAPLACIANS.items():
        got = np.asarray(take(apply, *narrow), np.float64)
        out[name] = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds a training step.")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    wrong, rows = errors(), []
    for size in args.batches:
        steps = {name: trainer(size, apply) for name, apply in LAPLACIANS.items()}
        seconds = {name: [] for name in steps}
        for _ in range(args.repeats):
            for name, step in steps.items():
                seconds[name].append(step())
        base = float(np.median(seconds["forward"]))
        for name, taken in seconds.items():
            row = {"batch": size, "laplacian": name, "milliseconds": 1e3 * float(np.median(taken))}
            spread = {"low": 1e3 * min(taken), "high": 1e3 * max(taken)}
            ratio = float(np.median(taken)) / base
            rows.append(row | spread | {"ratio": ratio, "relative_error": wrong[name]})
    columns = {
        "batch": "batch",
        "laplacian": "Laplacian",
        "milliseconds": "ms a step",
        "low": "fastest",
        "high": "slowest",
        "ratio": "of forward",
        "relative_error": "relative error",
    }
    report.show("A step of 16 networks of 128-128-128 on 1024 Fourier features", rows, columns)
    report.save(args.out / "spectral_speed.json", settings=vars(args) | {"out": None}, rows=rows)


if __name__ == "__main__":
    main()
