"""What the online trackers reach and cost, next to scikit-learn's IncrementalPCA.

One pass over two streams: spiked (``d = 500``, ten spikes from 20 down to 4 over unit noise, 10,000
vectors) and the 64-dimensional digits in random order; and, for what they cost where the rows are
long, 256 vectors of 100,000 entries. Energy is what the ten directions capture
of the stream, over what the best ten capture; the angle is the largest between the two subspaces.
The floor is two passes over ten rows a vector, in the same run. Medians over seeds, of stream and
tracker; compiling is not timed.

    python benchmarks/trackers.py [--quick] [--out DIR] [--trackers "Brand;PAST"]
"""

import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the eigenproblems are too small for more

import jax
import jax.numpy as jnp
import numpy as np
import report
from sklearn.datasets import load_digits
from sklearn.decomposition import IncrementalPCA

from lowrank_optax.online import trackers

RANK = 10
# How a tracker is made for a stream of n vectors, and how many it takes at once.
TRACKERS = {
    "Oja": (lambda n: trackers.oja(RANK), 1),
    "Oja, 20 at once": (lambda n: trackers.oja(RANK, buffer=20), 20),
    "Krasulina": (lambda n: trackers.krasulina(RANK), 1),
    "AdaOja": (lambda n: trackers.ada_oja(RANK), 1),
    "Sanger": (lambda n: trackers.Sanger(RANK), 1),
    "CCIPCA": (lambda n: trackers.CCIPCA(RANK), 1),
    "Brand, m = r": (lambda n: trackers.brand(RANK, slots=RANK), 1),
    "Brand": (lambda n: trackers.brand(RANK), 1),
    "HistoryPCA": (lambda n: trackers.history_pca(RANK), 1),
    "PAST": (lambda n: trackers.PAST(RANK), 1),
    "OPAST": (lambda n: trackers.opast(RANK), 1),
    "GROUSE": (lambda n: trackers.grouse(RANK), 1),
    "PETRELS": (lambda n: trackers.PETRELS(RANK), 1),
    "NoisyPower": (lambda n: trackers.NoisyPower(RANK, block=n // 8), 1),
    "EigenGame": (lambda n: trackers.EigenGame(RANK), 1),
    "FrequentDirections": (lambda n: trackers.frequent_directions(RANK), 1),
}


def main() -> None:
    args = arguments()
    rows = []
    for stream, make in {"spiked": spiked, "digits": digits, "long": long}.items():
        streams = [with_best(make(seed)) for seed in range(args.seeds if make is not long else 1)]
        least = floor(stream, streams[0][0])
        found = [measure(name, stream, streams) for name in args.trackers]
        found += [sklearn(stream, streams, batch) for batch in (20, 200)]
        rows += [row | {"floors": row["us"] / least["us"]} for row in (least, *found)]
    report.show(
        f"{RANK} directions in one pass, medians over {args.seeds} seeds",
        [
            row | {key: f"{row[key]:.4f}" for key in ("energy", "worst") if key in row}
            for row in rows
        ],
        {
            "stream": "stream",
            "tracker": "tracker",
            "energy": "energy",
            "worst": "worst",
            "angle": "angle, degrees",
            "us": "µs a vector",
            "floors": "floors",
            "compile_s": "compile s",
        },
    )
    report.save(f"{args.out}/trackers.json", seeds=args.seeds, rank=RANK, rows=rows)


def spiked(seed: int, d: int = 500, n: int = 10_000) -> np.ndarray:
    """Ten spikes from 20 down to 4 over unit noise."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(d, 10)))[0]
    z = rng.normal(size=(n, 10)) * np.sqrt(np.linspace(20, 4, 10))
    return (rng.normal(size=(n, d)) + z @ u.T).astype(np.float32)


def long(seed: int) -> np.ndarray:
    """Few and large; only costs are to be read off it."""
    return spiked(seed, d=100_000, n=256)


def digits(seed: int) -> np.ndarray:
    """Centred images in random order."""
    x = load_digits().data
    return np.random.default_rng(seed).permutation(x - x.mean(0)).astype(np.float32)


def with_best(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A stream and its best directions."""
    return x, np.linalg.svd(x.astype(np.float64), full_matrices=False)[2][:RANK]


def measure(name: str, stream: str, streams: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """One tracker over the streams of all seeds."""
    make, k = TRACKERS[name]
    tracker, x = make(len(streams[0][0])), streams[0][0]
    step = lambda state, v: (tracker.update(state, v), None)
    shaped = lambda x: x if k == 1 else x[: len(x) // k * k].reshape(-1, k, x.shape[1])
    first = tracker.init(jax.random.key(0), x[0])
    start = time.perf_counter()
    follow = jax.jit(lambda state, x: jax.lax.scan(step, state, x)[0])
    follow = follow.lower(first, shaped(x)).compile()
    compile_s, found = time.perf_counter() - start, []
    for seed, (x, best) in enumerate(streams):
        vectors = jnp.asarray(shaped(x))
        seconds, state = timed(follow, tracker.init(jax.random.key(seed), x[0]), vectors)
        q = np.asarray(tracker.operator(state).rows, np.float64)
        found.append((*quality(q, x, best), seconds / vectors[..., 0].size * 1e6))
    return summary(stream, name, found) | {"compile_s": compile_s}


def sklearn(stream: str, streams: list[tuple[np.ndarray, np.ndarray]], batch: int) -> dict:
    """IncrementalPCA; the streams' means are about zero, as it takes off its own."""
    found = []
    for x, best in streams:
        pca = IncrementalPCA(RANK, batch_size=batch)
        start = time.perf_counter()
        pca.fit(x)
        us = (time.perf_counter() - start) / len(x) * 1e6
        found.append((*quality(pca.components_, x, best), us))
    return summary(stream, f"IncrementalPCA, {batch} at once", found)


def floor(stream: str, x: np.ndarray) -> dict:
    """Two passes over the rows for every vector, ``W v`` and ``c W``."""
    dot = jax.lax.dot_general

    def passes(w, v):
        a = dot(w, v, (((1,), (0,)), ((), ())))
        u = dot(a, w, (((0,), (0,)), ((), ())))
        return w, u[0]

    follow = jax.jit(lambda w, x: jax.lax.scan(passes, w, x)[1])
    w, vectors = jnp.ones((RANK, x.shape[1])), jnp.asarray(x)
    jax.block_until_ready(follow(w, vectors))
    times = [timed(follow, w, vectors)[0] for _ in range(5)]
    return {"stream": stream, "tracker": "floor", "us": float(np.median(times)) / len(x) * 1e6}


def quality(q: np.ndarray, x: np.ndarray, best: np.ndarray) -> tuple[float, float]:
    """Captured energy over the best, and the largest angle to the best subspace in degrees."""
    x = x.astype(np.float64)
    energy = np.sum((x @ q.T) ** 2) / np.sum((x @ best.T) ** 2)
    cosine = np.linalg.svd(best @ np.linalg.qr(q.T)[0], compute_uv=False)[-1]
    return float(energy), float(np.degrees(np.arccos(np.clip(cosine, 0, 1))))


def summary(stream: str, name: str, found: list[tuple[float, float, float]]) -> dict:
    energy, angle, us = (np.array(column) for column in zip(*found, strict=True))
    return {
        "stream": stream,
        "tracker": name,
        "energy": float(np.median(energy)),
        "worst": float(np.min(energy)),
        "angle": float(np.median(angle)),
        "us": float(np.median(us)),
    }


def timed(function, *args):
    start = time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = lambda text: text.split(";")
    parser.add_argument("--trackers", type=names, default=list(TRACKERS), help="split by ;")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="one seed")
    args = parser.parse_args()
    args.seeds = 1 if args.quick else args.seeds
    return args


if __name__ == "__main__":
    main()
