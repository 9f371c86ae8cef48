"""Intrinsic dimension on digits: how many directions training needs, and which.

A network of ``d`` parameters trains in a subspace of dimension ``r`` through its first parameters,
``params = start + Q z``. The intrinsic dimension is the least ``r`` that reaches 90 % of the
accuracy of training all parameters. Three subspaces:

    random       fixed from the start, `basis.Random(r, update_every=None)`
    trajectory   the leading principal directions of the parameters along a full run: `Operator`
    moving       that of the last ``r`` gradients, `basis.GGT(r)`: not a subspace but a sequence

Source: Li et al., "Measuring the intrinsic dimension of objective landscapes", ICLR 2018; for the
trajectory Larsen et al., "How many degrees of freedom do we need to train deep networks: a loss
landscape perspective", ICLR 2022, who call it a lottery subspace.

    python benchmarks/neighbour_intrinsic_dimension.py
"""

from functools import partial
from typing import Any

import jax
import optax
from online_setup import Params, Split, accuracy, digits, loss, network, pca
from report import show

import lowrank_optax as lro
from lowrank_optax import basis, curvature, inner

SIZES, NAMES = (64, 32, 10), ("random", "trajectory", "moving")


def gradient(params: Params, data: Split, key: jax.Array) -> Params:
    i = jax.random.randint(key, (64,), 0, len(data.x))
    return jax.grad(loss)(params, data.x[i], data.y[i])


@partial(jax.jit, static_argnums=(0, 4))
def train(tx, params: Params, data: Split, key: jax.Array, steps: int):
    """The last parameters, and those along the way, ``(steps, *shape)``."""

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(gradient(params, data, key), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (params, tx.init(params))
    (params, _), path = jax.lax.scan(step, start, jax.random.split(key, steps))
    return params, path


@partial(jax.jit, static_argnums=2)
def trajectory(start: Params, path: Params, rank: int) -> lro.online.Operator:
    """The principal directions of every tenth of the steps' ``params - start``."""
    return pca(rank, jax.tree.map(lambda p, s: (p - s)[9::10], path, start))


def projected(subspace: lro.online.Operator, tx) -> optax.GradientTransformation:
    """An optimizer of the codes ``z``: its state is as small as they are."""

    def update(grads, state, params=None):
        updates, state = tx.update(subspace.encode(grads), state)
        return subspace.decode(updates), state

    init = lambda params: tx.init(subspace.encode(params))
    return optax.GradientTransformation(init, update)


def inside(part: basis.Basis, rate: float) -> optax.GradientTransformation:
    engine = lro.scale_by_lre(curvature.Covariance(), part, inner.Adam(b2=0.999))
    return optax.chain(engine, optax.scale(-rate))


def sweep(
    ranks: tuple[int, ...], steps: int, names: tuple[str, ...] = NAMES, seed: int = 0
) -> list[dict[str, Any]]:
    """Test accuracy for every rank and subspace; the first row is for all parameters."""
    key, data = jax.random.key(seed), digits(seed)
    start = network(key, SIZES)
    correct = lambda params: accuracy(params, data.x_test, data.y_test)
    full, path = train(optax.adam(3e-3), start, data, key, steps)
    optimizers = {
        "random": lambda r: inside(basis.Random(r, update_every=None), 0.1),
        "trajectory": lambda r: projected(trajectory(start, path, r), optax.adam(0.1)),
        "moving": lambda r: inside(basis.GGT(r), 0.1),
    }
    rows = [{"rank": sum(p.size for p in jax.tree.leaves(start)), "full": correct(full)}]
    for rank in ranks:
        row: dict[str, Any] = {"rank": rank}
        for name in names:
            if name != "trajectory" or rank <= steps // 10:  # which has no more directions
                params, _ = train(optimizers[name](rank), start, data, key, steps)
                row[name] = correct(params)
        rows.append(row)
    return rows


def dimension(rows: list[dict[str, Any]], name: str, share: float = 0.9) -> int | None:
    """The least rank that reaches a share of the full accuracy."""
    enough = [row["rank"] for row in rows[1:] if row.get(name, 0) >= share * rows[0]["full"]]
    return min(enough, default=None)


def main() -> None:
    rows = sweep((1, 4, 16, 32, 64, 96, 128, 256), steps=500)
    columns = {"rank": "dimension", "full": "full"} | {name: name for name in NAMES}
    show("Digits: accuracy by dimension", rows, columns)
    print({f"90 % from, {name}": dimension(rows, name) for name in NAMES})


if __name__ == "__main__":
    main()
