"""Draws the pictures of the concept pages into docs/_static.

python docs/pictures.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, Rectangle

import lowrank_optax as lro

OUT = Path(__file__).parent / "_static"
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"


def arrow(ax, start, end, color, label="", shift=(0.05, 0.05), width=2.0, style="-"):
    """An arrow between two points with a word at its tip."""
    patch = {"arrowstyle": "-|>", "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(start, end, color=color, lw=width, ls=style, **patch))
    ax.text(end[0] + shift[0], end[1] + shift[1], label, color=color, fontsize=10)


def plane(ax, title, reach=1.6, low=None):
    """Axes of equal scale without ticks."""
    low = -reach if low is None else low
    ax.set(xlim=(-reach, reach), ylim=(low, reach), aspect="equal", xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    ax.spines[:].set_visible(False)


def save(figure, name):
    """Writes one picture."""
    figure.savefig(OUT / f"{name}.png", dpi=130)


def eigenbasis():
    """Gradients, their loud directions, and what whitening makes of a gradient."""
    figure = Figure(figsize=(9.6, 3.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rng, angle = np.random.default_rng(0), np.pi / 6
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = rng.normal(size=(150, 2)) * [0.75, 0.18] @ turn.T
    for ax, title in (
        (left, "gradients g and their basis Q"),
        (middle, "each direction by itself"),
    ):
        plane(ax, title)
        ax.plot(*points.T, ".", color=GREY, ms=3, alpha=0.7)
        width = {"width": 3.0, "height": 0.72, "fill": False}
        ax.add_patch(Ellipse((0, 0), angle=30, edgecolor=BLUE, lw=1.2, **width))
    arrow(left, (0, 0), 1.25 * turn[:, 0], BLUE, "q₁, λ₁ large")
    arrow(left, (0, 0), 0.6 * turn[:, 1], BLUE, "q₂, λ₂ small", (-0.35, 0.08))
    g = np.array([0.9, 0.75])
    inside = turn.T @ g
    arrow(middle, (0, 0), g, "black", "g")
    arrow(middle, (0, 0), inside[0] * turn[:, 0], BLUE, "q₁ q₁ᵀg", (0.05, -0.2))
    arrow(middle, inside[0] * turn[:, 0], g, RED, "q₂ q₂ᵀg", (-0.75, -0.05))
    plane(right, "Λ^(-1/2) inside: every direction as loud")
    white = points @ turn / [0.75, 0.18] * 0.45 @ turn.T
    right.plot(*white.T, ".", color=GREY, ms=3, alpha=0.7)
    right.add_patch(Ellipse((0, 0), 1.8, 1.8, fill=False, edgecolor=BLUE, lw=1.2))
    step = turn @ (inside / [0.75, 0.18] * 0.3)
    arrow(right, (0, 0), step, GREEN, "step", (-0.5, -0.05))
    save(figure, "eigenbasis")


def laws():
    """A momentum that is carried when the basis turns, and one that is not."""
    figure = Figure(figsize=(8.4, 2.2), layout="constrained")
    old, carried, left_alone = figure.subplots(1, 3)
    m = np.array([0.9, 0.35])
    angle = 0.9
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    titles = "before: coordinates m in Q_old", "carried: C m in Q_new", "left alone: m in Q_new"
    bases = np.eye(2), turn, turn
    moved = m, m, turn @ m
    for ax, title, basis, vector in zip(
        (old, carried, left_alone), titles, bases, moved, strict=True
    ):
        plane(ax, title, low=-0.3)
        for i, name in enumerate(("q₁", "q₂")):
            arrow(ax, (0, 0), 1.15 * basis[:, i], BLUE, name, width=1.4)
        good = ax is not left_alone
        label = "momentum" if good else "another direction"
        arrow(ax, (0, 0), vector, GREEN if good else RED, label, (-0.3, 0.12), 2.6)
    save(figure, "laws")


def complement():
    """What a basis of one direction does not hold, and three things to do with it."""
    figure = Figure(figsize=(9.6, 2.2), layout="constrained")
    axes = figure.subplots(1, 4)
    q, g = np.array([0.95, 0.31]), np.array([0.6, 1.0])
    q = q / np.linalg.norm(q)
    inside = q * (q @ g)
    outside = g - inside
    plane(axes[0], "gradient", low=-0.4)
    arrow(axes[0], (0, 0), 1.4 * q, BLUE, "Q", width=1.2)
    arrow(axes[0], (0, 0), inside, BLUE, "QQᵀg", (0.0, -0.25))
    arrow(axes[0], inside, g, RED, "outside", (-0.75, 0.02))
    arrow(axes[0], (0, 0), g, "black", "g", (0.03, 0.08))
    sizes = 0.0, 0.35, 1.0
    names = "None (dropped)", "a number γ", "an optimizer"
    for ax, size, name in zip(axes[1:], sizes, names, strict=True):
        plane(ax, f"complement: {name}", low=-0.4)
        step = 0.7 * inside + size * outside
        arrow(ax, (0, 0), 0.7 * inside, BLUE, "inner part", (0.02, -0.25))
        if size:
            style = "--" if size == 1.0 else "-"
            arrow(ax, 0.7 * inside, step, RED, "", style=style)
        arrow(ax, (0, 0), step, GREEN, "step", (-0.1, 0.1))
    save(figure, "complement")


def geometries():
    """Parameters as one long vector with rows, and a matrix with a basis for each side."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, title in ((left, "vectors: rows as long as all parameters"), (right, "matrices")):
        ax.set(xlim=(0, 10), ylim=(0, 4.4), xticks=[], yticks=[], aspect="equal")
        ax.set_title(title, fontsize=10)
        ax.spines[:].set_visible(False)
    colors = BLUE, GREEN, RED
    for row in range(4):
        at = 0.4
        for width, color in zip((4.2, 2.6, 1.8), colors, strict=True):
            left.add_patch(Rectangle((at, 3.2 - 0.55 * row), width, 0.4, color=color, alpha=0.35))
            at += width + 0.1
    left.text(0.4, 3.8, "leaf 1              leaf 2         leaf 3", fontsize=9)
    left.text(9.35, 2.2, "m rows", fontsize=9, rotation=90, va="center")
    left.text(0.4, 0.55, "Qᵀ = T W: rows W, stored leaf by leaf; T is small", fontsize=9)
    boxes = (0.5, 1.6, 1.6), (2.9, 1.6, 3.4), (7.0, 3.4, 3.4)
    names = "Q_Sᵀ\na × a", "G\na × b", "Q_L\nb × b"
    heights = 1.6, 1.6, 3.4
    widths = 1.6, 3.4, 2.8
    for (x, _, _), name, h, w, color in zip(
        boxes, names, heights, widths, (BLUE, GREY, BLUE), strict=True
    ):
        h = min(h, 2.8)
        right.add_patch(Rectangle((x, 3.8 - h), w, h, color=color, alpha=0.3))
        right.text(x + w / 2, 3.8 - h / 2, name, ha="center", va="center", fontsize=10)
    right.text(0.5, 0.3, "U = Q_Sᵀ G Q_L: one or two bases for a matrix", fontsize=9)
    save(figure, "geometries")


