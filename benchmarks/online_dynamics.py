"""What predicts the next vector: a subspace learned for dynamics against PCA of the same rank.

Synthetic, rank 4: 200 dimensions hold 4 predictable ones (two rotations damped by ρ = 0.985,
variance 0.97) under 12 of white noise (variance 6.25) and a floor of variance 0.01. PCA sees the
loud noise. The learner minimises ``E‖v' - A^T M A v‖²`` over chunks of 64 consecutive vectors,
``M`` in closed form from running moments. Reported is the share of the predictable subspace that
lies in the span. With an anchor, reconstruction of weight 1 beside dynamics of weight λ, there are
two thresholds. Below ``λ = (σ²_n - σ²_p)/(ρ² σ²_p)``, here 5.6, the noise has the lower loss. And a
direction turned by θ out of the predictable ones loses ``λ ρ² (σ²_n + σ²_p) θ²`` of prediction and
wins ``(σ²_n - σ²_p) θ²`` of energy: above ``λ = (σ²_n - σ²_p)/(ρ² (σ²_n + σ²_p))``, here 0.75, what
was found is at least a local optimum. So is the noise for every λ, as prediction grows with the
fourth power of the angle from there. So the anchor has to come after dynamics, as it does in the
sweep, and not in the row "from the start"; between the thresholds the noise of the steps decides.

Real, rank 8: full-batch gradient descent with rate 0.9 on a digit classifier, 64-32-10; every
gradient is predicted from the one before, and only then seen; ``R² = 1 - Σ‖v' - v̂'‖²/Σ‖v'‖²`` over
the second half. PCA takes the leading eigenvectors of all gradients so far, exactly, or with
forgetting, the last 256 weighted by ``β^age``, and ``M`` by least squares with the same weights.
The learner takes two steps of Adam a gradient on the last 32, with ``M`` from its own moments. What
it gains over PCA of the past is nearly all from following: so do its twin, which learns
reconstruction alone, and PCA with forgetting. Best forgetting and best moving average (the
prediction without a subspace) are chosen on the second half itself, in their favour.

    python benchmarks/online_dynamics.py [--quick] [--seeds 5] [--out DIR]
"""

from functools import partial

import numpy as np
from jax.flatten_util import ravel_pytree
from online_setup import (
    arguments,
    decaying,
    digits,
    jax,
    jnp,
    loss,
    lro,
    network,
    optax,
    pca,
    publish,
)

# Synthetic ---------------------------------------------------------------------------------------

D, PREDICTABLE, NOISY, RHO, VARIANCES = 200, 4, 12, 0.985, (0.97, 6.25, 0.01)
BETTER = (VARIANCES[1] - VARIANCES[0]) / (RHO**2 * VARIANCES[0])
KEPT = (VARIANCES[1] - VARIANCES[0]) / (RHO**2 * (VARIANCES[1] + VARIANCES[0]))
SWEEP = (0.3, 0.6, 1.0, 2.0, 4.0, 8.0)


