"""The command line: ``python -m lowrank_optax``."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro


class Refusal(Exception):
    """What was asked for cannot be done; the message is the one line the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for a refusal, 130 after Ctrl-C."""
    parser = _Parser(prog="python -m lowrank_optax", description="Low-rank eigenbasis optimizers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_spectrum(commands)
    args = parser.parse_args(argv)
    try:
        return args.command(args)
    except Refusal as refusal:
        print(f"{parser.prog}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# train ------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    summary = "train a small network with Adam, with lre, and with whitening in front of Adam"
    parser = commands.add_parser(
        "train",
        help=summary,
        description=f"{summary.capitalize()}, and compare them: same model, data, batches, steps "
        "and decay, and for each the best learning rate of a grid of the same size. "
        "Writes results.json and curves.png.",
    )
    parser.add_argument("--task", default="digits", help="digits, autoencoder, mnist or text")
    parser.add_argument("--steps", type=_positive, help="training steps (default: the task's)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        metavar="SEED",
        help="default: 0 to 4",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/TASK")
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        default=os.environ.get("LOWRANK_OPTAX_DATA") or None,
        help="where the files of mnist and text are (default: $LOWRANK_OPTAX_DATA)",
    )
    parser.set_defaults(command=_train)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _train(args: argparse.Namespace) -> int:
    _need("train", "flax", "matplotlib", "rich", "sklearn")
    # The eigenproblems are too small for LAPACK to gain from a second thread, and on a machine that
    # is busy its threads wait for each other many times longer than one takes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    task = _task(args.task, args.data_dir)
    out = args.out or Path("runs", args.task)
    _check_writable(out)
    steps = args.steps or task.steps
    runs: list[Run] = []
    try:
        _compare(task, steps, args.seeds, runs)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    result = {
        "settings": _settings(args.task, task, steps, args.seeds),
        "complete": not stopped,
        "methods": {m.name: _summary(m, runs) for m in METHODS if _best(m, runs)},
        "runs": [run.final() for run in runs if run.steps],
        "versions": _versions(),
        "machine": _machine(),
    }
    _write_json(out / "results.json", result)
    _write_png(out / "curves.png", result)
    _print_table(result)
    print(f"{'Stopped early; what' if stopped else 'What'} was measured is in {out}")
    return 130 if stopped else 0


def _need(command: str, *modules: str) -> None:
    missing = [module for module in modules if not _installed(module)]
    if missing:
        raise Refusal(f"{command} needs {', '.join(missing)}: pip install 'lowrank_optax[demo]'")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _task(name: str, data_dir: Path | None) -> Any:
    from lowrank_optax.demo import tasks as _tasks

    make = _choice("task", name, _tasks.TASKS)
    try:
        return make(data_dir)
    except _tasks.DataError as error:
        raise Refusal(str(error)) from error


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise Refusal(f"cannot write to {out}: {error.strerror}") from error


# Training and measuring -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer as a function of its learning-rate schedule, and the peaks to try."""

    name: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]


METHODS = (
    Method("Adam", optax.adam, (0.003, 0.01, 0.03)),
    Method("soap_muon", lro.soap_muon, (0.003, 0.01, 0.03)),
    Method(
        "whitening + Adam",
        lambda rate: optax.chain(
            lro.scale_by_lre(lro.curvature.Covariance(), lro.basis.GGT(20), lro.inner.LInvSqrt()),
            optax.adam(rate),
        ),
        (0.003, 0.01, 0.03),
    ),
)


@dataclasses.dataclass
class Run:
    """One training run. Each point of its curves closes a chunk of steps.

    Attributes:
      loss: mean over the batches of the chunk.
      seconds: spent in training steps since the start, without compilation and evaluation.
    """

    method: str
    learning_rate: float
    seed: int
    complete: bool = False
    state_bytes: int = 0
    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    held_out_loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms_per_step(self) -> float:
        """Median over chunks, so that a busy moment of the machine counts for little."""
        chunks = np.diff(self.seconds, prepend=0) / np.diff(self.steps, prepend=0)
        return 1e3 * float(np.median(chunks))

    def final(self) -> dict[str, Any]:
        """The run with the last point of every curve in place of the curve."""
        fields = dataclasses.asdict(self) | {"ms_per_step": self.ms_per_step}
        return {k: v[-1] if isinstance(v, list) else v for k, v in fields.items()}