def purposes():
    """What PCA keeps of a stream and what a prediction needs."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    rng = np.random.default_rng(3)
    slow = np.zeros(300)
    for t in range(1, 300):
        slow[t] = 0.97 * slow[t - 1] + 0.24 * rng.normal()
    loud = 1.8 * rng.normal(size=300)
    right.plot(loud, color=GREY, lw=0.8)
    right.plot(slow, color=GREEN, lw=2.0)
    right.text(302, -2.5, "loud,\nunpredictable", color=GREY, fontsize=9)
    right.text(302, 0.6, "quiet,\npredictable", color=GREEN, fontsize=9)
    right.set(xlim=(0, 385), yticks=[], xticks=[], title="the stream along both directions")
    right.spines[:].set_visible(False)
    plane(left, "one direction may be kept", 5.0)
    left.plot(loud, slow, ".", color="0.75", ms=3)
    arrow(left, (0, 0), (4.2, 0), GREY, "PCA", (-0.9, 0.3))
    arrow(left, (0, 0), (0, 3.4), GREEN, "Dynamics", (0.2, 0.0))
    save(figure, "purposes")


def nesting():
    """The masks of a joint and of a sequential nesting over four modes."""
    figure = Figure(figsize=(7.6, 2.9), layout="constrained")
    axes = figure.subplots(1, 3)
    v = np.array([1.0, 0.75, 0.5, 0.25])
    masks = {
        "no nesting: M = 1": np.ones((4, 4)),
        "joint: M = min(v_l, v_m)": np.minimum.outer(v, v),
        "sequential: M upper triangular": np.triu(np.ones((4, 4))),
    }
    for ax, (name, mask) in zip(axes, masks.items(), strict=True):
        ax.imshow(mask, cmap="Blues", vmin=0, vmax=1.3)
        for i in range(4):
            for j in range(4):
                ax.text(j, i, f"{mask[i, j]:g}", ha="center", va="center", fontsize=9)
        ax.set(xticks=range(4), yticks=range(4), xlabel="mode m")
        ax.set_xticklabels(range(1, 5))
        ax.set_yticklabels(range(1, 5))
        ax.set_title(name, fontsize=10)
    axes[0].set_ylabel("mode l")
    save(figure, "nesting")


def training():
    """`lro.plot.training` of a small run."""
    x = jax.random.normal(jax.random.key(2), (512, 64))
    y = jnp.argmax(x[:, :10] + 0.5 * x[:, 10:20], 1)
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5
    params = {"w": normal(0, 64, 32), "b": jnp.zeros(32), "head": normal(1, 32, 10)}

    def loss(p, rows):
        logits = jax.nn.relu(x[rows] @ p["w"] + p["b"]) @ p["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    tx = lro.lre(optax.linear_schedule(1.0, 0.0, 300), basis=lro.basis.Eigen(20, 0.95))

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (128,), 0, len(x))
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, (value, lro.diagnose.summary(state))

    keys = jax.random.split(jax.random.key(3), 300)
    _, (losses, history) = jax.lax.scan(step, (params, tx.init(params)), keys)
    save(lro.plot.training(history, losses=losses), "training")


if __name__ == "__main__":
    for draw in (eigenbasis, laws, complement, geometries, purposes, nesting, training):
        draw()
