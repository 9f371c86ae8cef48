"""Small tasks on real data, each trained in minutes on two cores: data, a flax model and a loss."""

import dataclasses
import gzip
import math
import sysconfig
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = tuple[jax.Array, jax.Array]
"""Inputs and targets, examples along the first axis."""


class DataError(Exception):
    """A data file is missing or damaged; the message says which, and where to get it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A network, its data and its loss.

    The arrays are fields rather than closures so that they enter a jitted function as arguments:
    constants would be copied into the compiled program.

    Attributes:
      model: the network.
      train: what `sample` draws batches from.
      held_out: a batch nothing is trained on.
      sample: ``(key, train) -> Batch``, one batch for a training step.
      losses: ``(outputs, targets) -> (examples,)``.
      correct: ``(outputs, targets) ->`` fraction of right answers of every example; ``None`` where
        the task has no such notion.
      steps: a run long enough to tell optimizers apart.
      seeds: how many seeds tell them apart.
      residuals: ``(params, batch) -> (k,)`` where the loss is half their squared norm, else
        ``None``.
    """

    model: nn.Module
    train: Batch
    held_out: Batch
    sample: Callable[[jax.Array, Batch], Batch]
    losses: Callable[[jax.Array, jax.Array], jax.Array]
    correct: Callable[[jax.Array, jax.Array], jax.Array] | None
    steps: int
    seeds: int = 5
    residuals: Callable[[Any, Batch], jax.Array] | None = None

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters."""
        return self.model.init(key, self.held_out[0][:1])["params"]

    def outputs(self, params: Any, inputs: jax.Array) -> Any:
        """The model's outputs for inputs."""
        return self.model.apply({"params": params}, inputs)

    def loss(self, params: Any, batch: Batch) -> jax.Array:
        """Mean loss over a batch; of residuals, half their squared norm."""
        if self.residuals is not None:
            return 0.5 * jnp.sum(jnp.square(self.residuals(params, batch)))
        return self.losses(self.outputs(params, batch[0]), batch[1]).mean()

    def measure(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Mean loss and accuracy over a batch; the accuracy is NaN where the task has none."""
        inputs, targets = batch
        outputs = self.outputs(params, inputs)
        accuracy = jnp.nan if self.correct is None else self.correct(outputs, targets).mean()
        return self.losses(outputs, targets).mean(), jnp.asarray(accuracy)


def source(data_dir: Path | None = None) -> Task:
    """Predict the next character of Python's standard library: 2 layers of width 64.

    The modules of one folder in the order of their names; every tenth is held out. Another version
    of Python has other files, so that figures compare on one machine alone.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if len(files) < 20:
        raise DataError(f"{folder} has {len(files)} modules as files; this task needs 20")
    # Printable characters and the end of a line; what is neither has one character for itself.
    codes = np.full(256, 96, np.int32)
    codes[32:127] = np.arange(95)
    codes[10] = 95
    texts = [codes[np.frombuffer(file.read_bytes(), np.uint8)] for file in files]
    training = np.concatenate([text for i, text in enumerate(texts) if i % 10])
    return _characters(training, np.concatenate(texts[::10]), 97, windows=96, steps=300, seeds=1)


def poisson(data_dir: Path | None = None) -> Task:
    r"""Solve Poisson's equation on a square by a network, as a least-squares problem.

    Residuals of ``Δu = -2π² sin(πx) sin(πy)`` at 144 points and of ``u = 0`` at 48 of the boundary,
    all in every step; the held-out loss is the mean square of ``u - sin(πx) sin(πy)`` on a grid.
    """
    inside = (np.arange(12) + 0.5) / 12
    points = np.stack(np.meshgrid(inside, inside), -1).reshape(-1, 2)
    ends, side = np.repeat([0.0, 1.0], 12), np.tile(inside, 2)
    walls = np.concatenate([np.stack([ends, side], 1), np.stack([side, ends], 1)])
    line = np.linspace(0.0, 1.0, 41)
    grid = jnp.asarray(np.stack(np.meshgrid(line, line), -1).reshape(-1, 2), jnp.float32)
    exact = lambda x: jnp.prod(jnp.sin(jnp.pi * x), -1, keepdims=True)
    model = Perceptron((16, 16, 1), nn.tanh)

    def residuals(params: Any, batch: Batch) -> jax.Array:
        u = lambda x: model.apply({"params": params}, x)[0]
        laplacian = jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)))(batch[0])
        wanted = -2 * jnp.pi**2 * exact(batch[0])[:, 0]
        edge = jax.vmap(u)(batch[1])
        weigh = lambda r: r / jnp.sqrt(len(r))
        return jnp.concatenate([weigh(laplacian - wanted), 10 * weigh(edge)])

    return Task(
        model=model,
        train=(jnp.asarray(points, jnp.float32), jnp.asarray(walls, jnp.float32)),
        held_out=(grid, exact(grid)),
        sample=lambda key, data: data,
        losses=lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1),
        correct=None,
        steps=400,
        seeds=3,
        residuals=residuals,
    )


