"""The command ``spectrum``: learns the modes of an operator whose spectrum is known."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import lowrank_optax as lro
from lowrank_optax.demo import problems
from lowrank_optax.demo.command import (
    Refusal,
    check_writable,
    choice,
    empty_table,
    machine,
    need,
    positive,
    versions,
    write_json,
)


def add(commands: Any) -> None:
    """Adds the command to those of the parser."""
    summary = "learn the leading eigenfunctions of an operator whose spectrum is known"
    parser = commands.add_parser(
        "spectrum",
        help=summary,
        description=f"{summary.capitalize()}, with the library's defaults, and print the "
        "eigenvalues beside the true ones. Writes results.json and modes.png.",
    )
    parser.add_argument(
        "--operator",
        default="hydrogen2d",
        help="hydrogen2d, hydrogen3d, oscillator1d, oscillator2d, well1d, well2d, doublewell or "
        "langevin",
    )
    parser.add_argument("--modes", type=positive, default=4, help="default: 4")
    parser.add_argument("--steps", type=positive, default=1600, help="default: 1600")
    parser.add_argument("--batch", type=positive, default=512, help="points a step; default: 512")
    parser.add_argument(
        "--method",
        default="nested-lora",
        help="nested-lora, nested-lora-joint, orbital, neural-ef, spin or energy (one network "
        "for all and whitening in front of Adam: the fastest way to many modes)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/OPERATOR")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Learns the modes and leaves results.json and modes.png; the exit code."""
    need("spectrum", "flax", "matplotlib", "rich")
    problem = choice("operator", args.operator, problems.OPERATORS)()
    options = choice("method", args.method, problems.METHODS)
    if args.batch < 2:
        raise Refusal("--batch 1: pass at least 2 points")
    truth = problem.truth(args.modes)
    if truth[-1] <= 0:
        # Below zero a low-rank approximation is better without the mode.
        above = int(np.sum(truth > 0))
        raise Refusal(f"{args.operator} has {above} modes above zero; --modes {args.modes} is more")
    out = args.out or Path("runs", args.operator)
    check_writable(out)
    start = time.perf_counter()
    history: list[dict[str, Any]] = []

    def progress(record: dict[str, Any]) -> None:
        history.append(record)
        print(_line(record), flush=True)

    title = f"{args.operator}: {problem.formula}, {{:,}} steps of {args.batch}"
    try:
        fit = lro.spectral.fit(
            problem.operator,
            **options(problem.operator, args.modes, args.steps),
            steps=args.steps,
            batch_size=args.batch,
            seed=args.seed,
            evaluate_batches=64,
            progress=progress,
        )
        step, message = fit.step, fit.message
        modes = problems.rows(truth, fit.eigenvalues, fit.errors)
        problems.write_png(out / "modes.png", fit, title.format(step))
        stopped = False
    except KeyboardInterrupt:
        if not history:
            raise
        step, message = history[-1]["step"], "stopped early, with the last evaluation's values"
        modes = problems.rows(truth, history[-1]["eigenvalues"])
        stopped = True
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "command")}
    result = {
        "settings": settings | {"formula": problem.formula},
        "complete": not stopped,
        "message": message,
        "seconds": time.perf_counter() - start,
        "modes": modes,
        "history": history,
        "versions": versions(),
        "machine": machine(),
    }
    write_json(out / "results.json", result)
    _print_modes(title.format(step), result)
    print(f"Stopped early; eigenvalues are in {out}" if stopped else f"What was found is in {out}")
    return 130 if stopped else 0


def _line(record: dict[str, Any]) -> str:
    values = " ".join(f"{value:.4g}" for value in record["eigenvalues"])
    return f"step {record['step']}, {record['seconds']:.0f} s: {values}"


def _print_modes(title: str, result: dict[str, Any]) -> None:
    from rich.console import Console

    errors = [row["relative_error"] for row in result["modes"]]
    caption = f"Median relative error {np.median(errors):.2g}; {result['message']}."
    table = empty_table(title, caption)
    for name in ("mode", "eigenvalue", "truth", "relative error"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(result["modes"]):
        value = f"{row['eigenvalue']:.5g}"
        if "standard_error" in row:
            value += f" ± {row['standard_error']:.1g}"
        table.add_row(str(i + 1), value, f"{row['truth']:.5g}", f"{row['relative_error']:.1e}")
    Console().print(table)
