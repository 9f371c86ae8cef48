"""Three permuted-digit tasks in a row: gradients kept out of a subspace old tasks depend on.

A 64-64-64-10 network learns three tasks in a row by SGD, the pixels permuted anew for each. From
the second task on, gradients are projected off a subspace of fixed rank, renewed after every task.
Reported is held-out accuracy at the end, mean over the three tasks, or of the first.

Per layer, rank 16: one subspace of each layer's 64 inputs, the gradient ``(in, out)`` projected on
the input side. PCA of gradients takes the leading eigenvectors of the gradients' columns seen in
training; the learner has ``OldTask`` alone, with the activations that fed the layer in old tasks.
That is quadratic, so PCA of them, gradient projection memory, is its closed form; signed PCA of
both streams, each scaled to unit energy, stands between. With 600 steps a task PCA of gradients is
nearly as good, as gradients lie in the span of activations; with 2000 steps, most of them after the
loss has settled, it falls behind.

Flat, rank 20: one subspace of all 8970 parameters, as trees. The learner has ``OldTask`` alone,
with the Jacobians of all ten logits of 60 examples of every task (as orthogonal gradient descent
has them); PCA of those is its closed form.

Every method stores what it needs of old tasks: vectors of a few hundred examples.

    python benchmarks/online_continual.py [--quick] [--seeds 5] [--out DIR]
"""

from functools import partial
from typing import Any

import numpy as np
from online_setup import (
    Params,
    accuracy,
    arguments,
    decaying,
    digits,
    few,
    jax,
    jnp,
    layers,
    learn,
    logits,
    loss,
    lro,
    network,
    pca,
    publish,
    unit,
)

TASKS, RATE, BATCH, SIZES = 3, 0.1, 64, (64, 64, 64, 10)
closed = jax.jit(lro.online.signed_pca, static_argnums=0)
closed_pca = jax.jit(pca, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 1))
def train(steps: int, project: Any, subspace: Any, params: Params, x, y, key) -> tuple[Params, Any]:
    """SGD with projected gradients, and every tenth plain gradient."""

    def step(params, key):
        i = jax.random.randint(key, (BATCH,), 0, len(x))
        g = jax.grad(loss)(params, x[i], y[i])
        kept = g if subspace is None else project(subspace, g)
        return jax.tree.map(lambda p, d: p - RATE * d, params, kept), g

    params, seen = jax.lax.scan(step, params, jax.random.split(key, steps))
    return params, jax.tree.map(lambda g: g[::10], seen)


def run(seed: int, steps: int, project: Any, remember: Any, build: Any) -> dict:
    """Accuracies of one method; ``remember`` says what is stored, ``build`` what of it."""
    data, rng = digits(seed), np.random.default_rng(seed)
    orders = [np.arange(64), *(rng.permutation(64) for _ in range(TASKS - 1))]
    params, subspace, memory = network(jax.random.key(seed), SIZES), None, None
    for task, order in enumerate(orders):
        key = jax.random.fold_in(jax.random.key(seed), task)
        x = data.x[:, order]
        params, seen = train(steps, project, subspace, params, x, data.y, key)
        new = remember(params, seen, x)
        memory = new if memory is None else jax.tree.map(_both, memory, new)
        subspace = build(memory, key)
    final = [accuracy(params, data.x_test[:, order], data.y_test) for order in orders]
    return {"mean": float(np.mean(final)), "first": final[0]}


def _both(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a, b])


# One subspace a layer ----------------------------------------------------------------------------


def project_layers(subspaces, gradients):
    return [(op.residual(w.T).T, b) for op, (w, b) in zip(subspaces, gradients, strict=True)]


def remember_layers(params, seen, x):
    """For every layer the columns of gradients and the activations that feed it."""
    columns = [w.swapaxes(1, 2).reshape(-1, w.shape[1]) for w, _ in seen]
    inputs = layers(params, x[::3])[:-1]
    return [{"gradients": g, "old": a} for g, a in zip(columns, inputs, strict=True)]