def stream(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Vectors ``(n, D)`` in order, and the predictable subspace ``(4, D)``."""
    axes, drive, noise = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(axes, (D, D)))[0].T
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (0.2, 0.5)]
    a = RHO * jax.scipy.linalg.block_diag(*turns)
    e = jax.random.normal(drive, (n + 1, PREDICTABLE)) * np.sqrt(VARIANCES[0])

    def step(s, e):
        s = a @ s + np.sqrt(1 - RHO**2) * e  # keeps the variance
        return s, s

    _, signal = jax.lax.scan(step, e[0], e[1:])
    loud = np.sqrt(np.repeat(VARIANCES[1:], [NOISY, D - PREDICTABLE - NOISY]))
    rest = jax.random.normal(noise, (n, D - PREDICTABLE)) * loud
    return jnp.hstack([signal, rest]) @ q, q[:PREDICTABLE]


def synthetic(seed: int, chunks: int) -> dict:
    vectors, truth = stream(jax.random.key(seed), 64 * chunks)
    overlap = lambda op: float(jnp.sum(op.project(truth) ** 2) / PREDICTABLE)
    names = {"learned": (1.0, 0.0), "start": (8.0, 1.0)} | {
        f"anchored {w:g}": (w, lambda t: jnp.clip(t / chunks - 1, 0, 1)) for w in SWEEP
    }
    out = {"pca": {"overlap": overlap(pca(PREDICTABLE, vectors))}}
    for name, (weight, anchor) in names.items():
        learner = lro.online.learner(
            PREDICTABLE,
            (lro.online.Dynamics(weight),),
            decaying(0.03, 4 * chunks),
            reconstruction=anchor,
        )

        @jax.jit
        def follow(state, learner=learner):
            update = lambda state, v: (learner.update(state, v)[0], None)
            return jax.lax.scan(update, state, vectors.reshape(-1, 64, D))[0]

        state = learner.init(jax.random.key(seed + 1), vectors[0])
        for _ in range(4):
            state = follow(state)
        out[name] = {"overlap": overlap(learner.operator(state))}
    return out


def sweep(axis, runs) -> None:
    """Overlap over the weight of dynamics beside an anchor, and the two thresholds."""
    for out in runs:
        axis.plot(SWEEP, [out[f"anchored {w:g}"]["overlap"] for w in SWEEP], "o-", alpha=0.4)
    axis.set_xscale("log")
    axis.set_xticks(SWEEP, [f"{w:g}" for w in SWEEP], minor=False)
    axis.xaxis.set_minor_formatter("")
    axis.axvline(KEPT, color="black", linestyle="--", label="above: a local optimum")
    axis.axvline(BETTER, color="black", linestyle=":", label="above: the lower loss")
    axis.set_xlabel("weight of dynamics, then reconstruction 1")
    axis.set_ylabel("overlap")
    axis.legend(loc="center left")


# Gradients of a network --------------------------------------------------------------------------

RANK, WINDOW, FORGET, AVERAGES = 8, 32, (0.9, 0.95, 0.97, 0.98), (0.5, 0.7, 0.8, 0.9, 0.95)


def gradients(seed: int, steps: int) -> jax.Array:
    """Full-batch gradients along gradient descent, ``(steps, d)``."""
    data = digits(seed, 1000)
    params, restore = ravel_pytree(network(jax.random.key(seed), (64, 32, 10)))

    def step(params, _):
        g = jax.grad(lambda p: loss(restore(p), data.x, data.y))(params)
        return params - 0.9 * g, g

    g = jax.lax.scan(step, params, length=steps)[1]
    return g / jnp.sqrt(jnp.mean(jnp.sum(g**2, axis=1)))


@partial(jax.jit, static_argnums=1)
def pca_predictions(g: jax.Array, length: int, forget: jax.Array) -> jax.Array:
    """Predictions of ``g[half:]``, each by PCA of the ``length`` before: by way of ``g g^T``."""
    n = len(g)
    gram = jnp.pad(g @ g.T, (length, 0))
    root = jnp.sqrt(forget ** jnp.arange(length - 1, -1.0, -1.0))

    def predict(t):
        start = t + 1  # of the window that ends with gradient t, in padded numbers
        k = jax.lax.dynamic_slice(gram, (start, start), (length, length))
        size, u = jnp.linalg.eigh(k * root[:, None] * root)
        a = (u[:, -RANK:] / jnp.sqrt(size[-RANK:])).T * root  # A = a g
        z = k @ a.T
        past = z[:-1] * root[1:, None] ** 2
        moment = past.T @ z[:-1]
        ridge = 1e-6 * jnp.trace(moment) * jnp.eye(RANK)
        row = a.T @ (jnp.linalg.solve(moment + ridge, past.T @ z[1:]).T @ z[-1])
        return jax.lax.dynamic_update_slice(jnp.zeros(n + length), row, (start,))[length:]

    return jax.lax.map(predict, jnp.arange(n // 2 - 1, n - 1)) @ g


@partial(jax.jit, static_argnums=0)
def learned_predictions(learner: lro.online.Learner, key: jax.Array, g: jax.Array) -> jax.Array:
    """The learner's own, each before the gradient is seen."""
    dynamics = learner.purposes[-1]
    assert isinstance(dynamics, lro.online.Dynamics)
    # What lies before the beginning is not finite, and so skipped.
    padded = jnp.concatenate([jnp.full((WINDOW, g.shape[1]), jnp.nan), g])

    def step(state, t):
        window = jax.lax.dynamic_slice_in_dim(padded, t + 1, WINDOW)
        for _ in range(2):
            state, _ = learner.update(state, window[:-1], next=window[1:])
        op = learner.operator(state)
        m = dynamics.linear(state.memory[-1], op.gram)
        return state, op.decode(m @ op.encode(window[-1]))

    _, out = jax.lax.scan(step, learner.init(key, g[0]), jnp.arange(len(g) - 1))
    return out[len(g) // 2 - 1 :]


def averages(g: jax.Array, decay: float) -> jax.Array:
    step = lambda m, x: (decay * m + (1 - decay) * x,) * 2
    return jax.lax.scan(step, g[0], g)[1][len(g) // 2 - 1 : -1]


def real(seed: int, steps: int) -> dict:
    g = gradients(seed, steps)
    target = g[len(g) // 2 :]
    r2 = lambda guess: {"r2": float(1 - jnp.sum((target - guess) ** 2) / jnp.sum(target**2))}
    best = lambda guesses: max(map(r2, guesses), key=lambda x: x["r2"])
    out = {
        "ema": best(averages(g, b) for b in AVERAGES),
        "pca": r2(pca_predictions(g, len(g), 1.0)),
        "forgetting": best(pca_predictions(g, min(256, len(g)), b) for b in FORGET),
    }
    for name, weight in {"twin": 0.0, "learned": 1.0}.items():
        learner = lro.online.learner(
            RANK, (lro.online.Dynamics(weight),), optax.adam(1e-3), decay=0.97
        )
        out[name] = r2(learned_predictions(learner, jax.random.key(seed + 1), g))
    return out


def main() -> None:
    quick = {"chunks": 100, "steps": 80}
    args = arguments(__doc__, quick, chunks=400, steps=600)
    runs = [synthetic(seed, args.chunks) for seed in range(args.seeds)]
    publish(
        "online_dynamics_synthetic",
        "Predictable directions under noise, rank 4",
        runs,
        {
            "pca": "PCA",
            "learned": "learned: dynamics",
            "start": "8 dynamics + anchor from the start",
            **{f"anchored {w:g}": f"{w:g} dynamics, then anchor" for w in SWEEP},
        },
        {"overlap": "share of the predictable subspace"},
        args,
        [partial(sweep, runs=runs)],
        kept=KEPT,
        better=BETTER,
    )
    publish(
        "online_dynamics_gradients",
        "Predicting the next gradient, rank 8",
        [real(seed, args.steps) for seed in range(args.seeds)],
        {
            "ema": "best moving average, no subspace",
            "pca": "PCA of the past",
            "forgetting": "PCA, best forgetting",
            "twin": "learner, reconstruction alone",
            "learned": "learned: dynamics + reconstruction",
        },
        {"r2": "R² of the second half"},
        args,
    )


if __name__ == "__main__":
    main()
