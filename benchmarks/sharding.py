"""What sharding saves and what it costs: memory and exchanges of one step on 1, 2, 4 and 8 devices.

A transformer's tree of 0.9 million parameters, each leaf split along its last axis over all
devices (the direction in which a flat leaf is not), and one compiled update of each method with
donated state. Read from the compiled step, for one device: bytes of the state, of temporaries, and
numbers received in collectives. The time of a step is the median of ``--samples`` steps; the
devices are threads of one CPU, so it shows the overhead of dividing the work, and nothing else.

Then an estimate on paper for 1e9 and 7e10 parameters on 8 to 1024 accelerators: formulas, no
measurement. Its assumptions are printed with it. A second table compares settings on 256.

    python benchmarks/sharding.py [--quick] [--out DIR] [--samples 10]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("Adam", "GGT(20)", "Eigen(20)", "galore(16)")
WIDTH, VOCABULARY, LAYERS = 128, 4096, 2

ASSUMPTIONS = {
    "memory": "80 GB an accelerator, of which a quarter may go to rows",
    "rows": "bfloat16, GGT in front of Adam, groups=None; m = rank",
    "bandwidth": "3.35 TB/s of device memory (H100 SXM); a step reads the rows twice",
    "transformer": "12 width^2 parameters a layer: width 2048, 20 layers (1e9); 8192, 87 (7e10)",
    "galore": "rank width/4, float32 basis of the short side and two moments, spread evenly",
    "FSDP": "two all-gathers of the bfloat16 parameters and one reduce-scatter of the gradients",
    "exchange": "bfloat16 gradient to flat rows and back, where its sharding is not flat already; "
    "an all-reduce of m + 1 float32 numbers",
    "settings": "4 matrices a layer, each a group of its own per leaf; 15 m^3 flops an "
    "eigenproblem of size m, on every device; galore 9 a^3 every 200 steps, its exchange the 2.5 d "
    "float32 numbers measured on eight devices, though it falls with their number",
}
SIZES = {"1e9": (2048, 20), "7e10": (8192, 87)}


def main() -> None:
    args = arguments()
    if args.child:
        print(json.dumps(measure(args.samples, args.quick)))
        return
    rows = []
    for devices in (1, 2) if args.quick else (1, 2, 4, 8):
        rows += child(devices, args)
    estimate = list(paper())
    import report

    report.show(
        "One step of one device (host devices share the cores: times show overhead alone)",
        rows,
        {
            "devices": "devices",
            "method": "method",
            "state_kb": "state kB",
            "temporary_kb": "temporaries kB",
            "exchanged": "numbers exchanged",
            "over_d": "over d",
            "step_ms": "step ms",
        },
    )
    report.show(
        "On paper",
        estimate,
        {
            "parameters": "parameters",
            "accelerators": "accelerators",
            "rank": "rank in a quarter",
            "rows_gb": "rows of rank 20, GB",
            "adam_gb": "Adam, GB",
            "galore_gb": "galore, GB",
            "passes_ms": "two passes of rank 20, ms",
            "exchange_mb": "exchanged, MB",
            "fsdp_mb": "FSDP itself, MB",
        },
    )
    compared = list(settings())
    report.show(
        "Settings on 256 accelerators, on paper",
        compared,
        {
            "parameters": "parameters",
            "setting": "setting",
            "state_gb": "state, GB",
            "passes_ms": "rows read, ms",
            "problems": "eigenproblems a step",
            "small_gflop": "small algebra, Gflop",
            "exchange_mb": "exchanged, MB",
        },
    )
    for name, text in ASSUMPTIONS.items():
        print(f"  {name}: {text}")
    out = Path(args.out)
    report.save(
        out / "sharding.json",
        measured=rows,
        paper=estimate,
        settings=compared,
        assumptions=ASSUMPTIONS,
        quick=args.quick,
    )
    draw(rows, estimate, out / "sharding.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 and 2 devices, 2 samples")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(devices: int, args: argparse.Namespace) -> list[dict]:
    """The measurements of a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    command = [sys.executable, __file__, "--child", "--samples", str(args.samples)]
    command += ["--quick"] * args.quick
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, check=True, timeout=600
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(samples: int, quick: bool) -> list[dict]:
    import jax
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import lowrank_optax as lro

    whiten = lambda basis: lro.scale_by_lre(
        lro.curvature.Covariance(), basis, lro.inner.LPower(-1 / 4)
    )
    methods = {
        "Adam": lambda: optax.scale_by_adam(),
        "GGT(20)": lambda: optax.chain(whiten(lro.basis.GGT(20)), optax.scale_by_adam()),
        "Eigen(20)": lambda: optax.chain(whiten(lro.basis.Eigen(20)), optax.scale_by_adam()),
        "galore(16)": lambda: lro.galore(1e-2, rank=16, update_every=10),
    }
    layer = {
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
        "scale": (WIDTH,),
    }
    shapes = {f"layer{i}": layer for i in range(LAYERS)} | {"embedding": (VOCABULARY, WIDTH)}
    devices, rng = jax.device_count(), np.random.default_rng(0)
    mesh = jax.make_mesh((devices,), ("x",))

    def draw(shape):
        place = NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "x"))
        return jax.device_put(rng.normal(size=shape).astype(np.float32), place)

    tree = lambda: jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    params, grads = tree(), tree()
    d = sum(x.size for x in jax.tree.leaves(params))
    rows = []
    for name in METHODS[:2] if quick else METHODS:
        tx = methods[name]()
        places = lro.shardings(tx.init, params)
        state = jax.jit(tx.init, out_shardings=places)(params)
        update = jax.jit(tx.update, donate_argnums=1, out_shardings=(None, places))
        compiled = update.lower(grads, state, params).compile()
        memory = compiled.memory_analysis()
        first = lambda x: x.addressable_shards[0].data.nbytes
        seconds = []
        for _ in range(2 if quick else samples + 1):
            begin = time.perf_counter()
            updates, state = compiled(grads, state, params)
            jax.block_until_ready((updates, state))
            seconds.append(time.perf_counter() - begin)
        moved = exchanged(compiled.as_text())
        rows.append(
            {
                "devices": devices,
                "method": name,
                "d": d,
                "state_kb": sum(map(first, jax.tree.leaves(state))) / 1e3,
                "argument_kb": memory.argument_size_in_bytes / 1e3,
                "temporary_kb": memory.temp_size_in_bytes / 1e3,
                "exchanged": moved,
                "over_d": moved / d,
                "step_ms": 1e3 * statistics.median(seconds[1:]),
            }
        )
    return rows


