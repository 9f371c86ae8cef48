"""Training runs of the command ``train``: the methods, the loop, and what is measured."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer as a function of its learning-rate schedule, and the peaks to try.

    Attributes:
      ours: whether it is of this library.
      tuned: whether it has a rate at all; ``rates`` is a placeholder where it has none.
    """

    name: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    ours: bool = False
    tuned: bool = True


def muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Optax's Muon with updates of Adam's size; heads, tables and vectors stay with Adam."""
    known = inspect.signature(optax.contrib.muon).parameters
    options: dict[str, Any] = {
        "consistent_rms": 0.2,
        "muon_weight_dimension_numbers": _muon_dimensions,
    }
    return optax.contrib.muon(rate, **{k: v for k, v in options.items() if k in known})


def _muon_dimensions(params: Any) -> Any:
    """Attention's kernels of three axes as matrices, as users of Muon see them."""
    axes = optax.contrib.MuonDimensionNumbers

    def of(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if x.ndim == 3:
            return axes((0, 1), (2,)) if "'out'" in name else axes((0,), (1, 2))
        return axes() if x.ndim == 2 and "embedding" not in name else None

    return jax.tree_util.tree_map_with_path(of, params)


METHODS = (
    Method("AdamW", optax.adamw),
    Method("Muon", muon),
    Method(
        "whitening + AdamW", lambda rate: optax.chain(lro.whiten(), optax.adamw(rate)), ours=True
    ),
    Method("soap_muon", lro.soap_muon, ours=True),
)
LEAST_SQUARES = Method(
    "levenberg_marquardt", lambda rate: lro.levenberg_marquardt(), (1.0,), ours=True, tuned=False
)


def methods(task: Any) -> tuple[Method, ...]:
    """The methods that a task is run with: where there are residuals, one that knows them too."""
    return METHODS if task.residuals is None else (*METHODS, LEAST_SQUARES)


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
        """The median over chunks, so that a busy moment of the machine counts for little."""
        chunks = np.diff(self.seconds, prepend=0) / np.diff(self.steps, prepend=0)
        return 1e3 * float(np.median(chunks))

    def final(self) -> dict[str, Any]:
        """The run, with the last point of every curve instead of the curve."""
        fields = dataclasses.asdict(self) | {"ms_per_step": self.ms_per_step}
        return {k: v[-1] if isinstance(v, list) else v for k, v in fields.items()}


def compare(task: Any, steps: int, seeds: Sequence[int], runs: list[Run]) -> None:
    """Appends to ``runs`` one run of every method, learning rate and seed, methods alternating."""
    tried = methods(task)
    trainers = {method.name: trainer(task, method, steps) for method in tried}
    with progress({m.name: len(m.rates) * len(seeds) * steps for m in tried}) as show:
        for seed in seeds:
            for rates in itertools.zip_longest(*(method.rates for method in tried)):
                for method, rate in zip(tried, rates, strict=True):
                    if rate is None:
                        continue
                    runs.append(Run(method.name, rate, seed))
                    for length in trainers[method.name](runs[-1]):
                        show(runs[-1], length)


def trainer(task: Any, method: Method, steps: int) -> Callable[[Run], Iterator[int]]:
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
        # Training turns a plain number into an array. That is another type, so the second chunk
        # would be compiled again.
        peak = jnp.asarray(peak, jnp.float32)
        return state.replace(opt_state=optax.tree.set(state.opt_state, peak=peak))

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
    def advance(state, key, data, length):
        def step(state, _):
            batch = task.sample(jax.random.fold_in(key, state.step), data)
            value_fn = functools.partial(task.loss, batch=batch)
            value, grads = jax.value_and_grad(value_fn)(state.params)
            known = {"value": value, "value_fn": value_fn}
            if task.residuals is not None:
                known["residuals_fn"] = functools.partial(task.residuals, batch=batch)
            return state.apply_gradients(grads=grads, **known), value

        return jax.lax.scan(step, state, length=length)

    measure = jax.jit(task.measure)
    length = min(math.ceil(steps / 20), 100)
    lengths = [length] * (steps // length) + [steps % length] * (steps % length > 0)

    @functools.cache
    def compile_all() -> None:
        # Run once on states that are thrown away, so that no compilation is timed.
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
            run.loss.append(float(np.mean(np.asarray(losses))))
            run.held_out_loss.append(float(held_out_loss))
            run.accuracy.append(float(accuracy))
            run.complete = run.steps[-1] == steps
            yield length

    return train


@contextlib.contextmanager
def progress(totals: dict[str, int]) -> Iterator[Callable[[Run, int], None]]:
    """A bar of so many steps for every method; without a terminal, a line for every run."""
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
        rows = {n: bars.add_task(n, total=total, note="waiting") for n, total in totals.items()}

        def show(run: Run, length: int) -> None:
            note = f"rate {run.learning_rate:g}, seed {run.seed}: "
            note += f"held-out loss {run.held_out_loss[-1]:.3g}"
            bars.update(rows[run.method], advance=length, note=note)
            if run.complete and not live:
                print(f"{run.method}, {note}, {run.ms_per_step:.2f} ms/step", flush=True)

        yield show
