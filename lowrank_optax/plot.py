"""Pictures of a run, with matplotlib: `pip install 'lowrank_optax[plot]'`.

Functions draw into ``ax``, or into a new figure without it, and return the axes; `training` draws
all that a log holds into one figure.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Told apart with any kind of colour vision, and by their grey values in print (Okabe and Ito).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_MISSING = "lowrank_optax.plot draws with matplotlib: pip install 'lowrank_optax[plot]'"


def spectrum(history: Any, ax: Any = None, *, steps: Sequence[int] | None = None, group: int = 0):
    """Eigenvalues over time on a logarithmic scale, one line for every rank index.

    Dead slots and eigenvalues that are not positive leave a gap.

    Args:
      history: a `diagnose.Summary` whose fields lead with a time axis, as `jax.lax.scan` stacks
        them; ``history.spectrum`` is ``(t, groups, r)``.
      ax: matplotlib axes to draw into; those of a new figure by default.
      steps: step numbers of the records, ``(t,)``; by default they are counted from 0.
      group: index of the group of parameters to draw, 0 by default.

    Returns:
      The axes.

    Raises:
      ValueError: for records without a time axis, a group that is not there, or steps that do not
        match the records.
      ImportError: where matplotlib is not installed and no ``ax`` is given.

    Example:
      >>> import numpy as np, lowrank_optax as lro
      >>> from matplotlib.figure import Figure
      >>> zero = np.zeros((3, 1))
      >>> summary = lro.diagnose.Summary(2.0 ** -np.arange(6).reshape(3, 1, 2), *[zero] * 9)
      >>> ax = lro.plot.spectrum(summary, Figure().subplots())
      >>> ax.get_ylabel(), ax.get_yscale()
      ('eigenvalue', 'log')
    """
    ax = _axes(ax)
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    lam = _records("spectrum", history.spectrum, 3)
    if not -lam.shape[1] <= group < lam.shape[1]:
        raise ValueError(f"group is {group}; the history has {lam.shape[1]} group(s), from 0.")
    lam = np.where(lam[:, group] > 0, lam[:, group], np.nan)
    times, rank = _steps(steps, len(lam)), lam.shape[1]
    color = ScalarMappable(Normalize(1, max(rank, 2)), "viridis")
    lines = [np.column_stack([times, lam[:, i]]) for i in range(rank)]
    # The leading directions last, so that they lie on top.
    ax.add_collection(
        LineCollection(lines[::-1], colors=color.to_rgba(np.arange(rank, 0, -1)), linewidths=0.9)
    )
    ax.set_yscale("log")
    ax.autoscale_view()
    bar = ax.figure.colorbar(color, ax=ax, pad=0.02, ticks=MaxNLocator(6, integer=True))
    bar.set_label("rank index")
    bar.outline.set_visible(False)
    bar.ax.invert_yaxis()
    return _finish(ax, "step", "eigenvalue")


def captured_energy(history: Any, ax: Any = None, *, steps: Sequence[int] | None = None):
    """Share of the gradient's squared norm that the basis captures, ``|Q^T g|² / |g|²``, over time.

    Up to seven groups get a line each; of more, the median and the band between the quartiles are
    drawn.

    Args:
      history: a `diagnose.Summary` whose fields lead with a time axis, as `jax.lax.scan` stacks
        them; ``history.captured_energy`` is ``(t, groups)``.
      ax: matplotlib axes to draw into; those of a new figure by default.
      steps: step numbers of the records, ``(t,)``; by default they are counted from 0.

    Returns:
      The axes.

    Raises:
      ValueError: for records without a time axis, or steps that do not match them.
      ImportError: where matplotlib is not installed and no ``ax`` is given.

    Example:
      >>> import numpy as np, lowrank_optax as lro
      >>> from matplotlib.figure import Figure
      >>> summary = lro.diagnose.Summary(*[np.full((3, 2), 0.9)] * 10)
      >>> ax = lro.plot.captured_energy(summary, Figure().subplots())
      >>> [line.get_label() for line in ax.lines]
      ['group 0', 'group 1']
    """
    ax = _axes(ax)
    energy = _records("captured_energy", history.captured_energy, 2)
    times, groups = _steps(steps, len(energy)), energy.shape[1]
    if groups <= len(_COLORS):
        for i, color in zip(range(groups), _COLORS, strict=False):
            ax.plot(times, energy[:, i], color=color, lw=1.2, label=f"group {i}")
    else:
        low, median, high = np.nanquantile(energy, (0.25, 0.5, 0.75), axis=1)
        ax.fill_between(times, low, high, color=_COLORS[0], alpha=0.2, lw=0, label="quartiles")
        ax.plot(times, median, color=_COLORS[0], lw=1.5, label=f"median of {groups} groups")
    if groups > 1:
        ax.legend(frameon=False)
    ax.set_ylim(-0.02, 1.02)
    return _finish(ax, "step", "gradient in the basis")


def loss(curves: Mapping[str, Mapping[str, Any]], x: str = "steps", ax: Any = None):
    """Loss on a logarithmic scale: for every name the median over seeds and the band they span.

    Args:
      curves: the curves by name. Each holds the array ``loss``, ``(t,)`` or ``(seeds, t)``, and the
        array that ``x`` names, of the same shape or ``(t,)``.
      x: name of the horizontal axis, ``"steps"``, the default, or ``"seconds"``.
      ax: matplotlib axes to draw into; those of a new figure by default.

    Returns:
      The axes.

    Raises:
      ValueError: if ``x`` is neither of the two, or the shapes do not agree.
      ImportError: where matplotlib is not installed and no ``ax`` is given.

    Example:
      >>> import lowrank_optax as lro
      >>> from matplotlib.figure import Figure
      >>> curves = {"Adam": {"steps": [1, 2], "loss": [[1.0, 0.5], [3.0, 0.7]]}}
      >>> ax = lro.plot.loss(curves, "steps", Figure().subplots())
      >>> print(ax.lines[0].get_ydata()[0], ax.get_yscale())  # the median over two seeds
      2.0 log
    """
    ax = _curves(curves, x, "loss", ax)
    ax.set_yscale("log")
    return ax


def accuracy(curves: Mapping[str, Mapping[str, Any]], x: str = "steps", ax: Any = None):
    """Accuracy: for every name the median over seeds and the band they span.

    Args:
      curves: the curves by name. Each holds the array ``accuracy``, ``(t,)`` or ``(seeds, t)``, and
        the array that ``x`` names, of the same shape or ``(t,)``.
      x: name of the horizontal axis, ``"steps"``, the default, or ``"seconds"``.
      ax: matplotlib axes to draw into; those of a new figure by default.

    Returns:
      The axes.

    Raises:
      ValueError: if ``x`` is neither of the two, or the shapes do not agree.
      ImportError: where matplotlib is not installed and no ``ax`` is given.

    Example:
      >>> import lowrank_optax as lro
      >>> from matplotlib.figure import Figure
      >>> curves = {"Adam": {"steps": [1, 2], "accuracy": [0.5, 0.9]}}
      >>> ax = lro.plot.accuracy(curves, ax=Figure().subplots())
      >>> ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()
      ('steps', 'accuracy', 'linear')
    """
    return _curves(curves, x, "accuracy", ax)


def training(
    history: Any,
    *,
    losses: Sequence[float] | None = None,
    steps: Sequence[int] | None = None,
    views: Any = None,
    group: Any = 0,
):
    """One figure of a run: loss, spectrum, captured energy, steps, and how leaves are seen.

    What is not there is not drawn. Steps are the drift of the basis, the angle between gradient and
    update, and the share of steps dropped so far.

    Args:
      history: the stacked records of a run, with a leading axis of time: a `diagnose.Summary`, or
        for matrices the dictionary of `diagnose.matrices`.
      losses: the losses, ``(t,)``; by default (``None``) there is no panel of them.
      steps: step numbers of the records, ``(t,)``; by default they are counted from 0.
      views: text to set below, or anything that prints as a table of how leaves are seen; none by
        default (``None``).
      group: index of the group of parameters whose spectrum is drawn, or, for matrices, the name of
        the shape; the first by default.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: for records without a time axis, a group that is not there, or steps that do not
        match the records.
      ImportError: where matplotlib is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> tx = lro.lre(1.0, basis=lro.basis.GGT(2)); state = tx.init(jnp.zeros(3))
      >>> def step(state, g):
      ...     _, state = tx.update(g, state)
      ...     return state, lro.diagnose.summary(state)
      >>> _, history = jax.lax.scan(step, state, jnp.eye(3))
      >>> figure = lro.plot.training(history, losses=[3.0, 2.0, 1.0])
      >>> [ax.get_ylabel() for ax in figure.axes[:4]]
      ['loss', 'eigenvalue', 'gradient in the basis', 'share']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING) from error
    seen = _of_shapes(history, group) if isinstance(history, Mapping) else history
    panels = ["loss"] * (losses is not None) + ["spectrum", "energy"]
    panels += ["steps"] * hasattr(seen, "drift")
    columns = 2 if len(panels) == 4 else len(panels)
    height = 3.2 * (len(panels) // columns)
    below = 0.0 if views is None else 0.2 + 0.16 * (str(views).count("\n") + 1)
    figure = Figure(figsize=(4.6 * columns, height + below), dpi=120, layout="constrained")
    parts = figure.subfigures(
        1 + (below > 0), squeeze=False, height_ratios=[height, below][: 1 + (below > 0)]
    )[:, 0]
    grid = parts[0].subplots(len(panels) // columns, columns, squeeze=False).ravel()
    axes = dict(zip(panels, grid, strict=True))
    if losses is not None:
        values = np.asarray(losses, float)
        axes["loss"].plot(_steps(steps, len(values)), values, color=_COLORS[0], lw=1.2)
        axes["loss"].set_yscale("log" if np.nanmin(values) > 0 else "linear")
        _finish(axes["loss"], "step", "loss")
    spectrum(seen, axes["spectrum"], steps=steps, group=0 if seen is not history else group)
    captured_energy(seen, axes["energy"], steps=steps)
    if "steps" in axes:
        _taken(seen, axes["steps"], steps)
    for part in parts[1:]:
        part.text(0.01, 0.98, str(views), family="monospace", fontsize=8, va="top")
    return figure


class _Shape(NamedTuple):
    """Records of the matrices of one shape, as of one group each."""

    spectrum: Any
    captured_energy: Any


def _of_shapes(history: Mapping[str, Any], group: Any) -> _Shape:
    names = list(history)
    name: Any = group
    if isinstance(group, int) and -len(names) <= group < len(names):
        name = names[group]
    if name not in history:
        raise ValueError(f"group is {group!r}; the history has the shapes {', '.join(names)}.")
    found = history[name]
    lam = found.short if found.short is not None else found.long
    return _Shape(np.asarray(lam), np.asarray(found.captured_energy))


def _taken(seen: Any, ax: Any, steps: Sequence[int] | None) -> None:
    """Drift, cosine and dropped steps of a `diagnose.Summary`: medians over the groups."""
    drift, cosine = (_records(k, getattr(seen, k), 2) for k in ("drift", "cosine"))
    times = _steps(steps, len(drift))
    lost = sum(np.asarray(getattr(seen, k), float) for k in ("nonfinite", "zero", "eigh", "inner"))
    curves = {
        "drift of the basis": np.median(drift, 1),
        "cosine to the gradient": np.median(cosine, 1),
        "steps dropped": np.max(lost, 1) / np.maximum(times - times[0] + 1, 1),
    }
    for color, (name, values) in zip(_COLORS, curves.items(), strict=False):
        ax.plot(times, values, color=color, lw=1.2, label=name)
    ax.legend(frameon=False, fontsize=8)
    _finish(ax, "step", "share")


def _curves(curves: Mapping[str, Mapping[str, Any]], x: str, y: str, ax: Any):
    if x not in ("steps", "seconds"):
        raise ValueError(f"x is {x!r}; pass 'steps' or 'seconds'.")
    ax = _axes(ax)
    for i, (name, curve) in enumerate(curves.items()):
        across, values = (np.atleast_2d(np.asarray(curve[axis], float)) for axis in (x, y))
        if across.shape not in (values.shape, (1, values.shape[1])):
            raise ValueError(
                f"{name}: {x} has shape {across.shape} and {y} {values.shape}; pass (seeds, t) "
                "arrays, or (t,) where all seeds agree."
            )
        # Seeds differ in seconds by noise alone, so all have one clock. Where some seeds have
        # diverged, the finite losses of the others are drawn.
        clock = np.median(across, 0)
        values = np.ma.masked_invalid(values)
        color = _COLORS[i % len(_COLORS)]
        if len(values) > 1:
            ax.fill_between(clock, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        ax.plot(clock, np.ma.median(values, 0), color=color, lw=1.6, label=name)
    if curves:
        ax.legend(frameon=False)
    return _finish(ax, x, y)


def label_ends(ax: Any, ends: Sequence[tuple[str, float, float, Any]], gap: float = 0.055) -> None:
    """Writes the names of curves beside their ends, moved apart where they would overlap.

    Args:
      ax: matplotlib axes, whose scales and limits are final.
      ends: name, x, y and colour of the end of every curve.
      gap: least distance between two names, as a share of the axes' height, 0.055 by default.

    Returns:
      Nothing.

    Example:
      >>> import lowrank_optax as lro
      >>> from matplotlib.figure import Figure
      >>> ax = Figure().subplots(); _ = ax.plot([0, 1], [1.0, 0.5])
      >>> lro.plot.label_ends(ax, [("ours", 1.0, 0.5, "C0")])
      >>> [text.get_text() for text in ax.texts]
      ['ours']
    """
    at = lambda x, y: ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
    placed = sorted((float(at(x, y)[1]), name, x, y, color) for name, x, y, color in ends)
    heights = [min(max(each[0], 0.02), 0.98) for each in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = max(heights[-1] - 0.98, 0.0) if heights else 0.0
    for height, (_, name, x, y, color) in zip(heights, placed, strict=True):
        where = (float(at(x, y)[0]) + 0.015, height - over)
        style = {"color": color, "fontsize": 9, "va": "center", "annotation_clip": False}
        ax.annotate(name, where, xycoords="axes fraction", **style)


def _axes(ax: Any):
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return plt.subplots(figsize=(6, 3.6), layout="constrained")[1]


def _finish(ax: Any, x: str, y: str):
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.margins(x=0.01)
    ax.grid(color="0.92", lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _records(name: str, values: Any, axes: int) -> np.ndarray:
    values = np.asarray(values, float)
    if values.ndim != axes:
        raise ValueError(
            f"history.{name} has shape {values.shape}; pass summaries stacked along a leading "
            "time axis, as jax.lax.scan returns them."
        )
    return values


def _steps(steps: Sequence[int] | None, count: int) -> np.ndarray:
    numbers = np.arange(count) if steps is None else np.asarray(steps)
    if numbers.shape != (count,):
        raise ValueError(f"steps has shape {numbers.shape}; the history has {count} records.")
    return numbers
