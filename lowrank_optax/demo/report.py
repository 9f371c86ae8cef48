"""What training runs amount to: summaries, a table and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_optax.demo.command import empty_table
from lowrank_optax.demo.runs import METHODS, Method, Run


def best_runs(method: Method, runs: Sequence[Run]) -> list[Run]:
    """The runs at the learning rate of the lowest training loss, by the median over seeds.

    Held-out figures have no part in the choice. An unfinished run counts if there is no other.
    """
    measured = [run for run in runs if run.method == method.name and run.steps]
    measured = [run for run in measured if run.complete] or measured

    def final(rate: float) -> float:
        loss = np.median([run.loss[-1] for run in measured if run.learning_rate == rate])
        return float(loss) if math.isfinite(loss) else math.inf

    best = min((run.learning_rate for run in measured), key=final, default=None)
    return [run for run in measured if run.learning_rate == best]


def summary(method: Method, runs: Sequence[Run]) -> dict[str, Any]:
    """A method's figures at its best learning rate: medians and ranges over seeds, and curves."""
    best = best_runs(method, runs)

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": float(np.median(values)), "low": min(values), "high": max(values)}

    return {
        "learning_rate": best[0].learning_rate,
        "loss": spread([run.loss[-1] for run in best]),
        "held_out_loss": spread([run.held_out_loss[-1] for run in best]),
        "accuracy": spread([run.accuracy[-1] for run in best]),
        "ms_per_step": float(np.median([run.ms_per_step for run in best])),
        "state_bytes": best[0].state_bytes,
        "curves": {
            "steps": best[0].steps,
            "seconds": [run.seconds for run in best],
            "loss": [run.loss for run in best],
            "held_out_loss": [run.held_out_loss for run in best],
            "accuracy": [run.accuracy for run in best],
        },
    }


def settings(name: str, task: Any, steps: int, seeds: list[int]) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return {
        "task": name,
        "parameters": sum(x.size for x in jax.tree.leaves(shapes)),
        "steps": steps,
        "seeds": seeds,
        "schedule": "linear from the learning rate to 0",
        "learning_rates": {method.name: method.rates for method in METHODS},
    }


def title(result: dict[str, Any]) -> str:
    """Task, size and number of seeds in one line."""
    settings = result["settings"]
    count = len(settings["seeds"])
    return (
        f"{settings['task']}: {settings['parameters']:,} parameters, {settings['steps']:,} steps, "
        f"{count} {'seed' if count == 1 else 'seeds'}"
        f"{'' if result['complete'] else ', stopped early'}"
    )


def print_table(result: dict[str, Any]) -> None:
    """Prints a row for every method."""
    from rich.console import Console

    caption = "At the learning rate of the lowest training loss; medians over seeds."
    table = empty_table(title(result), caption)
    table.add_column("", min_width=9)
    # Held-out accuracy is shown where there is one: rounding moves it less than the loss.
    scored = not any(math.isnan(row["accuracy"]["median"]) for row in result["methods"].values())
    held_out = "accuracy" if scored else "held-out"
    for name in ("rate", held_out, "range", "loss", "range", "ms/step", "state"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in result["methods"].items():
        measured = row["accuracy" if scored else "held_out_loss"]
        low, median, high = (
            f"{100 * measured[x]:.1f}" if scored else f"{measured[x]:.3g}"
            for x in ("low", "median", "high")
        )
        table.add_row(
            name,
            f"{row['learning_rate']:g}",
            f"{median} %" if scored else median,
            f"{low}–{high}",
            f"{row['loss']['median']:.1e}",
            f"{row['loss']['low']:.0e}–{row['loss']['high']:.0e}",
            f"{row['ms_per_step']:.2f}",
            f"{row['state_bytes'] / 1e6:.1f} MB",
        )
    Console().print(table)


def write_png(path: Path, result: dict[str, Any]) -> None:
    """Draws the curves of every method over steps and seconds."""
    from matplotlib.figure import Figure

    from lowrank_optax import plot

    curves = {name: row["curves"] for name, row in result["methods"].items()}
    scored = any(np.isfinite(curve["accuracy"]).any() for curve in curves.values())
    panels = 2 + scored
    figure = Figure(figsize=(4.6 * panels, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, panels)
    plot.loss(curves, "steps", axes[0])
    plot.loss(curves, "seconds", axes[1])
    if scored:
        plot.accuracy(curves, "steps", axes[2])
        axes[2].set_ylabel("held-out accuracy")
    for ax in axes[:2]:
        ax.set_ylabel("training loss")
    figure.suptitle(f"{title(result)} (median, lowest to highest)")
    figure.savefig(path)
