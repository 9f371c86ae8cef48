"""What the online benchmarks share: digits, a small network, a learned subspace, a summary."""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the eigenproblems are too small for more

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import report
from sklearn.datasets import load_digits

import lowrank_optax as lro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Params = list[tuple[jax.Array, jax.Array]]


class Split(NamedTuple):
    """Digits for training and held out: pixels in [0, 1], ``(n, 64)``, and labels."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


def digits(seed: int, train: int = 1300) -> Split:
    """The 1797 digits of scikit-learn in a random order."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    return Split(x[:train], y[:train], x[train:], y[train:])


def network(key: jax.Array, sizes: Sequence[int]) -> Params:
    """Weights ``(in, out)``, He's initialisation, and biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (n, m)) * np.sqrt(2 / n), jnp.zeros(m))
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def layers(params: Params, x: jax.Array) -> list[jax.Array]:
    """What enters every layer, then the logits."""
    out = [x]
    for w, b in params[:-1]:
        out.append(jax.nn.relu(out[-1] @ w + b))
    w, b = params[-1]
    return [*out, out[-1] @ w + b]


def logits(params: Params, x: jax.Array) -> jax.Array:
    return layers(params, x)[-1]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def accuracy(params: Params, x: jax.Array, y: jax.Array) -> float:
    return float((logits(params, x).argmax(-1) == y).mean())


def train(
    params: Params, x: jax.Array, y: jax.Array, tx, steps: int, key: jax.Array, batch: int = 64
) -> Params:
    """``steps`` of an optimizer on random batches."""

    @jax.jit
    def run(params, x, y, key):
        def step(carry, key):
            params, state = carry
            i = jax.random.randint(key, (batch,), 0, len(x))
            updates, state = tx.update(jax.grad(loss)(params, x[i], y[i]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]

    return run(params, x, y, key)


def pca(rank: int, vectors: Any) -> lro.online.Operator:
    """The leading eigenvectors of ``E v v^T``."""
    return lro.online.signed_pca(rank, (1.0, few(vectors)))


def few(vectors: Any) -> Any:
    """Plain arrays ``(n, d)`` as ``d`` rows of the same second moments, if that is less."""
    if not isinstance(vectors, jax.Array) or len(vectors) <= vectors.shape[1]:
        return vectors
    n, d = vectors.shape
    return jnp.linalg.qr(vectors, mode="r") * np.sqrt(d / n)


def learn(
    learner: lro.online.Learner,
    key: jax.Array,
    vectors: Any,
    steps: int,
    batch: int = 64,
    **streams: Any,
) -> lro.online.Operator:
    """The operator learned from ``steps`` random batches of the vectors and of further streams."""
    return learner.operator(_learn(learner, steps, batch, key, {"": vectors, **streams}))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _learn(learner, steps, batch, key, given):
    def step(state, key):
        picked = {
            name: _pick(k, x, batch)
            for k, (name, x) in zip(jax.random.split(key, len(given)), given.items(), strict=True)
        }
        return learner.update(state, picked.pop(""), **picked)[0], None

    first, rest = jax.random.split(key)
    state = learner.init(first, jax.tree.map(lambda x: x[0], given[""]))
    return jax.lax.scan(step, state, jax.random.split(rest, steps))[0]


def _pick(key: jax.Array, vectors: Any, batch: int) -> Any:
    n = len(jax.tree.leaves(vectors)[0])
    i = jax.random.randint(key, (min(batch, n),), 0, n)
    return jax.tree.map(lambda x: x[i], vectors)


def decaying(rate: float, steps: int, every: int = 1) -> Any:
    """Adam with a cosine schedule over ``steps`` updates, moving ``A`` once in ``every``."""
    adam = optax.adam(optax.cosine_decay_schedule(rate, max(1, steps // every)))
    return adam if every == 1 else optax.MultiSteps(adam, every)


def unit(vectors: Any) -> Any:
    """Vectors scaled to ``E‖v‖² = 1``, so that weights compare streams of any units."""
    leaves = jax.tree.leaves(vectors)
    energy = sum(jnp.sum(x**2) for x in leaves) / len(leaves[0])
    return jax.tree.map(lambda x: x / jnp.sqrt(energy), vectors)


# What every script does at its end ---------------------------------------------------------------


def summary(runs: list[dict[str, Any]], names: dict[str, str], metrics: Sequence[str]):
    """Rows of a table, one a method: for each metric ``median [least, largest]`` of the seeds."""
    rows = []
    for key, name in names.items():
        row: dict[str, Any] = {"method": name}
        for metric in metrics:
            values = np.array([run[key][metric] for run in runs])
            row[metric] = f"{np.median(values):.3f} [{values.min():.3f}, {values.max():.3f}]"
        rows.append(row)
    return rows


def publish(
    name: str,
    title: str,
    runs: list[dict[str, Any]],
    names: dict[str, str],
    metrics: dict[str, str],
    args: argparse.Namespace,
    panels: Sequence[Any] = (),
    **content: Any,
) -> None:
    """Prints the table, writes the JSON and the picture.

    Args:
      name: of the files.
      title: of the table.
      runs: one a seed, each ``{method: {metric: number}}``.
      names: methods and what they are called.
      metrics: metrics and their headings.
      args: see `arguments`.
      panels: further pictures, functions of a matplotlib axis.
      content: goes into the JSON as well.
    """
    rows = summary(runs, names, list(metrics))
    report.show(f"{title} ({len(runs)} seeds)", rows, {"method": "subspace", **metrics})
    report.save(args.out / f"{name}.json", rows=rows, runs=runs, **content)
    draw = [partial(strip, runs=runs, names=names, metric=m, label=x) for m, x in metrics.items()]
    draw += panels
    figure, axes = plt.subplots(
        1, len(draw), figsize=(4.8 * len(draw), 3.6), squeeze=False, layout="constrained"
    )
    for axis, function in zip(axes[0], draw, strict=True):
        function(axis)
    for axis in axes[0][1 : len(metrics)]:
        axis.set_yticklabels([])
    figure.suptitle(title)
    figure.savefig(args.out / f"{name}.png", dpi=110)
    plt.close(figure)


def strip(axis, runs, names, metric, label) -> None:
    """Every seed a dot, medians as strokes, one line a method."""
    for i, key in enumerate(names):
        values = [run[key][metric] for run in runs]
        color = "tab:red" if key.startswith("learned") else "tab:blue"
        axis.plot(values, [i] * len(values), "o", color=color, alpha=0.4, markeredgewidth=0)
        axis.plot(np.median(values), i, "|", color=color, markersize=22, markeredgewidth=2.5)
    axis.set_yticks(range(len(names)), list(names.values()))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)


def arguments(doc: str | None, quick: dict[str, Any], **settings: Any) -> argparse.Namespace:
    """``--quick``, ``--seeds`` and ``--out``, with a script's settings, smaller if quick."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: seconds")
    args = parser.parse_args()
    vars(args).update(settings)
    if args.quick:
        vars(args).update(seeds=1, **quick)
    args.out.mkdir(parents=True, exist_ok=True)
    return args
