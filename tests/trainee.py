"""A process that trains, saves while it goes on, and can be killed at any moment.

    python trainee.py KIND DIR STEPS

It goes on from the newest whole checkpoint in ``DIR``, prints a line before every save, and at the
end writes what it has to ``DIR/final.npz``. Kinds are the optimizers of `OPTIMIZERS`, ``learner``
and ``fit``.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import lowrank_optax as lro

EVERY = 3
"""Steps from one save to the next: less than a save takes, so that kills fall into saves."""

OPTIMIZERS = {
    "lre": lro.lre(1.0, basis=lro.basis.GGT(8)),
    "whitening": optax.chain(
        lro.scale_by_lre(
            lro.curvature.Covariance(), lro.basis.Eigen(6), lro.inner.LPower(-0.25), update_every=3
        ),
        optax.adam(1e-2),
    ),
    "soap_muon": lro.soap_muon(1e-2),
    "galore": lro.galore(1e-2, rank=2),
    "random": lro.lre(
        0.1, lro.curvature.HutchinsonHessian(), lro.basis.RandomPermutation(8), lro.inner.Adam()
    ),
}
MODEL = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])


def batch(i):
    key = jax.random.fold_in(jax.random.key(7), i)
    x = jax.random.normal(key, (16, 5))
    return x, jnp.sin(x[:, :3] * x[:, 2:])


def optimizer(name):
    """The state before the first step, and the step."""
    tx = OPTIMIZERS[name]
    params = MODEL.init(jax.random.key(0), batch(0)[0])

    def step(state, i):
        params, inside = state
        x, y = batch(i)
        loss = lambda p: jnp.mean((MODEL.apply(p, x) - y) ** 2)
        updates, inside = tx.update(jax.grad(loss)(params), inside, params, value_fn=loss)
        return optax.apply_updates(params, updates), inside

    return (params, tx.init(params)), step


def learner():
    learn = lro.online.learner(3, (lro.online.Dynamics(1.0),), optax.adam(1e-2))
    step = lambda state, i: learn.update(state, batch(i)[0])[0]
    return learn.init(jax.random.key(0), jnp.zeros(5)), step


def train(kind, place, steps):
    """Under orbax's manager, which writes in the background."""
    state, step = learner() if kind == "learner" else optimizer(kind)
    step = jax.jit(step)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    with ocp.CheckpointManager(place / "saved", options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
        for i in range(start, steps):
            state = step(state, i)
            if (i + 1) % EVERY == 0:
                print(i + 1, flush=True)
                manager.save(i + 1, args=ocp.args.StandardSave(state))
    return state


def fit(place, steps):
    """`lro.spectral.fit`, which writes at every evaluation."""
    operator = lro.spectral.operators.Matrix(jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.5])))
    table = (lambda key, i: jnp.eye(4, 2) + 0.1, lambda rows, i: rows[i])
    found = lro.spectral.fit(
        operator,
        table,
        optimizer=optax.adam(0.03),
        steps=steps,
        batch_size=32,
        evaluate_every=EVERY,
        evaluate_batches=2,
        checkpoint=str(place / "fit.npz"),
        progress=lambda record: print(record["step"], flush=True),
    )
    return found.params, found.moments, found.eigenvalues


def main():
    kind, place, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    place.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(place.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    print("start", flush=True)
    state = fit(place, steps) if kind == "fit" else train(kind, place, steps)
    np.savez(place / "final.npz", *[np.asarray(x) for x in jax.tree.leaves(state)])


if __name__ == "__main__":
    main()
