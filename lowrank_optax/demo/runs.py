"""Training runs of the command ``train``: the methods, the loop, and what is measured."""

import contextlib
import dataclasses
import functools
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
        """The median over chunks, so that a busy moment of the machine counts for little."""
        chunks = np.diff(self.seconds, prepend=0) / np.diff(self.steps, prepend=0)
        return 1e3 * float(np.median(chunks))

    def final(self) -> dict[str, Any]:
        """The run, with the last point of every curve instead of the curve."""
        fields = dataclasses.asdict(self) | {"ms_per_step": self.ms_per_step}
        return {k: v[-1] if isinstance(v, list) else v for k, v in fields.items()}


def compare(task: Any, steps: int, seeds: Sequence[int], runs: list[Run]) -> None:
    """Appends to ``runs`` one run of every method, learning rate and seed, methods alternating."""
    trainers = {method.name: trainer(task, method, steps) for method in METHODS}
    grid = list(zip(*(method.rates for method in METHODS), strict=True))
    with progress(len(grid) * len(seeds) * steps) as show:
        for seed in seeds:
            for rates in grid:
                for method, rate in zip(METHODS, rates, strict=True):
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
            return state.apply_gradients(grads=grads, value=value, value_fn=value_fn), value

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
            run.loss.append(float(losses.mean()))
            run.held_out_loss.append(float(held_out_loss))
            run.accuracy.append(float(accuracy))
            run.complete = run.steps[-1] == steps
            yield length

    return train


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[Run, int], None]]:
    """A bar of ``total`` steps for every method; without a terminal, a line for every run."""
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