def _compare(task: Any, steps: int, seeds: Sequence[int], runs: list[Run]) -> None:
    """Appends to ``runs`` one run of every method, learning rate and seed, methods alternating."""
    trainers = {method.name: _trainer(task, method, steps) for method in METHODS}
    grid = list(zip(*(method.rates for method in METHODS), strict=True))
    with _progress(len(grid) * len(seeds) * steps) as show:
        for seed in seeds:
            for rates in grid:
                for method, rate in zip(METHODS, rates, strict=True):
                    runs.append(Run(method.name, rate, seed))
                    for length in trainers[method.name](runs[-1]):
                        show(runs[-1], length)


def _trainer(task: Any, method: Method, steps: int) -> Callable[[Run], Iterator[int]]:
    """A function that fills in a run and yields the length of every chunk of steps it took.

    The peak of the schedule is part of the state, so one compilation serves the whole grid.
    """
    from lowrank_optax.training import TrainState

    def make(peak):
        return method.make(optax.linear_schedule(peak, 0.0, steps))

    tx = optax.inject_hyperparams(make)(peak=method.rates[0])

    @jax.jit
    def create(key, peak):
        state = TrainState.create(apply_fn=task.model.apply, params=task.init(key), tx=tx)
        # A plain number would be of another type than the array it becomes in training, and the
        # second chunk be compiled anew.
        peak = jnp.asarray(peak, jnp.float32)
        return state.replace(opt_state=optax.tree.set(state.opt_state, peak=peak))

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
    def advance(state, key, data, length):
        def step(state, _):
            batch = task.sample(jax.random.fold_in(key, state.step), data)
            value_fn = functools.partial(task.loss, batch=batch)
            value, grads = jax.value_and_grad(value_fn)(state.params)
            return state.apply_gradients(grads=grads, value=value, value_fn=value_fn), value

        return jax.lax.scan(step, state, length=length)

    measure = jax.jit(task.measure)
    length = min(math.ceil(steps / 20), 100)
    lengths = [length] * (steps // length) + [steps % length] * (steps % length > 0)

    @functools.cache
    def compile_all() -> None:
        # By use, on states that are thrown away, so that no compilation is timed.
        for length in set(lengths):
            key = jax.random.key(0)
            state, _ = advance(create(key, method.rates[0]), key, task.train, length)
            jax.block_until_ready(measure(state.params, task.held_out))

    def train(run: Run) -> Iterator[int]:
        compile_all()
        key, batches = jax.random.split(jax.random.key(run.seed))
        state = jax.block_until_ready(create(key, run.learning_rate))
        run.state_bytes = sum(x.nbytes for x in jax.tree.leaves(state.opt_state))
        seconds = 0.0
        for length in lengths:
            start = time.perf_counter()
            state, losses = jax.block_until_ready(advance(state, batches, task.train, length))
            seconds += time.perf_counter() - start
            held_out_loss, accuracy = measure(state.params, task.held_out)
            run.steps.append(int(state.step))
            run.seconds.append(seconds)
            run.loss.append(float(losses.mean()))
            run.held_out_loss.append(float(held_out_loss))
            run.accuracy.append(float(accuracy))
            run.complete = run.steps[-1] == steps
            yield length

    return train


# Results ----------------------------------------------------------------------------------------


def _best(method: Method, runs: Sequence[Run]) -> list[Run]:
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


def _summary(method: Method, runs: Sequence[Run]) -> dict[str, Any]:
    best = _best(method, runs)

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


def _settings(name: str, task: Any, steps: int, seeds: list[int]) -> dict[str, Any]:
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return {
        "task": name,
        "parameters": sum(x.size for x in jax.tree.leaves(shapes)),
        "steps": steps,
        "seeds": seeds,
        "schedule": "linear from the learning rate to 0",
        "learning_rates": {method.name: method.rates for method in METHODS},
    }


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {"python": platform.python_version(), "lowrank_optax": lro.__version__} | {
        package: importlib.metadata.version(package) for package in packages
    }


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
    }


