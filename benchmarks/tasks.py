"""The tasks that optimizers are compared on, and two more that are too easy to count.

Each has parameters, batches, a loss, and one number that an optimizer is judged by, see
`problems.py`. The smaller networks and the functions are here, the rest in `networks.py`. Some read
files of a folder, see `datasets.py`.
"""

import functools
import random
from collections.abc import Callable

import datasets
import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
from models import CharTransformer, ConvNet, Perceptron
from problems import CROSS_ENTROPY, Problem, minibatch, supervised, windows


def digits() -> Problem:
    """64-128-128-10 network on scikit-learn's digits."""
    parts = datasets.split(datasets.digits(), 1500)
    return supervised(
        Perceptron((128, 128, 10), nn.relu), parts, minibatch(128), CROSS_ENTROPY, 300
    )


def autoencoder() -> Problem:
    """Digits through 16 units; squared error, summed over pixels."""
    images, _ = datasets.digits()
    model = Perceptron((64, 128, 64, 16, 64, 128, 64, 64), nn.tanh)
    losses = lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1)
    return supervised(model, datasets.split((images, images), 1500), minibatch(128), losses, 2000)


def mnist() -> Problem:
    """Convolutions on 8,000 MNIST digits."""
    parts = datasets.split(datasets.mnist(), 8000)
    model = ConvNet((16, 32), 64, 10)
    return supervised(model, parts, minibatch(128), CROSS_ENTROPY, 500, most=2000)


def text(most: int | None = 256) -> Problem:
    """Character transformer on Shakespeare, two layers of width 64."""
    characters, vocabulary = datasets.shakespeare()
    length, end = 64, int(0.9 * len(characters))
    training = jnp.asarray(characters[:end])
    # Enough to tell optimizers apart, and little beside the cost of training.
    count = min((len(characters) - 1 - end) // length, 512)
    tail = jnp.asarray(characters[end : end + count * length + 1])
    held_out = tail[:-1].reshape(count, length), tail[1:].reshape(count, length)
    return supervised(
        CharTransformer(vocabulary, width=64, layers=2, heads=4, length=length),
        ((training, training), held_out),
        windows(16, length),
        lambda outputs, targets: CROSS_ENTROPY(outputs, targets).mean(-1),
        1000,
        "held-out",
        most,
    )


def a9a() -> Problem:
    """123-64-64-2 network on the census data a9a."""
    parts = datasets.adult("a9a"), datasets.adult("a9a.t")
    return supervised(Perceptron((64, 64, 2), nn.relu), parts, minibatch(256), CROSS_ENTROPY, 1000)


def pinn() -> Problem:
    """``-Δu = f`` on the unit square with ``u = sin πx sin πy``: 900 points inside, 160 around."""
    model = Perceptron((32, 32, 32, 1), nn.tanh)
    line = (jnp.arange(30) + 0.5) / 30
    inside = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
    edge = (jnp.arange(40) + 0.5) / 40
    zero, one = jnp.zeros(40), jnp.ones(40)
    sides = [(edge, zero), (edge, one), (zero, edge), (one, edge)]
    around = jnp.concatenate([jnp.stack(side, -1) for side in sides])
    fine = jnp.linspace(0, 1, 50)
    test = jnp.stack(jnp.meshgrid(fine, fine), -1).reshape(-1, 2)
    truth = lambda x: jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(jnp.pi * x[..., 1])

    def u(params, x):
        return model.apply({"params": params}, x[None])[0, 0]

    def laplacian(params, x):
        f = functools.partial(u, params)
        second = lambda v: jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]
        return sum(second(v) for v in jnp.eye(2))

    def residuals(params, data):
        inside, around = data[:2]
        force = 2 * jnp.pi**2 * truth(inside)
        r = jax.vmap(functools.partial(laplacian, params))(inside) + force
        b = jax.vmap(functools.partial(u, params))(around)
        return jnp.concatenate([r / len(r) ** 0.5, b / len(b) ** 0.5])

    def error(params, data):
        found = jax.vmap(functools.partial(u, params))(data[2])
        return jnp.linalg.norm(found - truth(data[2])) / jnp.linalg.norm(truth(data[2]))

    return Problem(
        init=lambda key: model.init(key, jnp.zeros((1, 2)))["params"],
        data=(inside, around, test),
        batch=lambda key, data: data,
        # The sum of the squares, as a mean.
        losses=lambda p, batch: residuals(p, batch) ** 2 * (len(inside) + len(around)),
        measure=error,
        quantity="relative error",
        steps=2000,
        deterministic=True,
    )


