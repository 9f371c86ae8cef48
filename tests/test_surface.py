"""The public surface: every name is documented with all that a user needs."""

import dataclasses
import importlib
import inspect
import re

import pytest

MODULES = (
    "",
    "basis",
    "curvature",
    "diagnose",
    "inner",
    "online",
    "online.streams",
    "online.trackers",
    "plot",
    "spectral",
    "spectral.operators",
    "training",
)


def module(name):
    return importlib.import_module(f"lowrank_optax.{name}".rstrip("."))


def public():
    """Every public class and function once, by the shortest name that it has."""
    seen = {}
    for name in MODULES:
        where = module(name)
        names = getattr(where, "__all__", None) or [
            n
            for n, x in vars(where).items()
            if not n.startswith("_") and getattr(x, "__module__", None) == where.__name__
        ]
        for n in names:
            x = getattr(where, n)
            if inspect.isclass(x) or inspect.isfunction(x):
                seen.setdefault(x, f"{name}.{n}".lstrip("."))
    return {name: x for x, name in seen.items()}


PUBLIC = public()


def kind(x):
    """What an object is to a reader: a record of results, something to implement, or to use."""
    if inspect.isclass(x) and issubclass(x, tuple):
        return "record"
    if inspect.isabstract(x) or getattr(x, "_is_protocol", False):
        return "interface"
    return "part" if inspect.isclass(x) else "function"


def documented(x):
    """The docstring of a class with those of the classes that it extends."""
    if not inspect.isclass(x):
        return inspect.getdoc(x) or ""
    return "\n".join(
        inspect.cleandoc(c.__doc__ or "") for c in x.__mro__ if "lowrank" in c.__module__
    )


def fields(x):
    """The names that a caller passes, or that a record has."""
    if kind(x) == "record":
        return x._fields
    if dataclasses.is_dataclass(x):
        return [f.name for f in dataclasses.fields(x) if f.init]
    names = inspect.signature(x).parameters.values()
    return [p.name for p in names if p.name not in ("self", "args", "kwargs")]


def missing(x):
    """What a reader would look for in vain."""
    text, what = documented(x), kind(x)
    lines = [line.strip() for line in text.splitlines()]
    named = {m for line in lines for m in re.findall(r"^\*{0,2}([\w, *]+):", line)}
    named = {n.strip(" *") for names in named for n in names.split(",")}
    out = [f"`{name}` in Args or Attributes" for name in fields(x) if name not in named]
    own = inspect.getdoc(x) or ""
    wanted = {
        "record": (),
        "interface": (),
        "part": ("Example:", "Cost:", "Source:", "Raises:"),
        "function": ("Example:", "Returns:"),
    }[what]
    source = inspect.getsource(x)
    for section in wanted:
        if section == "Raises:" and "__post_init__" not in vars(x):
            continue
        if not re.search(rf"(?m)^{section}", own):
            out.append(section)
    if what == "function" and re.search(r"\b(check\w*|raise)\b", source) and "Raises:" not in own:
        out.append("Raises:")
    if "Example:" in wanted and ">>>" not in own:
        out.append("a doctest")
    return out


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_object_is_documented(name):
    assert not missing(PUBLIC[name]), f"{name} lacks {', '.join(missing(PUBLIC[name]))}"