# Showing and keeping ----------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Run, int], None]]:
    """A bar of ``total`` steps for every method; where no terminal can show it, a line a run."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    live = console.is_interactive
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(30),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, disable=not live) as bars:
        rows = {m.name: bars.add_task(m.name, total=total, note="compiling") for m in METHODS}

        def show(run: Run, length: int) -> None:
            note = f"rate {run.learning_rate:g}, seed {run.seed}: loss {run.loss[-1]:.3g}"
            bars.update(rows[run.method], advance=length, note=note)
            if run.complete and not live:
                print(f"{run.method}, {note}, {run.ms_per_step:.2f} ms/step", flush=True)

        yield show


def _title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    count = len(settings["seeds"])
    return (
        f"{settings['task']}: {settings['parameters']:,} parameters, {settings['steps']:,} steps, "
        f"{count} {'seed' if count == 1 else 'seeds'}"
        f"{'' if result['complete'] else ', stopped early'}"
    )


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console

    caption = "At the learning rate of the lowest training loss; medians over seeds."
    table = _table(_title(result), caption)
    table.add_column("", min_width=9)
    # Of held-out examples the share of right answers is what a machine's rounding moves least.
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


def _table(title: str, caption: str) -> Any:
    from rich import box
    from rich.table import Table

    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    return Table(title=title, caption=caption, **style)


def _write_json(path: Path, result: dict[str, Any]) -> None:
    """Six digits, and ``null`` for what is not finite, which JSON cannot say."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    path.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")


def _write_png(path: Path, result: dict[str, Any]) -> None:
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
    figure.suptitle(f"{_title(result)} (median, lowest to highest)")
    figure.savefig(path)


# spectrum ---------------------------------------------------------------------------------------


def _add_spectrum(commands: Any) -> None:
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
    parser.add_argument("--modes", type=_positive, default=4, help="default: 4")
    parser.add_argument("--steps", type=_positive, default=1600, help="default: 1600")
    parser.add_argument("--batch", type=_positive, default=512, help="points a step; default: 512")
    parser.add_argument(
        "--method",
        default="nested-lora",
        help="nested-lora, nested-lora-joint, orbital, neural-ef, spin or energy (one network "
        "for all and whitening in front of Adam: the fastest way to many modes)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/OPERATOR")
    parser.set_defaults(command=_spectrum)


def _spectrum(args: argparse.Namespace) -> int:
    _need("spectrum", "flax", "matplotlib", "rich")
    from lowrank_optax.demo import problems as _spectrum

    problem = _choice("operator", args.operator, _spectrum.OPERATORS)()
    options = _choice("method", args.method, _spectrum.METHODS)
    if args.batch < 2:
        raise Refusal("--batch 1: pass at least 2 points")
    truth = problem.truth(args.modes)
    if truth[-1] <= 0:
        # Below zero a low-rank approximation is better without the mode.
        above = int(np.sum(truth > 0))
        raise Refusal(f"{args.operator} has {above} modes above zero; --modes {args.modes} is more")
    out = args.out or Path("runs", args.operator)
    _check_writable(out)
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
        ).ritz()  # modes that are not yet orthogonal would show an eigenvalue twice
        step, message = fit.step, fit.message
        modes = _spectrum.rows(truth, fit.eigenvalues, fit.errors)
        _spectrum.write_png(out / "modes.png", fit, title.format(step))
        stopped = False
    except KeyboardInterrupt:
        if not history:
            raise
        step, message = history[-1]["step"], "stopped early, with the last evaluation's values"
        modes = _spectrum.rows(truth, history[-1]["ritz"])
        stopped = True
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "command")}
    result = {
        "settings": settings | {"formula": problem.formula},
        "complete": not stopped,
        "message": message,
        "seconds": time.perf_counter() - start,
        "modes": modes,
        "history": history,
        "versions": _versions(),
        "machine": _machine(),
    }
    _write_json(out / "results.json", result)
    _print_modes(title.format(step), result)
    print(f"Stopped early; eigenvalues are in {out}" if stopped else f"What was found is in {out}")
    return 130 if stopped else 0


def _choice(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise Refusal(f"there is no {what} {name!r}; choose from {', '.join(table)}")
    return table[name]


def _line(record: dict[str, Any]) -> str:
    values = " ".join(f"{value:.4g}" for value in record["ritz"])
    return f"step {record['step']}, {record['seconds']:.0f} s: {values}"


def _print_modes(title: str, result: dict[str, Any]) -> None:
    from rich.console import Console

    errors = [row["relative_error"] for row in result["modes"]]
    caption = f"Median relative error {np.median(errors):.2g}; {result['message']}."
    table = _table(title, caption)
    for name in ("mode", "eigenvalue", "truth", "relative error"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(result["modes"]):
        value = f"{row['eigenvalue']:.5g}"
        if "standard_error" in row:
            value += f" ± {row['standard_error']:.1g}"
        table.add_row(str(i + 1), value, f"{row['truth']:.5g}", f"{row['relative_error']:.1e}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