def digits(data_dir: Path | None = None) -> Task:
    """Classify the 8×8 digits of scikit-learn: 64-128-128-10 network, cross-entropy."""
    images, labels = _digits()
    train, held_out = _split((images, labels), 1500)
    return Task(
        model=Perceptron((128, 128, 10), nn.relu),
        train=train,
        held_out=held_out,
        sample=_minibatch(128),
        losses=optax.softmax_cross_entropy_with_integer_labels,
        correct=_hits,
        steps=300,
    )


def autoencoder(data_dir: Path | None = None) -> Task:
    """Squeeze the digits of scikit-learn through 16 units; squared error, summed over pixels."""
    images, _ = _digits()
    train, held_out = _split((images, images), 1500)
    return Task(
        model=Perceptron((64, 128, 64, 16, 64, 128, 64, 64), nn.tanh),
        train=train,
        held_out=held_out,
        sample=_minibatch(128),
        losses=lambda outputs, targets: jnp.sum((outputs - targets) ** 2, axis=-1),
        correct=None,
        steps=1000,
    )


def mnist(data_dir: Path | None = None) -> Task:
    """Classify 28×28 digits, 8,000 for training and 2,000 held out: convolutions, cross-entropy."""

    def read(name: str) -> np.ndarray:
        source = f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}"
        return _idx(_read(data_dir, (f"mnist-{name}", name), source))

    images, labels = read("t10k-images-idx3-ubyte.gz"), read("t10k-labels-idx1-ubyte.gz")
    train, held_out = _split((images[..., None] / np.float32(255), labels.astype(np.int32)), 8000)
    return Task(
        model=ConvNet((16, 32), 64, 10),
        train=train,
        held_out=held_out,
        sample=_minibatch(128),
        losses=optax.softmax_cross_entropy_with_integer_labels,
        correct=_hits,
        steps=500,
    )


def text(data_dir: Path | None = None) -> Task:
    """Predict the next character of Shakespeare: 2 layers of width 64 over 64 characters."""
    folder = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
    raw = _read(data_dir, ("tinyshakespeare.txt.gz", "input.txt"), f"{folder}/input.txt")
    alphabet, characters = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    characters = characters.astype(np.int32)
    end = int(0.9 * len(characters))
    return _characters(characters[:end], characters[end:], len(alphabet), windows=512, steps=1000)


