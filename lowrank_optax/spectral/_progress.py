"""What a fit shows while it runs: a bar on a terminal, and a table of the modes at its end."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lowrank_optax._core.checks import check


class Shown(NamedTuple):
    """Where a fit reports.

    Attributes:
      record: called with the record of every evaluation.
      result: called with the `Decomposition` at the end.
    """

    record: Callable[[dict[str, Any]], Any]
    result: Callable[[Any], Any]


def _nothing(_: Any) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def watching(progress: Any, steps: int) -> Iterator[Shown]:
    """The functions of `Shown` for the argument ``progress`` of `fit`."""
    check(
        progress is None or isinstance(progress, bool) or callable(progress),
        f"fit: progress is {progress!r}; pass a function of a record, True, False or None.",
    )
    if callable(progress):
        yield Shown(progress, _nothing)
        return
    wanted = sys.stderr.isatty() and _installed() if progress is None else progress
    if not wanted:
        yield Shown(_nothing, _nothing)
        return
    check(_installed(), "fit: progress=True draws with rich: pip install 'lowrank_optax[demo]'.")
    with _bar(steps) as shown:
        yield shown


def _installed() -> bool:
    return importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def _bar(steps: int) -> Iterator[Shown]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    text = TextColumn("{task.fields[note]}", style="dim")
    columns = "fit", BarColumn(30), MofNCompleteColumn(), Remaining(), text
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("", total=steps, note="compiling")

        def record(latest: dict[str, Any]) -> None:
            values = latest["eigenvalues"]
            note = " ".join(f"{value:.4g}" for value in values[:6]) + " …" * (len(values) > 6)
            bars.update(task, completed=latest["step"], note=note)

        def result(found: Any) -> None:
            bars.stop()
            console.print(_table(found))

        yield Shown(record, result)


def _table(found: Any) -> Any:
    from rich import box
    from rich.table import Table

    seconds = found.history[-1]["seconds"] if found.history else 0.0
    caption = f"step {found.step}, {seconds:.0f} s, {found.message}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, caption=caption, caption_justify="left")
    for name in ("mode", "eigenvalue", "standard error"):
        table.add_column(name, justify="right")
    for i, (value, error) in enumerate(zip(found.eigenvalues, found.errors, strict=True)):
        table.add_row(str(i + 1), f"{value:.5g}", f"{error:.1g}")
    return table
