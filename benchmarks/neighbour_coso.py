"""CoSO on permuted digits: each task trained in gradient subspaces away from the old tasks' ones.

For every weight matrix ``W``, ``(m, n)``, with gradient ``G`` and old tasks' directions ``M``,

    G' = (I - M M^T) G                        away from the old tasks
    P  = leading left singular vectors of G'  drawn anew every ``refresh`` steps
    W <- W - lr P Adam(P^T G')

while a Frequent Directions sketch takes in the columns of every ``G'``. After the task, the
directions that hold a share ``energy`` of the sketch join ``M``. Biases are the weights of an input
that is always one, and so protected like the others.

The paper fine-tunes a vision transformer and adds a head for every task. Here one small network
from scratch, with one head, learns digits whose pixels are permuted anew in every task; plain
fine-tuning is Adam on the same network.

Source: Cheng et al., "Continuous subspace optimization for continual learning", NeurIPS 2025.

    python benchmarks/neighbour_coso.py
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from online_setup import Split, digits
from report import show

import lowrank_optax as lro
from lowrank_optax.online import trackers

History = list[lro.online.Operator]


def init(key: jax.Array, sizes: tuple[int, ...] = (64, 64, 10)) -> list[jax.Array]:
    """Weights ``(in + 1, out)``."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [jax.random.normal(k, (m + 1, n)) * np.sqrt(2 / m) for k, m, n in shapes]


def logits(weights: list[jax.Array], x: jax.Array) -> jax.Array:
    for i, w in enumerate(weights):
        x = (jax.nn.relu(x) if i else x) @ w[:-1] + w[-1]
    return x


def loss(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), y).mean()


def batch_gradient(weights: list[jax.Array], data: Split, key: jax.Array) -> list[jax.Array]:
    i = jax.random.randint(key, (64,), 0, len(data.x))
    return jax.grad(loss)(weights, data.x[i], data.y[i])


@partial(jax.jit, static_argnums=(4, 5))
def fine_tune(weights, history, data: Split, key: jax.Array, steps: int, rate: float):
    adam = optax.adam(rate)

    def step(carry, key):
        weights, state = carry
        updates, state = adam.update(batch_gradient(weights, data, key), state)
        return (optax.apply_updates(weights, updates), state), None

    start = (weights, adam.init(weights))
    return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0], history


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def train(weights, history: History, data, key, steps: int, rate: float, rank: int, refresh: int):
    """The weights after a task, and what the sketches hold of its gradients."""
    adam, tracker = optax.adam(rate), trackers.frequent_directions(32, slots=40, buffer=64)

    def step(carry, given):
        weights, state, sketches, bases = carry
        i, key = given
        # Columns of G are vectors in the space of inputs: rows of its transpose.
        grads = batch_gradient(weights, data, key)
        grads = [m.residual(g.T).T for m, g in zip(history, grads, strict=True)]
        leading = lambda: [jnp.linalg.svd(g, full_matrices=False)[0][:, :rank] for g in grads]
        bases = jax.lax.cond(i % refresh == 0, leading, lambda: bases)
        updates, state = adam.update([p.T @ g for p, g in zip(bases, grads, strict=True)], state)
        weights = [w + p @ u for w, p, u in zip(weights, bases, updates, strict=True)]
        sketches = [tracker.update(s, g.T) for s, g in zip(sketches, grads, strict=True)]
        return (weights, state, sketches, bases), None

    ranks = [min(rank, *w.shape) for w in weights]
    bases = [jnp.eye(len(w), r) for w, r in zip(weights, ranks, strict=True)]
    state = adam.init([p.T @ w for p, w in zip(bases, weights, strict=True)])
    sketches = [tracker.init(key, w[:, 0]) for w in weights]
    each = (jnp.arange(steps), jax.random.split(key, steps))
    weights, _, sketches, _ = jax.lax.scan(step, (weights, state, sketches, bases), each)[0]
    return weights, [tracker.operator(s) for s in sketches]


@partial(jax.jit, static_argnums=2)
def remember(old: lro.online.Operator, new: lro.online.Operator, energy: float):
    """``M`` with the leading directions of a task: those that hold a share of the energy."""
    lam = jnp.maximum(new.eigenvalues(), 0)
    rows = new.eigenvectors() * (jnp.cumsum(lam) - lam < energy * lam.sum())[:, None]
    task = lro.online.Operator.of(rows, jnp.eye(new.rank))
    return lro.online.merge(old, task, rank=old.rank)


def nothing(weights: list[jax.Array], capacity: int) -> History:
    """Rows of zeros for ``M``, as many as all tasks together may need."""
    empty = lambda m: lro.online.Operator.of(jnp.zeros((capacity, m)), jnp.eye(capacity))
    return [empty(len(w)) for w in weights]


def coso(weights, history, data, key, steps, rate, rank=16, refresh=20, energy=0.95):
    weights, sketches = train(weights, history, data, key, steps, rate, rank, refresh)
    pairs = zip(history, sketches, strict=True)
    return weights, [remember(old, new, energy) for old, new in pairs]


def run(method, tasks: int, steps: int, rate: float, seed: int) -> dict[str, float]:
    """Accuracies after the last task, on the old ones and on it."""
    key, data = jax.random.key(seed), digits(seed)
    orders = [jax.random.permutation(jax.random.fold_in(key, t), 64) for t in range(tasks)]
    weights = init(key)
    history = nothing(weights, capacity=60)
    for t, order in enumerate(orders):
        task = data._replace(x=data.x[:, order])
        weights, history = method(weights, history, task, jax.random.fold_in(key, t), steps, rate)
    correct = [(logits(weights, data.x_test[:, o]).argmax(1) == data.y_test).mean() for o in orders]
    old, new = np.mean(correct[:-1]), correct[-1]
    return {"old": float(old), "new": float(new), "all": float(np.mean(correct))}


def main() -> None:
    rows, names = [], {"fine-tuning": fine_tune, "CoSO": coso}
    for name, method in names.items():
        runs = [run(method, tasks=4, steps=400, rate=3e-3, seed=seed) for seed in range(3)]
        medians = {k: float(np.median([r[k] for r in runs])) for k in runs[0]}
        rows.append({"method": name, **medians, "least": min(r["old"] for r in runs)})
    columns = {"method": "method", "old": "old tasks", "least": "least of three seeds"}
    show("Four permuted digits: accuracy", rows, columns | {"new": "last task", "all": "all"})


if __name__ == "__main__":
    main()
