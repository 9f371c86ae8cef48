"""GPT-2 on a GPU: what an optimizer's step costs on its shapes, and a run of a smaller GPT.

*Step*: GPT-2 with 124 million parameters (12 layers, width 768, 50,257 tokens, one table for both
ends), random gradients, the optimizer's step alone with its state donated; optax's AdamW and Muon
beside `lro.soap_muon`, in turns; the least and the median of the rounds, and the slowest step.

*Run*: 6 layers of width 384 on the characters of Python's standard library, the same batches for
all, linear decay to zero, the model's products in bfloat16. Seconds are those of training alone,
without compilation and evaluation. The table has the best of the rates, and steps and seconds to
the held-out loss that the best AdamW ends with.

    python benchmarks/gpt.py [--out DIR]
    python benchmarks/gpt.py --quick         # on a CPU: tiny, to see that it works
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class Size:
    """A GPT's sizes: ``vocabulary`` tokens, ``length`` of a sequence."""

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int


GPT2 = Size(50257, 1024, 768, 12, 12)


# The model --------------------------------------------------------------------------------------


def parameters(size: Size, key: jax.Array) -> dict[str, Any]:
    """GPT-2's parameters with its initial sizes; biases and scales too."""
    w = size.width
    normal = lambda i, shape, std=0.02: std * jax.random.normal(jax.random.fold_in(key, i), shape)

    def layer(i: int) -> dict[str, Any]:
        dense = lambda j, inputs, outputs, std=0.02: {
            "kernel": normal(10 * i + j, (inputs, outputs), std),
            "bias": jnp.zeros(outputs),
        }
        norm = lambda: {"scale": jnp.ones(w), "bias": jnp.zeros(w)}
        last = 0.02 / (2 * size.layers) ** 0.5
        return {
            "before_attention": norm(),
            "qkv": dense(1, w, 3 * w),
            "attended": dense(2, w, w, last),
            "before_mlp": norm(),
            "up": dense(3, w, 4 * w),
            "down": dense(4, 4 * w, w, last),
        }

    return {
        "embedding": normal(1, (size.vocabulary, w)),
        "position_embedding": normal(2, (size.length, w)),
        **{f"layer_{i}": layer(i + 1) for i in range(size.layers)},
        "last": {"scale": jnp.ones(w), "bias": jnp.zeros(w)},
    }


def logits(size: Size, params: Any, x: jax.Array) -> jax.Array:
    """``(n, length)`` tokens to ``(n, length, vocabulary)``, products in bfloat16."""
    half = lambda x: x.astype(jnp.bfloat16)

    def normalise(p, x):
        x = x.astype(jnp.float32)
        x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return half(x * p["scale"] + p["bias"])

    dense = lambda p, x: x @ half(p["kernel"]) + half(p["bias"])
    n, length = x.shape
    h = half(params["embedding"])[x] + half(params["position_embedding"])[:length]
    for i in range(size.layers):
        p = params[f"layer_{i}"]
        qkv = dense(p["qkv"], normalise(p["before_attention"], h))
        q, k, v = (y.reshape(n, length, size.heads, -1) for y in jnp.split(qkv, 3, -1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        h += dense(p["attended"], y.reshape(n, length, -1))
        h += dense(p["down"], jax.nn.gelu(dense(p["up"], normalise(p["before_mlp"], h))))
    h = normalise(params["last"], h)
    return (h @ half(params["embedding"]).T).astype(jnp.float32)


def loss(size: Size, params: Any, window: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token; ``window`` is ``(n, length + 1)``."""
    outputs = logits(size, params, window[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(outputs, window[:, 1:]).mean()


# Optimizers -------------------------------------------------------------------------------------


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon with steps of Adam's size; tables and vectors by Adam."""
    spec = optax.contrib.MuonDimensionNumbers
    of = lambda path, x: (
        spec() if x.ndim == 2 and "embedding" not in jax.tree_util.keystr(path) else None
    )
    dimensions = lambda params: jax.tree_util.tree_map_with_path(of, params)
    return optax.contrib.muon(rate, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)


METHODS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "AdamW": optax.adamw,
    "Muon": muon,
    "soap_muon": lro.soap_muon,
    "soap_muon, rank 64": partial(lro.soap_muon, rank=64),
}


# Parts ------------------------------------------------------------------------------------------


def steps(size: Size, methods: list[str], rounds: int, length: int = 20) -> list[dict[str, Any]]:
    """Milliseconds of an optimizer's step on all parameters, methods in turns."""
    params = jax.jit(partial(parameters, size))(jax.random.key(0))
    grads = jax.jit(lambda: parameters(size, jax.random.key(1)))()
    running, rows = {}, []
    for name in methods:
        tx = METHODS[name](1e-3)
        state = jax.jit(tx.init)(params)
        start = time.perf_counter()
        step = jax.jit(tx.update, donate_argnums=1).lower(grads, state, params).compile()
        row = {
            "method": name,
            "compile_s": time.perf_counter() - start,
            "state_mb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
            "temporary_mb": getattr(step.memory_analysis(), "temp_size_in_bytes", 0) / 1e6,
        }
        rows.append(row)
        running[name] = [step, state, []]
    for i in range(rounds + 1):
        for entry in running.values():
            each = []
            for _ in range(length):
                start = time.perf_counter()
                updates, entry[1] = entry[0](grads, entry[1], params)
                jax.block_until_ready(updates)
                each.append(time.perf_counter() - start)
                del updates
            if i:  # the first round warms up
                entry[2].append(each)
    for row in rows:
        seconds = np.array(running[row["method"]][2])
        each = seconds.min(0)  # of every step of the cycle
        row["step_ms"] = float(np.median(seconds.mean(1)) * 1e3)
        row["least_ms"] = float(seconds.mean(1).min() * 1e3)
        row["worst"] = float(each.max() / np.median(each))
    for row in rows:
        over = [r["step_ms"] for r in rows if r["method"] == "Muon"]
        row["over_muon"] = row["step_ms"] / over[0] if over else None
    return rows


def train(
    size: Size, make: Any, rate: float, texts: Any, batch: int, count: int, points: int
) -> dict[str, Any]:
    """One run: held-out losses at ``points`` evenly spaced steps, and seconds of training there."""
    training, pieces = texts
    tx = make(optax.linear_schedule(rate, 0.0, count))
    params = parameters(size, jax.random.key(0))
    state = tx.init(params)
    chunk = count // points

    def some(carry, start, training):
        def step(i, carry):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), start + i)
            at = jax.random.randint(key, (batch, 1), 0, len(training) - size.length)
            window = training[at + jnp.arange(size.length + 1)].astype(jnp.int32)
            grads = jax.grad(partial(loss, size))(params, window)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, chunk, step, carry)

    compiled = jax.jit(some, donate_argnums=0).lower((params, state), 0, training).compile()
    evaluate = jax.jit(lambda params: jax.lax.map(partial(loss, size, params), pieces).mean())
    seconds, losses, elapsed = [], [], 0.0
    for i in range(points):
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled((params, state), i * chunk, training))
        elapsed += time.perf_counter() - start
        seconds.append(elapsed)
        losses.append(float(evaluate(params)))
    return {"rate": rate, "held_out": losses, "seconds": seconds, "steps": chunk * points}


