"""What every benchmark prints and writes: its table, its machine and versions, its JSON."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


def machine() -> dict[str, Any]:
    """The machine and the versions a figure was taken with."""
    names = ("lowrank_optax", "jax", "jaxlib", "optax", "numpy", "torch", "torchzero")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": str(jax.devices()[0].device_kind),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **versions,
    }


def show(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Prints ``rows`` as a table; ``columns`` maps a key to its heading."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in machine().items()), style="dim")


def save(path: str | Path, **content: Any) -> None:
    """Writes a benchmark's figures with the machine they were taken on."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