def xor() -> Problem:
    """Delayed exclusive or: a recurrent net of 30 units, two marked bits in sequences of 16."""
    length, width = 16, 30

    def draw(key, size):
        bits, first, second = jax.random.split(key, 3)
        x = jax.random.bernoulli(bits, 0.5, (size, length)).astype(jnp.float32)
        i = jax.random.randint(first, (size,), 0, length // 3)
        j = jax.random.randint(second, (size,), length // 3, length // 2)
        mark = jax.nn.one_hot(i, length) + jax.nn.one_hot(j, length)
        each = jnp.arange(size)
        target = jnp.abs(x[each, i] - x[each, j])
        return jnp.stack([2 * x - 1, mark], -1), target

    def init(key):
        a, b, c = jax.random.split(key, 3)
        return {
            "recurrent": jax.nn.initializers.orthogonal()(a, (width, width)),
            "input": 0.3 * jax.random.normal(b, (2, width)),
            "bias": jnp.zeros(width),
            "out": 0.3 * jax.random.normal(c, (width, 1)),
            "out_bias": jnp.zeros(1),
        }

    def losses(p, batch):
        x, target = batch

        def step(h, at):
            return jnp.tanh(h @ p["recurrent"] + at @ p["input"] + p["bias"]), None

        h = jax.lax.scan(step, jnp.zeros((len(x), width)), jnp.moveaxis(x, 1, 0))[0]
        logits = (h @ p["out"] + p["out_bias"])[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits, target)

    return Problem(
        init=init,
        data=draw(jax.random.key(1), 2000),
        batch=lambda key, data: draw(key, 128),
        losses=losses,
        measure=lambda p, data: jnp.mean(losses(p, data)),
        quantity="loss on fresh sequences",
        steps=2000,
    )


def function(f: Callable[..., jax.Array], start: list[float], steps: int) -> Problem:
    """A function of two variables, from a start that seeds move by a tenth."""
    return Problem(
        init=lambda key: jnp.array(start) + 0.1 * jax.random.normal(key, (2,)),
        data=(),
        batch=lambda key, data: (),
        losses=lambda x, batch: f(x)[None],
        measure=lambda x, data: f(x),
        quantity="value",
        steps=steps,
        deterministic=True,
        network=False,
    )


def rosenbrock() -> Problem:
    """``(1 - x)² + 100 (y - x²)²`` from (-1.2, 1)."""
    f = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    return function(f, [-1.2, 1.0], 500)


def booth() -> Problem:
    """``(x + 2y - 7)² + (2x + y - 5)²`` from (-5, -5)."""
    f = lambda x: (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2
    return function(f, [-5.0, -5.0], 50)


def quadratic() -> Problem:
    """``x^T A x / 2`` in 200 dimensions, eigenvalues from 1 to 1e-6, rotated."""
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (200, 200)))[0]
    root = jnp.logspace(0, -3, 200)[:, None] * turn
    f = lambda x, root: jnp.sum((root @ x) ** 2) / 2
    return Problem(
        init=lambda key: 10 * jax.random.normal(key, (200,)),
        data=root,
        batch=lambda key, data: data,
        losses=lambda x, root: f(x, root)[None],
        measure=f,
        quantity="value",
        steps=500,
        deterministic=True,
        network=False,
    )


def logistic() -> Problem:
    """Logistic regression on 2,000 examples, batches of 64, mixed features of condition 1e4."""
    a, b, c = jax.random.split(jax.random.key(3), 3)
    mix = jnp.linalg.qr(jax.random.normal(a, (100, 100)))[0]
    x = jax.random.normal(b, (2000, 100)) * jnp.logspace(0, -2, 100) @ mix
    truth = mix.T @ (jax.random.normal(c, (100,)) * jnp.logspace(0.5, 1.5, 100))
    y = (jax.random.uniform(jax.random.key(4), (2000,)) < jax.nn.sigmoid(x @ truth)).astype(float)

    def losses(w, batch):
        x, y = batch
        return optax.sigmoid_binary_cross_entropy(x @ w, y) + 1e-4 * jnp.sum(w**2) / 2

    def best() -> float:
        """The smallest loss, by Newton's method in float64."""
        xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
        w = np.zeros(100)
        for _ in range(30):
            p = 1 / (1 + np.exp(-xs @ w))
            gradient = xs.T @ (p - ys) / len(ys) + 1e-4 * w
            hessian = (xs * (p * (1 - p))[:, None]).T @ xs / len(ys) + 1e-4 * np.eye(100)
            w -= np.linalg.solve(hessian, gradient)
        margin = (2 * ys - 1) * (xs @ w)
        return float(np.mean(np.logaddexp(0, -margin)) + 1e-4 * np.sum(w**2) / 2)

    least = best()

    def batch(key, data):
        at = jax.random.randint(key, (64,), 0, len(data[1]))
        return data[0][at], data[1][at]

    return Problem(
        init=lambda key: 0.01 * jax.random.normal(key, (100,)),
        data=(x, y),
        batch=batch,
        losses=losses,
        measure=lambda w, data: jnp.mean(losses(w, data)) - least,
        quantity="loss above the optimum",
        steps=1000,
        network=False,
    )


TASKS: dict[str, Callable[[], Problem]] = {
    "digits": digits,
    "autoencoder": autoencoder,
    "a9a": a9a,
    "mnist": mnist,
    "text": text,
    "pinn": pinn,
    "xor": xor,
    **networks.TASKS,
    "rosenbrock": rosenbrock,
    "logistic": logistic,
}
"""Those that count."""

EASY = {"booth": booth, "quadratic": quadratic}
"""Convex quadratics without noise, where a few steps of L-BFGS are exact."""

UNITS = {"rosenbrock": 10**1.5, "logistic": 10.0, "booth": 10**2.5, "quadratic": 10**1.5}
"""Units of learning rates: how far parameters have to go, relative to a network's weights (1)."""

KEPT_ASIDE = tuple(random.Random(20261126).sample(sorted(networks.TASKS), 4))
"""New tasks that nobody tunes on: the library's methods run on them once, when all is decided."""
