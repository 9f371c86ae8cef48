"""Cross-modal retrieval: a nested canonical dependence kernel against un-nested ones and CCA.

The left and right halves of scikit-learn's digits, 8×4 pixels each, are two modalities; half of
the 1797 pairs are learned from, instance by instance and without labels. A held-out left half then
asks for right halves, ranked by ``sum_l f_l(x) g_l(y)`` over the first d of 32 modes, and those of
its class are relevant. P@20 and mAP are means over queries; chance is .10.

Nested networks (joint, sequential) are trained once and cut at every d. Un-nested they are cut
too, as they are and after a singular value decomposition in their span (Rayleigh-Ritz), and are
also trained anew for every d, which is what the order saves. All networks, optimizers and batches
are the same. CCA is linear, with 0.01 added to the variances of pixels in [0, 1] (the best of 1e-6
to 0.1, chosen on held-out pairs, in its favour), and ranks by the same kernel.

    python benchmarks/spectral_retrieval.py [--quick] [--seeds 5] [--out DIR]

Sketches that ask for photos of classes never seen (zero-shot) need features that may not be handed
on. The Sketchy Extended images come with the instructions of github.com/AnjanDutta/sem-pcyc, as do
the VGG16 networks; github.com/jongharyu/neural-svd (`examples/cdk/sketchy/data.py`) turns them into
the files that `sketchy` reads. The networks learn from pairs of one class; reported are P@100 and
the mAP with interpolated precision, as there: .670 and .581 on split 1 by Ryu et al., ICML 2024.

    python benchmarks/spectral_retrieval.py --sketchy ROOT [--split 1]
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from online_setup import jax, jnp, optax, plt
from report import save, show
from sklearn.datasets import load_digits

from lowrank_optax import spectral

DIMENSIONS = (1, 2, 4, 8, 16, 32)
METHODS = {
    "joint": "joint CDK, cut",
    "sequential": "sequential CDK, cut",
    "rotated": "un-nested LoRA, rotated, cut",
    "cut": "un-nested LoRA, cut",
    "anew": "un-nested LoRA, trained anew",
    "cca": "linear CCA",
}


class Views(NamedTuple):
    """Two modalities and classes: ``(n, ...)``, ``(m, ...)``, ``(n,)``, ``(m,)``."""

    x: np.ndarray
    y: np.ndarray
    x_class: np.ndarray
    y_class: np.ndarray


# Scores ------------------------------------------------------------------------------------------


def average_precision(relevant: np.ndarray, interpolated: bool = False) -> np.ndarray:
    """The mean precision at the ranks of relevant items: ``(n, m)`` booleans by rank to ``(n,)``.

    Interpolated, a precision is the largest at its rank or any later one. Queries without any
    relevant item score 0.
    """
    precision = np.cumsum(relevant, 1) / np.arange(1, relevant.shape[1] + 1)
    if interpolated:
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return (precision * relevant).sum(1) / np.maximum(relevant.sum(1), 1)


def retrieval(
    embeddings: Sequence[np.ndarray], views: Views, k: int = 20, interpolated: bool = False
) -> dict[str, float]:
    """P@k and mAP of ranking by ``a b^T``, for ``(n, d)`` and ``(m, d)``, in blocks of queries."""
    a, b = embeddings
    rows = []
    for i in range(0, len(a), 512):
        order = np.argsort(-(a[i : i + 512] @ b.T), axis=1, kind="stable")
        relevant = views.y_class[order] == views.x_class[i : i + 512, None]
        rows.append((relevant[:, :k].mean(1), average_precision(relevant, interpolated)))
    precision, average = (np.concatenate(column).mean() for column in zip(*rows, strict=True))
    return {"precision": float(precision), "map": float(average)}


# Digits ------------------------------------------------------------------------------------------


def halves(seed: int) -> tuple[Views, Views]:
    """Digits cut into left and right halves, ``(n, 32)`` each: to learn from and to ask."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, classes = images[order].reshape(-1, 8, 8) / 16, classes[order]
    left, right = (h.reshape(-1, 32).astype(np.float32) for h in (images[..., :4], images[..., 4:]))
    middle = len(classes) // 2
    cut = lambda part: Views(left[part], right[part], classes[part], classes[part])
    return cut(slice(middle)), cut(slice(middle, None))


def learn(
    nesting: spectral.Nesting, modes: int, x: Any, y: Any, steps: int, seed: int
) -> spectral.Decomposition:
    return spectral.fit(
        spectral.operators.CanonicalDependence(x, y, held_out_part=0.0),
        spectral.networks.MLP(modes, (128, 128), jax.nn.relu, shared=True),
        method=spectral.NestedLoRA(nesting),
        steps=steps,
        batch_size=256,
        seed=seed,
        evaluate_every=steps,
    )


