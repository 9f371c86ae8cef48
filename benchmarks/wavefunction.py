"""Two electrons by variational Monte Carlo: helium, and the hydrogen molecule at 1.4 bohr.

The ansatz is ``log psi = sum_i log sum_A exp(-Z_A |r_i - R_A|) + r12 / (2 + 2 c² r12) + N``, with a
tanh network ``N`` of two layers of 16 units that sees distances alone, the same for both electrons
and both nuclei. Samples of ``psi²`` come from 1000 walkers, ten Metropolis moves between two steps
of `lro.spring` with a damping of 1e-3 and a rate of ``0.1 / (1 + t / 200)``. The energy is that of
fresh samples at the end, with the standard error of the walkers' means, in hartree.

References: helium -2.903724 (Pekeris, 1959); H2 at 1.4 bohr -1.174476 (Kolos and Wolniewicz, 1968).

    taskset -c 0 python benchmarks/wavefunction.py [--steps 1000] [--only helium] [--quick]
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from matplotlib.figure import Figure

import lowrank_optax as lro

SYSTEMS = {
    "helium": {"nuclei": [[0.0, 0.0, 0.0]], "charge": 2.0, "energy": -2.903724},
    "H2": {"nuclei": [[-0.7, 0.0, 0.0], [0.7, 0.0, 0.0]], "charge": 1.0, "energy": -1.174476},
}
WALKERS, MOVES, WIDTH = 1000, 10, 16


def start(key: jax.Array) -> Any:
    """Weights of a small network, whose last layer is nearly zero, and the Jastrow's ``c``."""
    keys = jax.random.split(key, 3)
    sizes = [(4, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    scales = [0.5, 0.25, 0.01]
    layers = [
        (scale * jax.random.normal(k, s), jnp.zeros(s[1]))
        for k, s, scale in zip(keys, sizes, scales, strict=True)
    ]
    return {"c": jnp.array(0.5), "layers": layers}


def functions(nuclei: jax.Array, charge: float):
    """``log|psi|`` and the local energy of one configuration ``(2, 3)``."""

    def log_psi(params: Any, p: jax.Array) -> jax.Array:
        far = jnp.linalg.norm(p[:, None] - nuclei[None], axis=-1)  # (electrons, nuclei)
        apart = jnp.linalg.norm(p[0] - p[1])
        orbitals = jnp.sum(jax.nn.logsumexp(-charge * far, axis=1))
        sums, spread = jnp.sum(far, axis=1), jnp.var(far, axis=1)
        x = jnp.stack([jnp.sum(sums), (sums[0] - sums[1]) ** 2, jnp.sum(spread), apart])
        for w, b in params["layers"][:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = params["layers"][-1]
        return orbitals + apart / (2 + 2 * params["c"] ** 2 * apart) + (x @ w + b)[0]

    def local_energy(params: Any, p: jax.Array) -> jax.Array:
        slope = jax.grad(lambda x: log_psi(params, x.reshape(2, 3)))
        x, eye = p.ravel(), jnp.eye(6)
        bend = sum(jax.jvp(slope, (x,), (e,))[1] @ e for e in eye)
        kinetic = -(bend + jnp.sum(slope(x) ** 2)) / 2
        far = jnp.linalg.norm(p[:, None] - nuclei[None], axis=-1)
        potential = 1 / jnp.linalg.norm(p[0] - p[1]) - charge * jnp.sum(1 / far)
        if len(nuclei) == 2:
            potential += charge**2 / jnp.linalg.norm(nuclei[0] - nuclei[1])
        return kinetic + potential

    return log_psi, local_energy


def train(name: str, steps: int, seed: int) -> dict[str, Any]:
    """One run: the energy on the way and of fresh samples at the end."""
    system = SYSTEMS[name]
    nuclei = jnp.array(system["nuclei"])
    log_psi, local_energy = functions(nuclei, system["charge"])
    tx = lro.spring(lambda t: 0.1 / (1 + t / 200), damping=1e-3)

    def move(params, walkers, key):
        def one(carry, key):
            walkers, old = carry
            jump, decide = jax.random.split(key)
            new = walkers + 0.4 * jax.random.normal(jump, walkers.shape)
            there = jax.vmap(log_psi, (None, 0))(params, new)
            go = jnp.log(jax.random.uniform(decide, there.shape)) < 2 * (there - old)
            return (jnp.where(go[:, None, None], new, walkers), jnp.where(go, there, old)), None

        old = jax.vmap(log_psi, (None, 0))(params, walkers)
        return jax.lax.scan(one, (walkers, old), jax.random.split(key, MOVES))[0][0]

    def step(carry, key):
        params, state, walkers = carry
        walkers = move(params, walkers, key)
        fit = lro.least_squares.energy_residuals(log_psi, local_energy, walkers)
        energy = jnp.mean(jax.vmap(local_energy, (None, 0))(params, walkers))
        updates, state = tx.update(
            params,
            state,
            params,
            residuals_fn=fit.residuals,
            per_example_grads=fit.gradients(params),
        )
        return (optax.apply_updates(params, updates), state, walkers), energy

    def look(carry, key):
        params, walkers = carry
        walkers = move(params, walkers, key)
        return (params, walkers), jax.vmap(local_energy, (None, 0))(params, walkers)

    first, second, third, fourth = jax.random.split(jax.random.key(seed), 4)
    params = start(first)
    at = nuclei[jnp.arange(2) % len(nuclei)]
    walkers = at + jax.random.normal(second, (WALKERS, 2, 3))
    warm = jax.jit(
        lambda w: jax.lax.fori_loop(
            0, 30, lambda i, w: move(params, w, jax.random.fold_in(second, i)), w
        )
    )
    carry = params, tx.init(params), warm(walkers)
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    keys = jax.random.split(third, steps)
    run = run.lower(carry, keys).compile()
    begin = time.process_time()
    (params, state, walkers), energies = jax.block_until_ready(run(carry, keys))
    seconds = time.process_time() - begin
    keys = jax.random.split(fourth, max(steps // 5, 20))
    seen = jax.jit(lambda carry, keys: jax.lax.scan(look, carry, keys)[1])((params, walkers), keys)
    means = np.asarray(seen, float).mean(0)  # a walker's samples are correlated, walkers are not
    return {
        "system": name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "seconds": round(seconds, 1),
        "energy": float(means.mean()),
        "error": float(means.std() / len(means) ** 0.5),
        "reference": system["energy"],
        "dropped": int(state.nonfinite),
        "curve": [round(float(e), 5) for e in energies[:: max(1, steps // 200)]],
    }


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """What the energy of a step's samples lies above the reference."""
    figure = Figure(figsize=(4.2, 3), dpi=130, layout="constrained")
    ax = figure.subplots()
    for run in runs:
        above = np.array(run["curve"]) - run["reference"]
        x = np.arange(len(above)) * run["steps"] / len(above)
        ax.plot(x, np.abs(above), lw=1, label=run["system"])
    ax.axhline(1.6e-3, color="0.5", ls=":")
    ax.set(yscale="log", xlabel="step", ylabel="|energy − reference|, hartree")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    runs = [train(name, 20 if args.quick else args.steps, 0) for name in args.only]
    keys = ("system", "parameters", "steps", "seconds", "energy", "error", "reference", "dropped")
    report.show("Energies in hartree", runs, {key: key for key in keys})
    report.save(args.out / "wavefunction.json", rows=runs)
    draw(args.out / "wavefunction.png", runs)


if __name__ == "__main__":
    main()