def exchanged(hlo: str) -> int:
    """Numbers that one device receives in the collectives of a program, each counted once."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    total = 0
    for line in hlo.splitlines():
        found = re.match(rf"\s+(?:ROOT )?%\S+ = (.*?) (?:{kinds})(?:-start)?\(", line)
        if found:
            for sizes in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                count = 1
                for size in sizes.split(","):
                    count *= int(size or 1)
                total += count
    return total


def paper():
    """The estimate, an accelerator's share of everything."""
    for name, (width, layers) in SIZES.items():
        d = 12 * width**2 * layers
        for devices in (8, 64, 256, 1024):
            matrices = [(width, 3 * width), (width, width), (width, 4 * width), (width, 4 * width)]
            galore = layers * sum(width // 4 * (a + 2 * b) for a, b in matrices)
            yield {
                "parameters": name,
                "accelerators": devices,
                "rank": int(0.25 * 80e9 * devices / (2 * d)),
                "rows_gb": 20 * d * 2 / devices / 1e9,
                "adam_gb": 8 * d / devices / 1e9,
                "galore_gb": 4 * galore / devices / 1e9,
                "passes_ms": 2 * 20 * d * 2 / devices / 3.35e12 * 1e3,
                "exchange_mb": (2 * 2 * d / devices + 4 * 21) / 1e6,
                "fsdp_mb": 3 * 2 * d / 1e6,
            }


def settings(devices: int = 256):
    """What an accelerator holds, reads, solves and exchanges under the settings to choose from."""
    for name, (width, layers) in SIZES.items():
        d = 12 * width**2 * layers
        matrices = [(width, 3 * width), (width, width), (width, 4 * width), (width, 4 * width)]
        galore = layers * sum(width // 4 * (a + 2 * b) for a, b in matrices)

        def window(rank, size, groups=1, every=1, d=d):
            """Rows of ``size`` bytes a number in front of Adam, ``groups`` windows."""
            return {
                "state_gb": (rank * d * size + 8 * d) / devices / 1e9,
                "passes_ms": 2 * rank * d * size / devices / 3.35e12 * 1e3,
                "problems": groups / every,
                "small_gflop": 15 * rank**3 * groups / every / 1e9,
                "exchange_mb": (2 * 2 * d / devices + 4 * (rank + 1) * groups) / 1e6,
            }

        leaves = 4 * layers
        for setting, row in {
            "GGT(20), float32 rows": window(20, 4),
            "GGT(20), bf16 rows": window(20, 2),
            "the same per leaf": window(20, 2, leaves),
            "the same, every 4 steps": window(20, 2, leaves, 4),
            "GGT(100), bf16 rows": window(100, 2),
            "galore, rank width/4, every 200 steps": {
                "state_gb": 4 * galore / devices / 1e9,
                "passes_ms": 2 * 4 * layers * 4 * width**2 // 4 / devices / 3.35e12 * 1e3,
                "problems": leaves / 200,
                "small_gflop": leaves * 9 * (width // 4) ** 3 / 200 / 1e9,
                "exchange_mb": 2.5 * d * 4 / 1e6,
            },
        }.items():
            yield {"parameters": name, "setting": setting} | row


def draw(rows: list[dict], estimate: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        count = [row["devices"] for row in mine]
        total = [(row["state_kb"] + row["temporary_kb"]) / 1e3 for row in mine]
        left.loglog(count, total, "o-", label=name)
        middle.semilogx(count, [row["over_d"] for row in mine], "o-", label=name)
    left.set(xlabel="devices", ylabel="MB", title="State and temporaries of one device")
    middle.set(
        xlabel="devices", ylabel="numbers over d", title="Exchanged in a step, by one device"
    )
    for axis in (left, middle):
        axis.set_xticks(count, [str(c) for c in count])
        axis.minorticks_off()
    left.legend(fontsize=8)
    for name in SIZES:
        mine = [row for row in estimate if row["parameters"] == name]
        count = [row["accelerators"] for row in mine]
        right.loglog(
            count, [max(row["rank"], 0.5) for row in mine], "o-", label=f"{name} parameters"
        )
    right.axhline(20, color="grey", lw=0.8, ls=":")
    right.set_xticks(count, [str(c) for c in count])
    right.minorticks_off()
    right.set(xlabel="accelerators", title="On paper: rank in 20 GB each, bf16")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
