"""Correct digits on NIST's 27 nonlinear regression problems, from both starts, in float64.

`lro.levenberg_marquardt` with its defaults, and with ``scaling=1.0``, after 100 steps; SciPy's
``least_squares`` by MINPACK (``lm``) and by its own trust region (``trf``), each with ``x_scale``
of 1 and ``"jac"``, exact Jacobians, tolerances of 1e-15 and 10000 evaluations at most. A fit counts
as found with four digits of every parameter; eleven are certified.

    python benchmarks/nist.py [--out DIR]
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import jax.numpy as jnp
import nist
import numpy as np
import optax
import report
from scipy.optimize import least_squares

import lowrank_optax as lro

STEPS = 100
OURS = {"lro": None, "lro, scaling=1.0": 1.0}
THEIRS = {
    f"{method}, x_scale={scale}": {"method": method, "x_scale": scale}
    for method in ("lm", "trf")
    for scale in (1.0, "jac")
}


@partial(jax.jit, static_argnums=(0, 4))
def ours(model, x, y, b, scaling):
    """The parameters after every step."""
    tx = lro.levenberg_marquardt(scaling=scaling)

    def step(carry, _):
        b, state = carry
        updates, state = tx.update(b, state, b, residuals_fn=lambda b: model(b, x) - y)
        b = optax.apply_updates(b, updates)
        return (b, state), b

    return jax.lax.scan(step, (b, tx.init(b)), None, length=STEPS)[1]


def theirs(residuals, jacobian, start, options):
    """The parameters where SciPy stops, ``nan`` where it raises an error."""
    with np.errstate(all="ignore"):
        try:
            return least_squares(
                residuals, start, jacobian, ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=10000,
                **options,
            ).x  # fmt: skip
        except ValueError:
            return np.full(len(start), np.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description="NIST's nonlinear regression problems.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    with jax.enable_x64(True):
        for name, model in nist.MODELS.items():
            data, (x, y) = nist.DATA[name], nist.observations(name)
            fn = jax.jit(lambda b, x=x, y=y, model=model: model(b, x) - y)
            numpy = lambda f: lambda p: np.asarray(f(jnp.asarray(p)))
            residuals, jacobian = numpy(fn), numpy(jax.jit(jax.jacfwd(fn)))
            for start, label in zip(data["starts"], ("far", "near"), strict=True):
                row = {"problem": name, "start": label}
                for kind, scaling in OURS.items():
                    path = np.asarray(ours(model, x, y, jnp.array(start), scaling))
                    right = [nist.digits(b, data["certified"]) for b in path]
                    row[kind] = round(right[-1], 1)
                    if scaling is None:
                        row["steps to 6"] = next((i for i, r in enumerate(right, 1) if r >= 6), "")
                for kind, options in THEIRS.items():
                    found = theirs(residuals, jacobian, start, options)
                    row[kind] = round(nist.digits(found, data["certified"]), 1)
                rows.append(row)
                print(row, flush=True)
    methods = [*OURS, *THEIRS]
    columns = {key: key for key in ("problem", "start", *OURS, "steps to 6", *THEIRS)}
    report.show("Correct digits", rows, columns)
    found = {m: sum(row[m] >= 4 for row in rows) for m in methods}
    print(found)
    report.save(args.out / "nist.json", rows=rows, found=found)


if __name__ == "__main__":
    main()
