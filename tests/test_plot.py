"""Pictures: what is drawn is what was passed."""

import subprocess
import sys
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from lowrank_optax import plot

matplotlib.use("Agg")


class History(NamedTuple):
    """The fields of `diagnose.Summary` that are drawn."""

    spectrum: np.ndarray
    captured_energy: np.ndarray


def history(steps=12, groups=1, rank=5):
    rng = np.random.default_rng(0)
    lam = -np.sort(-rng.exponential(size=(steps, groups, rank)), axis=-1)
    lam[: rank - 1] *= np.tri(rank - 1, rank)[:steps, None]  # a window that fills up
    return History(lam, rng.uniform(size=(steps, groups)))


@pytest.fixture
def ax():
    return Figure().subplots()


def test_spectrum_draws_a_line_for_every_rank_index(ax):
    seen = history()
    assert plot.spectrum(seen, ax) is ax
    assert ax.get_yscale() == "log"
    (lines,) = ax.collections
    assert len(lines.get_segments()) == 5
    leading = lines.get_segments()[-1]
    np.testing.assert_allclose(leading[:, 1], seen.spectrum[:, 0, 0])
    low, high = ax.get_ylim()
    assert 0 < low <= seen.spectrum[seen.spectrum > 0].min()
    assert high >= seen.spectrum.max()


def test_spectrum_of_one_group_and_given_steps(ax):
    seen = history(groups=2)
    plot.spectrum(seen, ax, steps=range(0, 120, 10), group=1)
    leading = ax.collections[0].get_segments()[-1]
    np.testing.assert_allclose(leading[:, 0], np.arange(0, 120, 10))
    np.testing.assert_allclose(leading[:, 1], seen.spectrum[:, 1, 0])


def test_spectrum_of_nothing_but_dead_slots(ax):
    plot.spectrum(History(np.zeros((3, 1, 2)), np.zeros((3, 1))), ax)
    ax.figure.canvas.draw()


@pytest.mark.parametrize(("groups", "lines", "bands"), [(1, 1, 0), (3, 3, 0), (20, 1, 1)])
def test_captured_energy(ax, groups, lines, bands):
    seen = history(groups=groups)
    assert plot.captured_energy(seen, ax) is ax
    assert (len(ax.lines), len(ax.collections)) == (lines, bands)
    expected = np.median(seen.captured_energy, 1) if bands else seen.captured_energy[:, 0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)
    assert (ax.get_legend() is None) == (groups == 1)


class Steps(NamedTuple):
    """All fields of `diagnose.Summary` that a figure of a run draws."""

    spectrum: np.ndarray
    captured_energy: np.ndarray
    drift: np.ndarray
    cosine: np.ndarray
    nonfinite: np.ndarray
    zero: np.ndarray
    eigh: np.ndarray
    inner: np.ndarray


class Sides(NamedTuple):
    """The fields of `diagnose.MatricesSummary` that are drawn."""

    short: np.ndarray | None
    long: np.ndarray | None
    captured_energy: np.ndarray


def test_training_draws_what_there_is():
    seen, share = history(), np.full((12, 1), 0.5)
    run = Steps(*seen, share, share, *[np.zeros((12, 1))] * 4)
    figure = plot.training(run, losses=np.arange(12.0, 0, -1), steps=range(0, 24, 2), views="a\nb")
    labels = [ax.get_ylabel() for ax in figure.axes[:4]]
    assert labels == ["loss", "eigenvalue", "gradient in the basis", "share"]
    assert figure.axes[0].lines[0].get_xdata()[-1] == 22
    lower = figure.subfigs[1]
    assert [text.get_text() for text in lower.texts] == ["a\nb"]
    figure.canvas.draw()
    assert len(plot.training(seen).subfigs) == 1


def test_training_of_matrices_draws_one_shape():
    seen, other = history(), history(rank=3)
    shapes = {
        "4x5": Sides(seen.spectrum, None, seen.captured_energy),
        "3x9": Sides(None, other.spectrum, other.captured_energy),
    }
    for group, lines in (("4x5", 5), ("3x9", 3), (0, 5)):
        axes = plot.training(shapes, group=group).axes
        assert len(axes[0].collections[0].get_segments()) == lines
    with pytest.raises(ValueError, match="'2x2'.*4x5, 3x9"):
        plot.training(shapes, group="2x2")


CURVES = {
    "one": {"steps": [1, 2], "seconds": [[1, 3], [2, 4], [3, 8]], "loss": [[4, 2], [5, 1], [9, 3]]},
    "other": {"steps": [1, 2], "seconds": [5, 6], "loss": [3, np.nan]},
}


@pytest.mark.parametrize(("x", "expected"), [("steps", [1, 2]), ("seconds", [2, 4])])
def test_loss_draws_medians_over_seeds(ax, x, expected):
    assert plot.loss(CURVES, x, ax) is ax
    one, other = ax.lines
    np.testing.assert_allclose(one.get_xdata(), expected)
    np.testing.assert_allclose(one.get_ydata(), [5, 2])
    assert other.get_ydata()[0] == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "other"]
    assert ax.get_xlabel() == x
    assert ax.get_yscale() == "log"
    (band,) = ax.collections
    assert band.get_datalim(ax.transData).intervaly.tolist() == [1, 9]
    ax.figure.canvas.draw()


def test_accuracy(ax):
    plot.accuracy({"one": {"steps": [1, 2], "accuracy": [0.5, 0.75]}}, ax=ax)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.75])


def test_nothing_to_draw_is_an_empty_picture(ax):
    plot.loss({}, ax=ax)
    ax.figure.canvas.draw()
    assert ax.get_legend() is None


def test_axes_of_its_own():
    from matplotlib import pyplot

    ax = plot.captured_energy(history())
    assert ax.figure.axes == [ax]
    pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ax: plot.loss(CURVES, "minutes", ax), "'minutes'"),
        (lambda ax: plot.loss({"a": {"steps": [1, 2, 3], "loss": [1, 2]}}, ax=ax), "a: steps"),
        (lambda ax: plot.spectrum(history(), ax, group=1), "group is 1"),
        (lambda ax: plot.spectrum(history(), ax, steps=[1]), "steps has shape"),
        (lambda ax: plot.captured_energy(History(None, np.zeros(3)), ax), "time axis"),
    ],
)
def test_errors_say_what_to_pass(ax, call, message):
    with pytest.raises(ValueError, match=message):
        call(ax)


def test_without_matplotlib_the_error_names_the_extra():
    code = """
import sys
sys.modules["matplotlib"] = None
from lowrank_optax import plot
try:
    plot.loss({})
except ImportError as error:
    sys.exit("lowrank_optax[plot]" not in str(error))
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