def outputs(found: spectral.Decomposition, views: Views) -> list[np.ndarray]:
    """What the networks say, mode by mode in the order of the nesting: ``sqrt(sigma) phi``."""
    return [
        np.asarray(jax.vmap(n.apply, in_axes=(None, 0))(p, jnp.asarray(points)))
        for n, p, points in zip(found.networks, found.params, views[:2], strict=True)
    ]


def rotated(found: spectral.Decomposition, views: Views) -> list[np.ndarray]:
    """The same span with singular functions in order, the constant mode left out."""
    root = np.sqrt(np.maximum(found.singular_values, 0))
    return [(found(points, side) * root)[:, 1:] for side, points in enumerate(views[:2])]


def cca(train: Views, test: Views, ridge: float = 1e-2) -> list[np.ndarray]:
    """Canonical variates times roots of their correlations, so that inner products are the kernel.

    Source: Hotelling, "Relations between two sets of variates", 1936; the ridge is Vinod's, 1976.
    """
    means = [np.mean(v, 0, dtype=np.float64) for v in train[:2]]
    centered = [v - mean for v, mean in zip(train[:2], means, strict=True)]
    white = []
    for v in centered:
        values, vectors = np.linalg.eigh(v.T @ v / len(v))
        white.append(vectors / np.sqrt(values + ridge))
    cross = centered[0].T @ centered[1] / len(centered[0])
    u, correlations, vt = np.linalg.svd(white[0].T @ cross @ white[1], full_matrices=False)
    turns, root = (u, vt.T), np.sqrt(correlations)
    return [
        (v - mean) @ w @ turn * root
        for v, mean, w, turn in zip(test[:2], means, white, turns, strict=True)
    ]


def compare(
    seed: int, steps: int, dimensions: Sequence[int] = DIMENSIONS
) -> dict[str, dict[int, dict[str, float]]]:
    """Scores of every method at every dimension."""
    train, test = halves(seed)
    fitted = lambda nesting, modes: learn(nesting, modes, train.x, train.y, steps, seed)
    curve = lambda pair: {d: retrieval([v[:, :d] for v in pair], test) for d in dimensions}
    largest = max(dimensions)
    plain = fitted(spectral.Unnested(), largest)
    return {
        "joint": curve(outputs(fitted(spectral.JointNesting(), largest), test)),
        "sequential": curve(outputs(fitted(spectral.SequentialNesting(), largest), test)),
        "rotated": curve(rotated(plain, test)),
        "cut": curve(outputs(plain, test)),
        "anew": {
            d: retrieval(outputs(fitted(spectral.Unnested(), d), test), test)
            for d in dimensions[:-1]
        }
        | {largest: retrieval(outputs(plain, test), test)},
        "cca": curve(cca(train, test)),
    }


# Sketchy -----------------------------------------------------------------------------------------


def sketchy(root: str | Path, split: str = "1", part: str = "train") -> Views:
    """Features of sketches and photos in the layout that the authors of NeuralSVD published.

    ``ROOT/data/SketchyVGG/split{split}/{part}_{sketch,photo}.npz``, each with ``features``
    ``(n, 512)``, ``classes`` ``(n,)`` and ``paths`` ``(n,)``.

    Args:
      root: the directory that holds ``data``.
      split: ``1`` (100 classes to learn from, 25 to ask about), ``2`` (104 and 21), or ``1_0`` and
        the like, with classes to validate on.
      part: ``train``, ``valid`` or ``test``.

    Raises:
      FileNotFoundError: where there are none; says where they come from.
      ValueError: for a file of another layout, or classes that only one modality has.
    """
    folder = Path(root) / "data" / "SketchyVGG" / f"split{split}"
    sketches, names = _read(folder / f"{part}_sketch.npz")
    photos, others = _read(folder / f"{part}_photo.npz")
    only = sorted(set(names.tolist()) ^ set(others.tolist()))
    if only:
        raise ValueError(f"{folder}: {part} has sketches or photos alone of the classes {only}.")
    return Views(sketches, photos, names, others)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing. The Sketchy Extended data may not be handed on: get images and "
            "networks as github.com/AnjanDutta/sem-pcyc says, and make the features with "
            "examples/cdk/sketchy/data.py of github.com/jongharyu/neural-svd."
        )
    with np.load(path) as data:
        missing = {"features", "classes", "paths"} - set(data.files)
        if missing:
            raise ValueError(f"{path} has no arrays {sorted(missing)}; it has {data.files}.")
        features, classes, paths = data["features"], data["classes"], data["paths"]
    if features.ndim != 2 or not len(features) == len(classes) == len(paths):
        shapes = features.shape, classes.shape, paths.shape
        raise ValueError(f"{path}: shapes {shapes}; features must be (n, k), the others (n,).")
    return features.astype(np.float32), classes.astype(str)


