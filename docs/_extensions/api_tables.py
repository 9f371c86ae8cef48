"""A fence `api` that lists public objects: a table of them, then what each says.

```{api} lowrank_optax.basis
GGT
Basis +members
```

Behind the first line stand names of the module, one a line; `+members` shows an object's methods.
"""

import importlib
import inspect
import re

FENCE = re.compile(r"^```\{api\} (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def listed(text):
    """Module, name and options of every object that a page's fences list."""
    for module, body in FENCE.findall(text):
        for line in body.splitlines():
            if line.strip():
                name, *options = line.split()
                yield module, name, options


def directive(module, name):
    """The autodoc directive that fits an object."""
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        return "autoclass"
    return "autofunction" if callable(thing) and hasattr(thing, "__name__") else "autodata"


def expanded(match):
    """The reStructuredText of one fence."""
    module = match[1]
    entries = [(name, options) for _, name, options in listed(match[0])]
    out = ["```{eval-rst}", f".. currentmodule:: {module}", "", ".. autosummary::", ""]
    out += [f"   {name}" for name, _ in entries] + [""]
    for name, options in entries:
        out.append(f".. {directive(module, name)}:: {name}")
        out += ["   :members:"] if "+members" in options else []
        out.append("")
    return "\n".join([*out, "```"])


def expand(app, docname, source):
    """Replaces the fences of a page before it is parsed."""
    if docname.startswith("api/"):
        source[0] = FENCE.sub(expanded, source[0])


def setup(app):
    app.connect("source-read", expand)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
