"""Networks of many kinds, small enough that a run takes one core a few seconds.

What a method does on them is judged by held-out loss wherever examples are drawn from a set.
"""

from collections.abc import Callable

import datasets
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import (
    CharTransformer,
    Denoiser,
    Experts,
    Messages,
    Picture,
    Recurrent,
    Residual,
    Scanned,
    TwoTowers,
    Variational,
    VisionTransformer,
)
from problems import CROSS_ENTROPY, Problem, minibatch, supervised, windows

Array = jax.Array


def letters(
    model: nn.Module, texts: tuple[np.ndarray, np.ndarray], size: int, length: int, steps: int
) -> Problem:
    """Next characters of a text; judged on 40 pieces, evenly spaced in the held-out text."""
    training, rest = texts
    at = np.linspace(0, len(rest) - length - 1, 40).astype(int)[:, None] + np.arange(length + 1)
    pieces = jnp.asarray(rest[at])
    training = jnp.asarray(training)
    return supervised(
        model,
        ((training, training), (pieces[:, :-1], pieces[:, 1:])),
        windows(size, length),
        lambda outputs, targets: CROSS_ENTROPY(outputs, targets).mean(-1),
        steps,
        "held-out",
    )


def code() -> Problem:
    """Character transformer on the Python standard library, two layers of width 64."""
    *texts, vocabulary = datasets.standard_library()
    model = CharTransformer(vocabulary, width=64, layers=2, heads=4, length=48)
    return letters(model, tuple(texts), 8, 48, 400)


def gru() -> Problem:
    """Gated recurrent units on Shakespeare's characters."""
    characters, vocabulary = datasets.shakespeare()
    end = int(0.9 * len(characters))
    return letters(Recurrent(vocabulary, 96), (characters[:end], characters[end:]), 16, 32, 400)


def vit() -> Problem:
    """Vision transformer on digits, a fifth of the labels wrong, judged by true ones."""
    (images, labels), rest = datasets.split(datasets.digits(), 1200)
    wrong, new = jax.random.split(jax.random.key(7))
    labels = jnp.where(
        jax.random.bernoulli(wrong, 0.2, labels.shape),
        jax.random.randint(new, labels.shape, 0, 10),
        labels,
    )
    square = lambda x: x.reshape(-1, 8, 8, 1)
    parts = (square(images), labels), (square(rest[0][:300]), rest[1][:300])
    model = VisionTransformer(patch=2, width=48, layers=2, heads=4, classes=10)
    return supervised(model, parts, minibatch(24), CROSS_ENTROPY, 400, "held-out")