def pairs_of_a_class(views: Views, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``count`` pairs ``(x, y)`` of one class each, every class as often as any other."""
    rng = np.random.default_rng(seed)
    names = np.unique(views.x_class)
    at: tuple[list[int], list[int]] = [], []
    for name, share in zip(names, _shares(count, len(names)), strict=True):
        for rows, classes in zip(at, views[2:], strict=True):
            rows.extend(rng.choice(np.flatnonzero(classes == name), share))
    return views.x[at[0]], views.y[at[1]]


def _shares(count: int, parts: int) -> Iterator[int]:
    return (count // parts + (i < count % parts) for i in range(parts))


def zero_shot(
    train: Views, test: Views, steps: int = 10_000, modes: int = 512, pairs: int = 200_000
) -> dict[str, float]:
    """P@100 and interpolated mAP on unseen classes of a joint CDK learned on others."""
    standard = lambda v, like: (v - like.mean(0)) / (like.std() + 1e-6)
    prepare = lambda v: v._replace(x=standard(v.x, train.x), y=standard(v.y, train.y))
    found = spectral.fit(
        spectral.operators.CanonicalDependence(
            *pairs_of_a_class(prepare(train), pairs), held_out_part=0.0
        ),
        spectral.networks.MLP(modes, (512,), jax.nn.leaky_relu, shared=True),
        method=spectral.NestedLoRA(spectral.JointNesting()),
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, steps)),
        steps=steps,
        progress=lambda record: print(f"step {record['step']}, {record['seconds']:.0f} s"),
    )
    test = prepare(test)
    return retrieval(outputs(found, test), test, k=100, interpolated=True)


# Tables ------------------------------------------------------------------------------------------


def table(runs: list[dict], metric: str) -> list[dict[str, Any]]:
    """One row a method: the median over seeds at every dimension, the range at the last."""
    rows = []
    for key, name in METHODS.items():
        values = {d: np.array([run[key][d][metric] for run in runs]) for d in runs[0][key]}
        row: dict[str, Any] = {"method": name}
        row |= {str(d): f"{np.median(v):.3f}" for d, v in values.items()}
        last = values[max(values)]
        rows.append(row | {"range": f"{last.min():.3f} to {last.max():.3f}"})
    return rows


def draw(runs: list[dict], path: Path) -> None:
    """Truncation curves: medians, and every seed's value as a dot."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, metric, label in zip(axes, ("precision", "map"), ("P@20", "mAP"), strict=True):
        for i, (key, name) in enumerate(METHODS.items()):
            dims = list(runs[0][key])
            values = np.array([[run[key][d][metric] for d in dims] for run in runs])
            style = "--" if key in ("anew", "cca") else "-"
            axis.plot(dims, np.median(values, 0), style, color=f"C{i}", label=name)
            axis.plot(dims, values.T, ".", color=f"C{i}", alpha=0.35)
        axis.set_xscale("log", base=2)
        axis.set_xticks(DIMENSIONS, [str(d) for d in DIMENSIONS])
        axis.axhline(0.1, color="black", lw=0.8, ls=":")
        axis.set(xlabel="dimensions kept", ylabel=label)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.suptitle("Retrieval between halves of digits, held out (dotted: chance)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cross-modal retrieval of digits or sketches.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sketchy", type=Path, help="the directory that holds data/SketchyVGG")
    parser.add_argument("--split", default="1")
    args = parser.parse_args()
    if args.sketchy:
        train = sketchy(args.sketchy, args.split, "train")
        scores = zero_shot(train, sketchy(args.sketchy, args.split, "test"))
        show(f"Sketchy, split {args.split}", [scores], {"precision": "P@100", "map": "mAP"})
        save(args.out / "spectral_sketchy.json", split=args.split, **scores)
        return
    if args.quick:
        args.seeds, args.steps = 1, 50
    publish([compare(seed, args.steps) for seed in range(args.seeds)], args.steps, args.out)


def publish(runs: list[dict], steps: int, out: Path) -> None:
    rows = {metric: table(runs, metric) for metric in ("precision", "map")}
    columns = {"method": "method", **{str(d): str(d) for d in DIMENSIONS}, "range": "range at last"}
    for metric, label in (("precision", "P@20"), ("map", "mAP")):
        show(f"{label} by dimension, median of {len(runs)} seeds", rows[metric], columns)
    save(out / "spectral_retrieval.json", rows=rows, runs=runs, steps=steps)
    draw(runs, out / "spectral_retrieval.png")


if __name__ == "__main__":
    main()