def _characters(
    training: np.ndarray, rest: np.ndarray, alphabet: int, windows: int, **options: Any
) -> Task:
    """The next character of one text, held-out loss on windows of another, all over it."""
    length = 64
    # Enough to tell optimizers apart, and little beside the cost of training.
    windows = min((len(rest) - 1) // length, windows)
    start = np.linspace(0, len(rest) - 1 - length, windows).astype(int)[:, None]
    tail = jnp.asarray(rest[start + np.arange(length + 1)])
    text = jnp.asarray(training)
    return Task(
        model=CharTransformer(alphabet, width=64, layers=2, heads=4, length=length),
        train=(text, text),
        held_out=(tail[:, :-1], tail[:, 1:]),
        sample=_windows(16, length),
        losses=lambda outputs, targets: optax.softmax_cross_entropy_with_integer_labels(
            outputs, targets
        ).mean(-1),
        correct=lambda outputs, targets: _hits(outputs, targets).mean(-1),
        **options,
    )


TASKS: dict[str, Callable[[Path | None], Task]] = {
    "source": source,
    "digits": digits,
    "autoencoder": autoencoder,
    "mnist": mnist,
    "text": text,
    "poisson": poisson,
}


class Perceptron(nn.Module):
    """Dense layers with an activation between them."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        """``(examples, features) -> (examples, widths[-1])``."""
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class ConvNet(nn.Module):
    """3×3 convolutions of stride 2, then two dense layers.

    A convolution is written as a product with shifted slices: on a CPU, XLA runs its own
    convolutions ten times slower inside a loop such as `jax.lax.scan`.
    """

    channels: tuple[int, ...]
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        """``(examples, height, width, 1) -> (examples, classes)``."""
        for channels in self.channels:
            height, width = x.shape[1:3]
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            shifts = [(i, j) for i in range(3) for j in range(3)]
            patches = [x[:, i : i + height : 2, j : j + width : 2] for i, j in shifts]
            x = nn.relu(nn.Dense(channels)(jnp.concatenate(patches, -1)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(self.classes)(x)


class CharTransformer(nn.Module):
    """A causal transformer with normalisation before each block."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int

    @nn.compact
    def __call__(self, x):
        """``(examples, length)`` integers to ``(examples, length, vocabulary)`` logits."""
        mask = nn.make_causal_mask(x)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = nn.Embed(self.vocabulary, self.width)(x) + positions[: x.shape[1]]
        for _ in range(self.layers):
            x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.asarray(images, np.float32) / 16, np.asarray(labels, np.int32)


def _split(data: tuple[np.ndarray, np.ndarray], count: int) -> tuple[Batch, Batch]:
    """``count`` examples to train on and the rest, shuffled once: files are ordered by writer."""
    order = np.random.default_rng(0).permutation(len(data[0]))

    def take(index: np.ndarray) -> Batch:
        return jnp.asarray(data[0][index]), jnp.asarray(data[1][index])

    return take(order[:count]), take(order[count:])


def _minibatch(size: int) -> Callable[[jax.Array, Batch], Batch]:
    def sample(key: jax.Array, data: Batch) -> Batch:
        index = jax.random.randint(key, (size,), 0, len(data[0]))
        return data[0][index], data[1][index]

    return sample


def _windows(size: int, length: int) -> Callable[[jax.Array, Batch], Batch]:
    def sample(key: jax.Array, data: Batch) -> Batch:
        start = jax.random.randint(key, (size, 1), 0, len(data[0]) - length)
        window = data[0][start + jnp.arange(length + 1)]
        return window[:, :-1], window[:, 1:]

    return sample


def _hits(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return (outputs.argmax(-1) == targets).astype(jnp.float32)


def _read(directory: Path | None, names: tuple[str, ...], source: str) -> bytes:
    """The unpacked bytes of the first of ``names`` found in the directory."""
    needed = " or ".join(names)
    remedy = f"get it from {source} and name its directory with --data-dir or LOWRANK_OPTAX_DATA"
    if directory is None:
        raise DataError(f"this task needs {needed}: {remedy}")
    path = next((p for p in (directory / name for name in names) if p.is_file()), None)
    if path is None:
        raise DataError(f"no {needed} in {directory}: {remedy}")
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        if not content:
            raise EOFError("it is empty")
        return content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): {remedy}") from error


def _idx(raw: bytes) -> np.ndarray:
    """An array of bytes in the IDX format: 0, 0, type 8, number of axes, sizes, data."""
    axes = raw[3] if len(raw) > 3 else 0
    shape = np.frombuffer(raw, ">u4", axes, 4) if len(raw) >= 4 + 4 * axes else ()
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * axes + math.prod(map(int, shape)):
        raise DataError("the MNIST files are not in the IDX format; get them again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
