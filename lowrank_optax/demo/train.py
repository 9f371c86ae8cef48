"""The command ``train``: trains a small network with several optimizers and compares them."""

import argparse
import os
from pathlib import Path
from typing import Any

from lowrank_optax.demo import report
from lowrank_optax.demo.command import (
    Refusal,
    check_writable,
    choice,
    machine,
    need,
    positive,
    versions,
    write_json,
)
from lowrank_optax.demo.runs import Run, compare, methods


def add(commands: Any) -> None:
    """Adds the command to those of the parser."""
    summary = "train a small network with AdamW, Muon, soap_muon and whitening before AdamW"
    parser = commands.add_parser(
        "train",
        help=summary,
        description=f"{summary.capitalize()}, and compare them: same model, data, batches, steps "
        "and decay, and for each the best learning rate of a grid of the same size. "
        "Writes results.json and curves.png.",
    )
    parser.add_argument(
        "--task",
        default="source",
        help="source (a transformer on Python's own standard library, the default), digits, "
        "autoencoder, mnist, text, or poisson (least squares)",
    )
    parser.add_argument("--steps", type=positive, help="training steps (default: the task's)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="default: as many from 0 as the task needs",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/TASK")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        default=os.environ.get("LOWRANK_OPTAX_DATA") or None,
        help="where the files of mnist and text are (default: $LOWRANK_OPTAX_DATA)",
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Trains, compares, and leaves results.json and curves.png; the exit code."""
    need("train", "flax", "matplotlib", "rich", "sklearn")
    # The eigenproblems are too small for LAPACK to gain from a second thread, and on a machine that
    # is busy its threads wait for each other many times longer than one takes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    task = _task(args.task, args.data_dir)
    out = args.out or Path("runs", args.task)
    check_writable(out)
    steps, seeds = args.steps or task.steps, args.seeds or list(range(task.seeds))
    runs: list[Run] = []
    try:
        compare(task, steps, seeds, runs)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    result = {
        "settings": report.settings(args.task, task, steps, seeds),
        "complete": not stopped,
        "methods": {
            m.name: report.summary(m, runs) for m in methods(task) if report.best_runs(m, runs)
        },
        "runs": [each.final() for each in runs if each.steps],
        "versions": versions(),
        "machine": machine(),
    }
    write_json(out / "results.json", result)
    report.write_png(out / "curves.png", result)
    report.print_table(result)
    print(f"{'Stopped early; what' if stopped else 'What'} was measured is in {out}")
    return 130 if stopped else 0


def _task(name: str, data_dir: Path | None) -> Any:
    from lowrank_optax.demo import tasks

    make = choice("task", name, tasks.TASKS)
    try:
        return make(data_dir)
    except tasks.DataError as error:
        raise Refusal(str(error)) from error