def runs(
    size: Size, methods: list[str], rates: list[float], batch: int, count: int, points: int
) -> list[dict[str, Any]]:
    """Every method at every rate; the rows of the table are the best of each."""
    training, rest, _ = datasets.standard_library()
    spaced = np.linspace(0, len(rest) - size.length - 1, 4 * batch).astype(int)
    pieces = rest[spaced[:, None] + np.arange(size.length + 1)].astype(np.int32)
    texts = jnp.asarray(training), jnp.asarray(pieces).reshape(4, batch, -1)
    rows = []
    for name in methods:
        for rate in rates:
            row = {"method": name} | train(size, METHODS[name], rate, texts, batch, count, points)
            row["final"] = row["held_out"][-1]
            row["total_s"] = row["seconds"][-1]
            rows.append(row)
            print("{method:20s} rate {rate:g}: {final:.4f} in {total_s:.1f} s".format(**row))
    return rows


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best run of each method, and when it first has the loss of the best AdamW."""
    finite = lambda row: row["final"] if np.isfinite(row["final"]) else np.inf
    chosen = [
        min((row for row in rows if row["method"] == name), key=finite)
        for name in dict.fromkeys(row["method"] for row in rows)
    ]
    goal = next((row["final"] for row in chosen if row["method"] == "AdamW"), None)
    for row in chosen:
        at = [i for i, x in enumerate(row["held_out"]) if goal is not None and x <= goal]
        if at:
            row["steps_to"] = row["steps"] * (at[0] + 1) // len(row["held_out"])
            row["seconds_to"] = row["seconds"][at[0]]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="tiny, on any device")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    large, small, points = GPT2, Size(97, 256, 384, 6, 6), 40
    if args.quick:
        large, small, points = Size(300, 16, 32, 2, 2), Size(97, 16, 32, 2, 2), 4
        args.rounds, args.steps, args.batch, args.rates = 2, 40, 4, [1e-2]
    elif jax.default_backend() != "gpu":
        raise SystemExit(
            f"This needs a GPU, and jax.devices() has {jax.devices()}: run it with --quick here."
        )
    timed = steps(large, args.methods, args.rounds)
    columns = {
        "method": "method",
        "step_ms": "ms a step",
        "least_ms": "least",
        "over_muon": "over Muon's",
        "worst": "worst / median step",
        "state_mb": "state MB",
        "temporary_mb": "temporaries MB",
        "compile_s": "compile s",
    }
    report.show("The optimizer's step on GPT-2's shapes", timed, columns)
    trained = runs(small, args.methods, args.rates, args.batch, args.steps, points)
    columns = {
        "method": "method",
        "rate": "rate",
        "final": "held-out loss",
        "total_s": "seconds",
        "steps_to": "steps to AdamW's",
        "seconds_to": "seconds to AdamW's",
    }
    report.show("A smaller GPT on the standard library", best(trained), columns)
    if not args.quick:
        report.save(args.out / "gpt.json", steps=timed, runs=trained)


if __name__ == "__main__":
    main()