def per_layer(seed: int, rank: int, steps: int, learner: lro.online.Learner, updates: int) -> dict:
    def learned(memory, key):
        g, a = unit(memory["gradients"]), unit(memory["old"])
        return learn(learner, key, g, updates, old=a)

    def both(memory, key):
        return closed(rank, *((1.0, few(unit(memory[name]))) for name in ("gradients", "old")))

    builders = {
        "gradients": lambda memory, key: closed_pca(rank, memory["gradients"]),
        "learned": learned,
        "closed": lambda memory, key: closed_pca(rank, memory["old"]),
        "both": both,
    }
    out = {"none": run(seed, steps, project_layers, remember_layers, lambda memory, key: None)}
    for name, build in builders.items():
        every = lambda memory, key, build=build: [build(m, key) for m in memory]
        out[name] = run(seed, steps, project_layers, remember_layers, every)
    return out


# One subspace of all parameters ------------------------------------------------------------------


def project_flat(subspace, gradient):
    return subspace.residual(gradient)


@partial(jax.jit, static_argnums=0)
def jacobians(examples: int, params, seen, x):
    """Gradients of all logits of some examples, along a leading axis."""
    one = jax.vmap(lambda x: jax.jacrev(logits)(params, x))(x[:examples])
    return jax.tree.map(lambda j: j.reshape(-1, *j.shape[2:]), one)


def flat(
    seed: int, rank: int, steps: int, learner: lro.online.Learner, updates: int, examples: int
) -> dict:
    def learned(memory, key):
        vectors = unit(memory)
        return learn(learner, key, vectors, updates, old=vectors)

    best = lambda memory, key: closed_pca(rank, memory)
    gradients = lambda params, seen, x: seen
    logit = partial(jacobians, examples)
    return {
        "none": run(seed, steps, project_flat, gradients, lambda memory, key: None),
        "gradients": run(seed, steps, project_flat, gradients, best),
        "learned": run(seed, steps, project_flat, logit, learned),
        "closed": run(seed, steps, project_flat, logit, best),
    }


def main() -> None:
    quick = {"steps": 200, "updates": 40, "examples": 10}
    args = arguments(__doc__, quick, steps=600, updates=600, examples=60)
    seeds = range(args.seeds)
    names = {"none": "no projection", "gradients": "PCA of gradients"}

    learner = lro.online.learner(
        16, (lro.online.OldTask(1.0),), decaying(0.03, args.updates), reconstruction=0
    )
    lengths = (args.steps, 10 * args.steps // 3)
    runs = [[per_layer(seed, 16, n, learner, args.updates) for seed in seeds] for n in lengths]
    publish(
        "online_continual_layers",
        "Permuted digits, a subspace a layer, rank 16",
        [
            {name: {"short": a[name]["mean"], "long": b[name]["mean"]} for name in a}
            for a, b in zip(*runs, strict=True)
        ],
        names
        | {
            "learned": "learned: old activations",
            "closed": "PCA of activations, its closed form",
            "both": "signed PCA, gradients + activations",
        },
        {k: f"accuracy, {n} steps a task" for k, n in zip(("short", "long"), lengths, strict=True)},
        args,
    )

    updates = args.updates // 2
    learner = lro.online.learner(
        20, (lro.online.OldTask(1.0),), decaying(0.005, updates), reconstruction=0
    )
    publish(
        "online_continual_flat",
        "Permuted digits, one subspace of all parameters, rank 20",
        [flat(seed, 20, args.steps, learner, updates, args.examples) for seed in seeds],
        names | {"learned": "learned: old logits' Jacobians", "closed": "PCA of the Jacobians"},
        {"mean": "accuracy, mean of tasks", "first": "accuracy, first task"},
        args,
    )


if __name__ == "__main__":
    main()
