"""The data of the benchmarks: digits of scikit-learn, and public files in a folder.

The folder is `LOWRANK_OPTAX_DATA`, which ``--data`` sets, or ``benchmarks/data``. Nothing is
downloaded: where a file is missing, one sentence says which, and where it can be had.
"""

import gzip
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

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
