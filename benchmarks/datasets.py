"""The data of the benchmarks: digits of scikit-learn, and public files in a folder.

The folder is `LOWRANK_OPTAX_DATA`, which ``--data`` sets, or ``benchmarks/data``. Nothing is
downloaded: where a file is missing, one sentence says which, and where it can be had.
"""

import gzip
import math
import os
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits, load_sample_image

Batch = tuple[jax.Array, jax.Array]
"""Inputs and targets, examples along the first axis."""

MNIST = (
    "the test images of MNIST by LeCun, Cortes and Burges, which yann.lecun.com/exdb/mnist and its "
    "mirrors have"
)
SHAKESPEARE = (
    "tiny Shakespeare by Karpathy, which github.com/karpathy/char-rnn has as "
    "data/tinyshakespeare/input.txt"
)
ADULT = (
    "UCI's Adult by Becker and Kohavi in the form of LIBSVM's data set a9a, which Chang and Lin's "
    "page of LIBSVM data has"
)


def folder() -> Path:
    """Where the files are."""
    return Path(os.environ.get("LOWRANK_OPTAX_DATA") or Path(__file__).parent / "data")


def read(names: tuple[str, ...], origin: str) -> bytes:
    """The unpacked bytes of the first of the files that is there.

    Args:
      names: names that the file may have; those that end in ``.gz`` are unpacked.
      origin: the data set, its authors and where it can be had.
    """
    where = folder()
    path = next((p for p in (where / name for name in names) if p.is_file()), None)
    if path is None:
        raise SystemExit(
            f"{where} has no {' or '.join(names)}: this is {origin}; put it there, or name its "
            "folder with --data or LOWRANK_OPTAX_DATA."
        )
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == ".gz" else content


def split(data: tuple[np.ndarray, np.ndarray], count: int) -> tuple[Batch, Batch]:
    """``count`` examples to train on and the rest, shuffled once: files are ordered by writer."""
    order = np.random.default_rng(0).permutation(len(data[0]))
    take = lambda index: (jnp.asarray(data[0][index]), jnp.asarray(data[1][index]))
    return take(order[:count]), take(order[count:])


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 8×8 digits of scikit-learn: pixels in [0, 1], ``(1797, 64)``, and labels."""
    images, labels = load_digits(return_X_y=True)
    return np.asarray(images, np.float32) / 16, np.asarray(labels, np.int32)


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test images of MNIST: pixels in [0, 1], ``(10000, 28, 28, 1)``, and labels."""
    names = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
    images, labels = (_idx(read((name, f"mnist-{name}"), MNIST)) for name in names)
    return images[..., None] / np.float32(255), labels.astype(np.int32)


def _idx(raw: bytes) -> np.ndarray:
    """An array of bytes in the IDX format: 0, 0, type 8, number of axes, sizes, data."""
    shape = np.frombuffer(raw, ">u4", raw[3], 4)
    array = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if raw[:3] != b"\0\0\x08" or array.size != math.prod(map(int, shape)):
        raise SystemExit("The MNIST files are not in the IDX format: they are damaged.")
    return array.reshape(shape)


def shakespeare() -> tuple[np.ndarray, int]:
    """A megabyte of Shakespeare as numbers of characters, and how many characters there are."""
    raw = read(("input.txt", "tinyshakespeare.txt.gz"), SHAKESPEARE)
    alphabet, characters = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    return characters.astype(np.int32), len(alphabet)


def adult(part: str) -> Batch:
    """The census data a9a, 123 binary features and two classes; ``part`` is "a9a" or "a9a.t"."""
    lines = read((part, f"{part}.libsvm.gz"), ADULT).decode().splitlines()
    x, y = np.zeros((len(lines), 123), np.float32), np.zeros(len(lines), np.int32)
    for i, line in enumerate(lines):
        label, *features = line.split()
        y[i] = float(label) > 0
        for feature in features:
            at, value = feature.split(":")
            x[i, int(at) - 1] = float(value)
    return jnp.asarray(x), jnp.asarray(y)


def standard_library() -> tuple[np.ndarray, np.ndarray, int]:
    """Python's own modules of 10 to 100 kB as numbers of characters, to train on and held out.

    Every tenth file of the sorted names is held out. The alphabet is printable ASCII, the end of a
    line, and one number for the rest. Other versions of Python have other texts.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [path for path in files if 10_000 <= path.stat().st_size <= 100_000]
    numbers = np.full(256, 96, np.uint8)
    numbers[32:127] = np.arange(95)
    numbers[ord("\n")] = 95
    read = lambda paths: numbers[np.frombuffer(b"".join(p.read_bytes() for p in paths), np.uint8)]
    return read([p for i, p in enumerate(files) if i % 10]), read(files[::10]), 97


def picture(side: int) -> np.ndarray:
    """A square of scikit-learn's photograph of a flower, ``(side, side, 3)``, in [-1, 1]."""
    photograph = np.asarray(load_sample_image("flower.jpg"), np.float32)
    middle = photograph[13:413, 170:570]
    cell = 400 // side
    middle = middle[: cell * side, : cell * side].reshape(side, cell, side, cell, 3)
    return middle.mean((1, 3)) / 127.5 - 1


def graphs(count: int, nodes: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Random geometric graphs with one number per node, and that number spread by a random walk.

    Inputs are ``(count, nodes, nodes + 1)``: the walk's matrix ``P`` and the numbers ``x``. Targets
    are ``(I - .9 P)^-1 x``, of unit variance.
    """
    rng = np.random.default_rng(5)
    at = rng.random((count, nodes, 2))
    near = np.linalg.norm(at[:, :, None] - at[:, None], axis=-1) < 0.3
    walk = near / near.sum(-1, keepdims=True)
    x = rng.normal(size=(count, nodes, 1))
    spread = np.linalg.solve(np.eye(nodes) - 0.9 * walk, x)[..., 0]
    inputs = np.concatenate([walk, x], -1)
    return inputs.astype(np.float32), (spread / spread.std()).astype(np.float32)


def ratings(count: int, users: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Who rated what, ``(count, 2)``, and how: a product of hidden vectors, and noise.

    Users and items are drawn by Zipf's law, so most rows of a table are rare.
    """
    rng = np.random.default_rng(6)
    draw = lambda n: rng.choice(n, count, p=(z := 1 / np.arange(1, n + 1)) / z.sum())
    pairs = np.stack([draw(users), draw(items)], -1)
    a, b = rng.normal(size=(users, 6)), rng.normal(size=(items, 6))
    product = np.sum(a[pairs[:, 0]] * b[pairs[:, 1]], -1)
    rated = np.tanh(product / 2) + 0.3 * rng.normal(size=count)
    return pairs.astype(np.int32), rated.astype(np.float32)
