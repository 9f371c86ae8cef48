"""What both commands need: refusals, checks of arguments, and the files that they leave."""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import lowrank_optax as lro


class Refusal(Exception):
    """What was asked for cannot be done; the message is the one line the user sees."""


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse reads it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def need(command: str, *modules: str) -> None:
    """Refuses a command whose packages are not installed."""
    missing = [module for module in modules if not installed(module)]
    if missing:
        raise Refusal(f"{command} needs {', '.join(missing)}: pip install 'lowrank_optax[demo]'")


def installed(module: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(module) is not None


def choice(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry of that name, or a refusal that lists the names there are."""
    if name not in table:
        raise Refusal(f"there is no {what} {name!r}; choose from {', '.join(table)}")
    return table[name]


def check_writable(out: Path) -> None:
    """Makes the folder and refuses one that no file can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise Refusal(f"cannot write to {out}: {error.strerror}") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {"python": platform.python_version(), "lowrank_optax": lro.__version__} | {
        package: importlib.metadata.version(package) for package in packages
    }


def machine() -> dict[str, Any]:
    """What the times in a result were measured on."""
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes numbers with six digits, and ``null`` where they are not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    path.write_text(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")


def empty_table(title: str, caption: str) -> Any:
    """A table for the terminal, without columns."""
    from rich import box
    from rich.table import Table

    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    return Table(title=title, caption=caption, **style)
