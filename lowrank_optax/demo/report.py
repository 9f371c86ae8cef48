"""What training runs amount to: summaries, a table and a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_optax.demo.command import empty_table
from lowrank_optax.demo.runs import Method, Run, methods

COLORS = {
    "AdamW": "#8a8a8a",
    "Muon": "#4d4d4d",
    "whitening + AdamW": "#D55E00",
    "soap_muon": "#0072B2",
    "levenberg_marquardt": "#009E73",
}
"""Peers in grey, ours in colours that all eyes tell apart (Okabe and Ito)."""


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
        "learning_rate": best[0].learning_rate if method.tuned else math.nan,
        "ours": method.ours,
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
        "learning_rates": {m.name: m.rates for m in methods(task) if m.tuned},
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


def seconds_to(result: dict[str, Any], name: str, against: str = "AdamW") -> float:
    """Seconds until the median held-out loss is that of another method's end; NaN if it never is.

    Between two measurements the loss is taken to fall evenly.
    """
    rows = result["methods"]
    if against not in rows:
        return math.nan
    goal = rows[against]["held_out_loss"]["median"]
    curves = rows[name]["curves"]
    loss = np.median(np.asarray(curves["held_out_loss"], float), 0)
    seconds = np.median(np.asarray(curves["seconds"], float), 0)
    below = np.flatnonzero(loss <= goal)
    if not len(below):
        return math.nan
    i = below[0]
    if i == 0:
        return float(seconds[0])
    share = (loss[i - 1] - goal) / max(loss[i - 1] - loss[i], 1e-30)
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))


def print_table(result: dict[str, Any]) -> None:
    """Prints a row for every method."""
    from rich.console import Console

    caption = "At the learning rate of the lowest training loss; medians over seeds. Seconds are "
    caption += "those until the held-out loss is that of AdamW's end."
    table = empty_table(title(result), caption)
    table.add_column("", min_width=9)
    scored = not any(math.isnan(row["accuracy"]["median"]) for row in result["methods"].values())
    headings = ["rate", "held-out loss", "range"] + ["accuracy"] * scored
    headings += ["s to AdamW's", "ms a step", "state"]
    for heading in headings:
        table.add_column(heading, justify="right", min_width=8 if heading == "state" else None)
    for name, row in result["methods"].items():
        loss, rate, seconds = row["held_out_loss"], row["learning_rate"], seconds_to(result, name)
        cells = ["–" if math.isnan(rate) else f"{rate:g}", f"{loss['median']:.3g}"]
        cells += [f"{loss['low']:.3g}–{loss['high']:.3g}"]
        cells += [f"{100 * row['accuracy']['median']:.1f} %"] * scored
        cells += ["–" if math.isnan(seconds) else f"{seconds:.1f}"]
        cells += [f"{row['ms_per_step']:.2f}", f"{row['state_bytes'] / 1e6:.1f} MB"]
        table.add_row(name, *cells)
    Console().print(table)


def write_png(path: Path, result: dict[str, Any]) -> None:
    """Draws held-out loss over steps and over seconds, a labelled curve for every method."""
    from matplotlib.figure import Figure

    from lowrank_optax.plot import label_ends

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    for ax, across in zip(figure.subplots(1, 2, sharey=True), ("steps", "seconds"), strict=True):
        ends = []
        for name, row in result["methods"].items():
            curves = row["curves"]
            loss = np.ma.masked_invalid(np.atleast_2d(np.asarray(curves["held_out_loss"], float)))
            clock = np.median(np.atleast_2d(np.asarray(curves[across], float)), 0)
            line, color = np.ma.median(loss, 0), COLORS.get(name, "black")
            style = {"color": color, "lw": 2.4 if row["ours"] else 1.4}
            ax.plot(clock, line, label=name, zorder=2 + row["ours"], **style)
            if len(loss) > 1:
                ax.fill_between(clock, loss.min(0), loss.max(0), color=color, alpha=0.12, lw=0)
            if line.count():
                ends.append((name, clock[-1], float(line.compressed()[-1]), color))
        _scale(ax, result)
        ax.set_xlabel(across)
        label_ends(ax, ends)
    figure.axes[0].set_ylabel("held-out loss")
    figure.suptitle(title(result), fontsize=11)
    figure.savefig(path)


def _scale(ax: Any, result: dict[str, Any]) -> None:
    """A logarithmic scale where losses span it, and room for what tells methods apart."""
    found = [
        np.ma.median(np.ma.masked_invalid(np.atleast_2d(row["curves"]["held_out_loss"])), 0)
        for row in result["methods"].values()
    ]
    found = [line.compressed() for line in found if line.count()]
    if found:
        low, high = min(line.min() for line in found), max(line.max() for line in found)
        if low > 0 and high > 20 * low:
            ax.set_yscale("log")
        else:
            # The start, alike for all, would flatten what comes after it.
            late = max(line[len(line) // 5] for line in found)
            ax.set_ylim(low - 0.05 * (late - low), late + 0.02 * (late - low) or None)
    ax.grid(color="0.93", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