def vae() -> Problem:
    """Variational autoencoder of MNIST, 784-128-16-128-784; the negative evidence bound."""
    images, _ = datasets.mnist()
    (training, _), (rest, _) = datasets.split((images.reshape(-1, 784),) * 2, 8000)
    model = Variational(128, 16)

    def losses(params, batch):
        x, noise = batch
        logits, mean, log_variance = model.apply({"params": params}, x, noise)
        divergence = (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        pixels = optax.sigmoid_binary_cross_entropy(logits, x)
        return pixels.sum(-1) + divergence.sum(-1)

    def batch(key, data):
        at, noise = jax.random.split(key)
        index = jax.random.randint(at, (64,), 0, len(data[0]))
        return data[0][index], jax.random.normal(noise, (64, 16))

    held_out = lambda params, data: jnp.mean(losses(params, data[1:]))
    fixed = jax.random.normal(jax.random.key(8), (500, 16))
    return Problem(
        init=lambda key: model.init(key, rest[:1], fixed[:1])["params"],
        data=(training, rest[:500], fixed),
        batch=batch,
        losses=losses,
        measure=held_out,
        quantity="held-out negative evidence bound",
        steps=500,
        held_out=held_out,
    )


def image() -> Problem:
    """A photograph as a network from sines of coordinates to colours; squared error."""
    side = 64
    colours = jnp.asarray(datasets.picture(side)).reshape(-1, 3)
    line = (jnp.arange(side) + 0.5) * 2 / side - 1
    at = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    error = lambda outputs, targets: jnp.mean((outputs - targets) ** 2, -1)
    model = Picture(64, 5.0, (64, 64, 64, 3))
    return supervised(model, ((at, colours),) * 2, minibatch(512), error, 500)


def residual() -> Problem:
    """Convolutions, depthwise ones too, with normalisation and shortcuts on 4,000 MNIST digits."""
    training, rest = datasets.split(datasets.mnist(), 4000)
    # Half the resolution: means of squares of four pixels.
    half = lambda x: x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
    parts = (half(training[0]), training[1]), (half(rest[0][:500]), rest[1][:500])
    return supervised(Residual((16, 32), 10), parts, minibatch(32), CROSS_ENTROPY, 400, "held-out")


def graph() -> Problem:
    """Messages on random graphs, to predict how a random walk spreads numbers over the nodes."""
    inputs, targets = map(jnp.asarray, datasets.graphs(4150))
    parts = (inputs[:4000], targets[:4000]), (inputs[4000:], targets[4000:])
    error = lambda outputs, targets: jnp.mean((outputs - targets) ** 2, -1)
    return supervised(Messages(40, 3), parts, minibatch(24), error, 500, "held-out")


def recommender() -> Problem:
    """Two towers over tables of 300 users and 200 items, most of them rare; squared error."""
    pairs, rated = map(jnp.asarray, datasets.ratings(34000, 300, 200))
    parts = (pairs[:30000], rated[:30000]), (pairs[30000:], rated[30000:])
    error = lambda outputs, targets: (outputs - targets) ** 2
    return supervised(TwoTowers(300, 200, 32), parts, minibatch(256), error, 600, "held-out")


def diffusion() -> Problem:
    """Denoising diffusion of digits by dense residual blocks; the error of the noise."""
    images, _ = datasets.digits()
    (training, _), (rest, _) = datasets.split((2 * images - 1,) * 2, 1500)
    model = Denoiser(80, 2)

    def noised(key, x):
        noise = jax.random.normal(key, x.shape)
        angle = jax.random.uniform(jax.random.fold_in(key, 1), (len(x),), maxval=np.pi / 2)
        return jnp.cos(angle)[:, None] * x + jnp.sin(angle)[:, None] * noise, angle, noise

    def losses(params, batch):
        x, angle, noise = batch
        return jnp.mean((model.apply({"params": params}, x, angle) - noise) ** 2, -1)

    def batch(key, data):
        at, key = jax.random.split(key)
        return noised(key, data[0][jax.random.randint(at, (128,), 0, len(data[0]))])

    fixed = noised(jax.random.key(9), jnp.tile(rest, (2, 1)))
    held_out = lambda params, data: jnp.mean(losses(params, data[1]))
    return Problem(
        init=lambda key: model.init(key, *(x[:1] for x in fixed[:2]))["params"],
        data=(training, fixed),
        batch=batch,
        losses=losses,
        measure=held_out,
        quantity="held-out error of the noise",
        steps=600,
        held_out=held_out,
    )


def experts() -> Problem:
    """Mixtures of eight experts learn eight small networks, one for each cluster of inputs."""
    size, clusters = 24, 8
    keys = jax.random.split(jax.random.key(10), 3)
    centres = 1.5 * jax.random.normal(keys[0], (clusters, size))
    inner = jax.random.normal(keys[1], (clusters, size, size)) / size**0.5
    outer = jax.random.normal(keys[2], (clusters, size, 4)) / size**0.5

    def draw(key, count):
        which, noise = jax.random.split(key)
        c = jax.random.randint(which, (count,), 0, clusters)
        noise = jax.random.normal(noise, (count, size))
        hidden = jnp.tanh(2 * jnp.einsum("na,nab->nb", noise, inner[c]))
        return centres[c] + noise, 2 * jnp.einsum("nb,nbc->nc", hidden, outer[c])

    data = draw(jax.random.key(11), 2000)
    model = Experts(width=32, layers=2, experts=clusters, outputs=4)

    def losses(params, batch):
        return jnp.mean((model.apply({"params": params}, batch[0]) - batch[1]) ** 2, -1)

    return Problem(
        init=lambda key: model.init(key, data[0][:1])["params"],
        data=data,
        batch=lambda key, data: draw(key, 128),
        losses=losses,
        measure=lambda params, data: jnp.mean(losses(params, data)),
        quantity="loss on fresh examples",
        steps=600,
    )


def scanned() -> Problem:
    """Transformer with scanned layers over the rows of MNIST digits, at half the resolution."""
    training, rest = datasets.split(datasets.mnist(), 4000)
    half = lambda x: x.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    parts = (half(training[0]), training[1]), (half(rest[0][:500]), rest[1][:500])
    model = Scanned(width=32, layers=4, heads=4, classes=10)
    return supervised(model, parts, minibatch(24), CROSS_ENTROPY, 400, "held-out")


TASKS: dict[str, Callable[[], Problem]] = {
    f.__name__: f
    for f in (code, vit, vae, image, residual, graph, gru, recommender, diffusion, experts, scanned)
}
"""By name."""
