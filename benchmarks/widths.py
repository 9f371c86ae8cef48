"""What a step of `lro.soap_muon` costs beside Muon's, by the width of the matrices.

Every cell has the same matrices for all methods: square, or four times as wide as high; a few for
small widths, one for large ones. Only the optimizer's step is timed, compiled with its state
donated. Methods take turns in one process, a cycle of steps each, which has a whole number of the
recipe's periods. A round is a turn of each; the first is not counted.

- *ratio*: median over rounds of a cycle's time over Muon's in the same round; *least*: the shortest
  cycle over Muon's shortest.
- *worst*: the slowest step of the cycle over the median step, where a step's time is its least over
  rounds: what else the machine does only adds.
- *state*: bytes over Adam's for the same matrices.

    python benchmarks/widths.py [--widths 64,128,256] [--methods default,rank64] [--seconds 20]
    python benchmarks/widths.py --quick
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import lowrank_optax as lro

RATE = 1e-2

METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "default": lambda: lro.soap_muon(RATE),
    "rank64": lambda: lro.soap_muon(RATE, rank=64),
}
"""The recipe's settings; Muon always runs beside them."""


def muon() -> optax.GradientTransformation:
    """optax's Muon with steps of Adam's size."""
    return optax.contrib.muon(RATE, consistent_rms=0.2)


def matrices(width: int, ratio: int, most: int = 2**17) -> list[jax.Array]:
    """Matrices ``(width, ratio width)``: as many as have ``most`` entries, from one to eight."""
    count = max(1, min(8, most // (width * width)))
    return [jnp.zeros((width, ratio * width)) for _ in range(count)]


def gradients(params: list[jax.Array], count: int = 4) -> list[list[jax.Array]]:
    """Noise whose columns differ by a factor of a hundred."""

    def draw(key, x):
        return jax.random.normal(key, x.shape) * jnp.logspace(0, -2, x.shape[1])

    keys = jax.random.split(jax.random.key(0), (count, len(params)))
    return [[draw(key, x) for key, x in zip(row, params, strict=True)] for row in keys]


class Stepper:
    """One optimizer on one set of matrices, compiled; a call times every step of a cycle."""

    def __init__(self, tx: optax.GradientTransformation, params: list[jax.Array], grads: list):
        self.params, self.grads, self.count = params, grads, 0
        self.state = jax.jit(tx.init)(params)
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        start = time.perf_counter()
        step = jax.jit(tx.update, donate_argnums=1)
        self.step = step.lower(grads[0], self.state, params).compile()
        self.compile_s = time.perf_counter() - start

    def cycle(self, length: int) -> list[float]:
        """Seconds of each of the next steps."""
        seconds = []
        for _ in range(length):
            grads = self.grads[self.count % len(self.grads)]
            start = time.perf_counter()
            updates, self.state = self.step(grads, self.state, self.params)
            jax.block_until_ready((updates, self.state))
            seconds.append(time.perf_counter() - start)
            self.count += 1
        return seconds


def cell(
    width: int, ratio: int, methods: list[str], length: int, budget: float
) -> list[dict[str, Any]]:
    """All methods on matrices of one shape."""
    params = matrices(width, ratio)
    grads = gradients(params)
    makers = {"Muon": muon, **{name: METHODS[name] for name in methods}}
    steppers = {name: Stepper(make(), params, grads) for name, make in makers.items()}
    for stepper in steppers.values():
        stepper.cycle(length)
    times: dict[str, list[list[float]]] = {name: [] for name in steppers}
    start = time.perf_counter()
    while len(times["Muon"]) < 3 or (
        time.perf_counter() - start < budget and len(times["Muon"]) < 30
    ):
        for name, stepper in steppers.items():
            times[name].append(stepper.cycle(length))
    seconds = {name: np.array(rounds) for name, rounds in times.items()}
    cycles = {name: x.mean(1) for name, x in seconds.items()}
    adam = sum(x.nbytes for x in jax.tree.leaves(optax.scale_by_adam().init(params)))
    rows = []
    for name, stepper in steppers.items():
        each = seconds[name].min(0)
        rows.append(
            {
                "width": width,
                "shape": f"{len(params)} x {width} x {ratio * width}",
                "method": name,
                "step_ms": float(np.median(cycles[name]) * 1e3),
                "ratio": float(np.median(cycles[name] / cycles["Muon"])),
                "least": float(cycles[name].min() / cycles["Muon"].min()),
                "worst": float(each.max() / np.median(each)),
                "state": stepper.bytes / adam,
                "rounds": len(times[name]),
                "compile_s": stepper.compile_s,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(x) for x in text.split(",")]
    names = lambda text: text.split(",")
    parser.add_argument("--widths", type=numbers, default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--ratios", type=numbers, default=[1, 4], help="columns over rows")
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--cycle", type=int, default=20, help="steps of a turn")
    parser.add_argument("--seconds", type=float, default=20, help="a cell, beyond three rounds")
    parser.add_argument("--quick", action="store_true", help="small widths, a few seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.quick:
        args.widths, args.seconds, args.methods = [32, 64], 0, ["default"]
    rows = []
    for width in args.widths:
        for ratio in args.ratios:
            for row in cell(width, ratio, args.methods, args.cycle, args.seconds):
                rows.append(row)
                print("{shape:18s} {method:8s} {step_ms:.3g} ms, {ratio:.2f}".format(**row))
    columns = {
        "shape": "matrices",
        "method": "method",
        "step_ms": "ms a step",
        "ratio": "over Muon's",
        "least": "least",
        "worst": "worst / median step",
        "state": "state over Adam's",
        "rounds": "rounds",
        "compile_s": "compile s",
    }
    report.show("The recipe's step over Muon's, by width", rows, columns)
    if not args.quick:
        cores = len(os.sched_getaffinity(0))
        report.save(args.out / "widths.json", cycle=args.cycle, used_cores=cores, rows=rows)


if __name__ == "__main__":
    main()
