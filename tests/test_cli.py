"""The command line: what it refuses, what it leaves on disk, and the tasks it trains."""

import contextlib
import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import __main__ as cli
from lowrank_optax.demo import command, problems, report, runs, tasks, train

# A shell starts its background jobs, perhaps these tests, with Ctrl-C ignored.
INTERRUPTIBLE = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("lowrank_optax", run_name="__main__")
"""


def test_a_short_run_leaves_results_and_a_picture(tmp_path):
    out = tmp_path / "made" / "on demand"
    arguments = ["--steps", "3", "--seeds", "0", "1", "--out", str(out)]
    assert cli.main(["train", "--task", "digits", *arguments]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "results.json"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "results.json").read_text())
    check_settings(result)
    for name in result["methods"]:
        check_method(name, result)
    check_fairness(result)


def check_settings(result):
    assert result["complete"] is True
    assert result["settings"]["task"] == "digits"
    assert result["settings"]["steps"] == 3
    assert result["settings"]["seeds"] == [0, 1]
    assert set(result["versions"]) >= {"python", "jax", "optax", "flax", "lowrank_optax"}
    assert result["machine"]["cores"] == os.cpu_count()
    rates = result["settings"]["learning_rates"]
    assert list(result["methods"]) == list(rates) == [m.name for m in runs.METHODS]
    assert [row["ours"] for row in result["methods"].values()] == [m.ours for m in runs.METHODS]
    tried = {(r["method"], r["learning_rate"], r["seed"]) for r in result["runs"]}
    assert tried == {(m, r, s) for m in rates for r in rates[m] for s in (0, 1)}
    assert len(result["runs"]) == len(tried)


def check_method(name, result):
    """The summary is that of the runs at the best learning rate."""
    row = result["methods"][name]
    losses = {
        rate: np.median(
            [r["loss"] for r in result["runs"] if (r["method"], r["learning_rate"]) == (name, rate)]
        )
        for rate in result["settings"]["learning_rates"][name]
    }
    assert losses[row["learning_rate"]] == min(losses.values())
    # Figures are written with six digits: a median of two is rounded once more.
    assert row["loss"]["median"] == pytest.approx(min(losses.values()), rel=5e-6)
    assert row["loss"]["low"] <= row["loss"]["median"] <= row["loss"]["high"]
    assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["high"] <= 1
    assert row["ms_per_step"] > 0
    curves = row["curves"]
    assert curves["steps"] == [1, 2, 3]
    for curve in ("seconds", "loss", "held_out_loss", "accuracy"):
        assert np.shape(curves[curve]) == (2, 3)
    assert np.all(np.diff(curves["seconds"]) > 0)
    np.testing.assert_allclose([curve[-1] for curve in curves["loss"]], final_losses(name, result))


def final_losses(name, result):
    best = name, result["methods"][name]["learning_rate"]
    return [r["loss"] for r in result["runs"] if (r["method"], r["learning_rate"]) == best]


def check_fairness(result):
    """Grids of one size; the first loss, before any training, the same for all; honest memory."""
    assert len({len(rates) for rates in result["settings"]["learning_rates"].values()}) == 1
    first = [np.array(row["curves"]["loss"])[:, 0] for row in result["methods"].values()]
    np.testing.assert_allclose(first, np.broadcast_to(first[0], np.shape(first)), rtol=1e-5)
    parameter_bytes = 4 * result["settings"]["parameters"]
    state = {name: row["state_bytes"] for name, row in result["methods"].items()}
    assert 2 * parameter_bytes <= state["AdamW"] < 1.01 * 2 * parameter_bytes
    sides, biases = [(64, 128), (128, 128)], 266
    matrices = sum(2 * a * a + 2 * b * b + 2 * a * b for a, b in sides)
    matrices += 10 * 128 + 2 * 10 * 10 + 10  # the head's longer side keeps no directions
    assert 4 * (matrices + 2 * biases) <= state["soap_muon"] < 1.2 * 4 * (matrices + 2 * biases)


def test_table_names_the_methods(capsys):
    run = runs.Run("AdamW", 0.1, 0, False, 8, [2], [0.1], [math.nan], [math.nan], [math.nan])
    result = {
        "settings": {"task": "digits", "parameters": 1, "steps": 2, "seeds": [0]},
        "complete": False,
        "methods": {"AdamW": report.summary(runs.METHODS[0], [run])},
    }
    report.print_table(result)
    printed = capsys.readouterr().out
    assert "AdamW" in printed
    assert "stopped early" in printed


def test_best_rate_ignores_diverged_and_unfinished_runs():
    def run(rate, loss, complete=True):
        return runs.Run("AdamW", rate, 0, complete, 8, [2], [0.1], [loss], [0.0], [0.0])

    tried = [run(0.1, math.nan), run(0.2, 3.0), run(0.3, 2.0), run(0.4, 1.0, complete=False)]
    assert report.best_runs(runs.METHODS[0], tried) == [tried[2]]
    assert report.best_runs(runs.METHODS[0], tried[3:]) == [tried[3]]
    assert report.best_runs(runs.METHODS[0], tried[:1]) == [tried[0]]
    assert report.best_runs(runs.METHODS[1], tried) == []


def test_seconds_to_the_loss_of_adamw():
    def rows(seconds, loss):
        curves = {"seconds": [seconds], "held_out_loss": [loss]}
        return {"curves": curves, "held_out_loss": {"median": loss[-1]}}

    result = {
        "methods": {
            "AdamW": rows([1.0, 2.0, 3.0], [4.0, 3.0, 2.0]),
            "fast": rows([1.0, 3.0, 5.0], [3.0, 1.0, 0.5]),
            "slow": rows([1.0, 2.0, 3.0], [4.0, 3.5, 3.0]),
        }
    }
    assert report.seconds_to(result, "AdamW") == 3.0
    assert report.seconds_to(result, "fast") == 2.0
    assert math.isnan(report.seconds_to(result, "slow"))


def test_picture_labels_every_curve(tmp_path):
    from matplotlib.figure import Figure

    from lowrank_optax import plot

    ax = Figure().subplots()
    ax.plot([0, 1], [0, 1])
    plot.label_ends(ax, [("a", 1, 0.5, "C0"), ("b", 1, 0.5, "C1"), ("c", 1, 1.0, "C2")])
    heights = sorted(text.xy[1] for text in ax.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.05
    assert {text.get_text() for text in ax.texts} == {"a", "b", "c"}


@pytest.mark.parametrize("steps", [40, 43])
def test_all_is_compiled_before_the_clock_starts(steps):
    adam, task = runs.METHODS[0], tasks.digits()
    fill = runs.trainer(task, adam, steps)
    traced = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            traced.append(event)

    first, second = fill(runs.Run("Adam", 0.01, 0)), fill(runs.Run("Adam", 0.1, 1))
    next(first)
    jax.monitoring.register_event_duration_secs_listener(listen)
    assert sum(first) + sum(second) > steps
    assert traced == []


# Refusals ---------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """The one line on stderr of a command that ends with code 2 before any training."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    printed, line = capsys.readouterr()
    assert code == 2
    assert printed == ""
    assert line.count("\n") == 1
    assert line.startswith("python -m lowrank_optax")
    return line


@pytest.fixture
def no_work(monkeypatch):
    def fail(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr(train, "compare", fail)
    monkeypatch.delenv("LOWRANK_OPTAX_DATA", raising=False)


@pytest.mark.usefixtures("no_work")
class TestRefusals:
    def test_no_command(self, capsys):
        assert "COMMAND" in refused(capsys)

    def test_unknown_command(self, capsys):
        assert "tain" in refused(capsys, "tain")

    def test_unknown_task(self, capsys, tmp_path):
        line = refused(capsys, "train", "--task", "digit", "--out", str(tmp_path / "new"))
        assert "'digit'" in line
        for task in tasks.TASKS:
            assert task in line
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("steps", ["0", "-3", "many", "1.5"])
    def test_steps(self, capsys, steps):
        assert steps in refused(capsys, "train", "--steps", steps)

    @pytest.mark.parametrize("task", ["mnist", "text"])
    def test_no_data_directory(self, capsys, task):
        line = refused(capsys, "train", "--task", task)
        assert "--data-dir" in line
        assert "LOWRANK_OPTAX_DATA" in line
        assert "https://" in line

    @pytest.mark.parametrize(
        ("task", "file"),
        [("mnist", "mnist-t10k-images-idx3-ubyte.gz"), ("text", "tinyshakespeare.txt.gz")],
    )
    def test_missing_file(self, capsys, monkeypatch, tmp_path, task, file):
        monkeypatch.setenv("LOWRANK_OPTAX_DATA", str(tmp_path))
        line = refused(capsys, "train", "--task", task)
        assert file in line
        assert str(tmp_path) in line

    @pytest.mark.parametrize(
        "content", [b"", b"nothing packed", gzip.compress(b"x" * 99, mtime=0)[:-9]]
    )
    def test_damaged_file(self, capsys, tmp_path, content):
        (tmp_path / "tinyshakespeare.txt.gz").write_bytes(content)
        line = refused(capsys, "train", "--task", "text", "--data-dir", str(tmp_path))
        assert "tinyshakespeare.txt.gz" in line

    def test_file_that_is_not_idx(self, capsys, tmp_path):
        file = tmp_path / "t10k-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(idx(np.zeros((3, 2, 2)))[:-1]))
        line = refused(capsys, "train", "--task", "mnist", "--data-dir", str(tmp_path))
        assert "IDX" in line

    def test_directory_that_cannot_be_made(self, capsys, tmp_path):
        (tmp_path / "file").touch()
        out = str(tmp_path / "file" / "below")
        assert out in refused(capsys, "train", "--out", out)

    @pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a directory nobody can write to")
    def test_directory_that_cannot_be_written_to(self, capsys):
        assert "/proc" in refused(capsys, "train", "--out", "/proc")

    def test_missing_extras(self, capsys, monkeypatch):
        monkeypatch.setattr(command, "installed", lambda module: module not in ("flax", "rich"))
        line = refused(capsys, "train")
        assert "flax, rich" in line
        assert "lowrank_optax[demo]" in line

    def test_unknown_operator_and_method(self, capsys, tmp_path):
        out = ("--out", str(tmp_path / "new"))
        line = refused(capsys, "spectrum", "--operator", "hydrogen", *out)
        assert "'hydrogen'" in line and all(name in line for name in problems.OPERATORS)
        line = refused(capsys, "spectrum", "--method", "lora", *out)
        assert "'lora'" in line and all(name in line for name in problems.METHODS)
        assert not (tmp_path / "new").exists()

    def test_modes_and_points_there_are_not(self, capsys):
        few = ("spectrum", "--operator", "oscillator1d", "--modes")
        assert "8 modes" in refused(capsys, *few, "9")
        assert "'0'" in refused(capsys, *few, "0")
        assert "2 points" in refused(capsys, "spectrum", "--batch", "1")

    def test_missing_extras_of_spectrum(self, capsys, monkeypatch):
        monkeypatch.setattr(command, "installed", lambda module: module != "flax")
        assert "flax: pip install" in refused(capsys, "spectrum")


def test_spectrum_leaves_results_and_a_picture(tmp_path, capsys):
    """With the defaults, nothing chosen but the operator and sizes, it is right to a percent."""
    sizes = ["--modes", "1", "--steps", "200", "--batch", "64", "--seed", "3"]
    out = ["--out", str(tmp_path)]
    assert cli.main(["spectrum", "--operator", "oscillator1d", *sizes, *out]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["modes.png", "results.json"]
    assert (tmp_path / "modes.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["settings"]["seed"] == 3 and result["settings"]["modes"] == 1
    assert result["history"][-1]["step"] == 200
    (row,) = result["modes"]
    assert row["truth"] == pytest.approx(15 / 16)
    error = abs(row["eigenvalue"] / row["truth"] - 1)
    assert row["relative_error"] == pytest.approx(error, abs=1e-6) and error < 0.01
    assert f"{row['truth']:.5g}" in printed and row["standard_error"] > 0


def test_start_imports_the_core_alone():
    extras = "{'flax', 'rich', 'sklearn', 'matplotlib'}"
    code = f"import sys, lowrank_optax.__main__; sys.exit(len({extras} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Ctrl-C -----------------------------------------------------------------------------------------


def test_ctrl_c_keeps_finished_runs(tmp_path):
    arguments = ["train", "--task", "digits", "--steps", "40", "--seeds", "0"]
    arguments += ["--out", str(tmp_path)]
    command = [sys.executable, "-c", INTERRUPTIBLE, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline().startswith("AdamW, rate 0.003, seed 0: held-out loss")
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert str(tmp_path) in rest
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["complete"] is False
    assert result["runs"][0]["complete"] is True
    assert result["runs"][0]["steps"] == 40
    assert len(result["methods"]["AdamW"]["curves"]["steps"]) == 20
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("points", [0, 1])
def test_ctrl_c_in_the_first_run(monkeypatch, tmp_path, points):
    @contextlib.contextmanager
    def impatient(total):
        shown = iter([None] * (points - 1))

        def show(run, length):
            if next(shown, "stop"):
                raise KeyboardInterrupt

        if not points:
            raise KeyboardInterrupt
        yield show

    monkeypatch.setattr(runs, "progress", impatient)
    arguments = ["train", "--task", "digits", "--steps", "40", "--out", str(tmp_path)]
    assert cli.main(arguments) == 130
    result = json.loads((tmp_path / "results.json").read_text())
    assert [run["complete"] for run in result["runs"]] == [False] * points
    assert len(result["methods"]) == points
    assert (tmp_path / "curves.png").exists()


# Tasks ------------------------------------------------------------------------------------------


def idx(array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def data_dir(tmp_path):
    """Files in the formats of the real ones."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8010, 28, 28))
    labels = rng.integers(0, 10, 8010)
    (tmp_path / "mnist-t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), 1))
    text = rng.choice(list(b" abc"), 5000).astype(np.uint8)
    (tmp_path / "input.txt").write_bytes(text.tobytes())
    return tmp_path


@pytest.mark.parametrize("name", tasks.TASKS)
def test_task(name, data_dir):
    task = tasks.TASKS[name](data_dir)
    params = jax.jit(task.init)(jax.random.key(0))
    batch = jax.jit(task.sample)(jax.random.key(1), task.train)
    again = jax.jit(task.sample)(jax.random.key(1), task.train)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    loss, grads = jax.jit(jax.value_and_grad(task.loss))(params, batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    batch = batch if task.residuals is None else task.held_out
    measured, accuracy = jax.jit(task.measure)(params, batch)
    if task.residuals is None:
        np.testing.assert_allclose(measured, loss, rtol=1e-5)
    assert np.isnan(accuracy) if task.correct is None else 0 <= accuracy <= 1
    losses = jax.eval_shape(lambda: task.losses(task.outputs(params, batch[0]), batch[1]))
    assert losses.shape == (len(batch[0]),)


def test_source_holds_every_tenth_module_out(monkeypatch, tmp_path):
    for i in range(30):
        (tmp_path / f"m{i:02}.py").write_text(f"{chr(97 + i % 26)}\n" * 500)
    monkeypatch.setattr(tasks.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    task = tasks.source()
    held_out = {chr(32 + c) for c in np.unique(task.held_out[0]) if c < 95}
    assert held_out == {"a", "k", "u"}  # files 0, 10 and 20
    assert len(task.train[0]) == 27 * 1000
    (tmp_path / "m00.py").rename(tmp_path / "m00.txt")
    for path in sorted(tmp_path.glob("*.py"))[15:]:
        path.unlink()
    with pytest.raises(tasks.DataError, match="15 modules"):
        tasks.source()


def test_poisson_is_least_squares():
    """The exact solution has no residuals, and Levenberg-Marquardt is run with them."""
    task = tasks.poisson()
    assert runs.methods(task)[-1].name == "levenberg_marquardt"
    assert runs.methods(tasks.digits()) == runs.METHODS
    params = task.init(jax.random.key(0))
    residuals = task.residuals(params, task.train)
    np.testing.assert_allclose(
        task.loss(params, task.train), 0.5 * jnp.sum(residuals**2), rtol=1e-5
    )
    exact = lambda x: jnp.prod(jnp.sin(jnp.pi * x), -1, keepdims=True)

    class Exact:
        apply = staticmethod(lambda _, x: exact(x))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "Perceptron", lambda *_: Exact)
        solved = tasks.poisson()
    assert float(jnp.max(jnp.abs(solved.residuals({}, solved.train)))) < 1e-4


def test_least_squares_leave_results_and_a_picture(tmp_path, capsys):
    arguments = ["--steps", "2", "--seeds", "0", "--out", str(tmp_path)]
    assert cli.main(["train", "--task", "poisson", *arguments]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["methods"]["levenberg_marquardt"]["learning_rate"] is None
    assert len([r for r in result["runs"] if r["method"] == "levenberg_marquardt"]) == 1
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_mnist_reads_the_files_as_they_are(data_dir):
    task = tasks.mnist(data_dir)
    assert task.train[0].shape == (8000, 28, 28, 1)
    assert task.held_out[0].shape == (10, 28, 28, 1)
    assert float(task.train[0].max()) == 1.0
    raw = gzip.decompress((data_dir / "mnist-t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    total = np.frombuffer(raw, np.uint8).sum() / 255
    np.testing.assert_allclose(task.train[0].sum() + task.held_out[0].sum(), total, rtol=1e-3)


def test_text_targets_are_the_next_characters(data_dir):
    task = tasks.text(data_dir)
    inputs, targets = task.sample(jax.random.key(0), task.train)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(task.held_out[0][:, 1:], task.held_out[1][:, :-1])
    # Nothing held out is trained on.
    assert len(task.train[0]) + task.held_out[0].size <= 5000


def test_transformer_does_not_look_ahead():
    model = tasks.CharTransformer(vocabulary=5, width=16, layers=2, heads=2, length=8)
    x = jnp.arange(8)[None] % 5
    params = jax.jit(model.init)(jax.random.key(0), x)
    apply = jax.jit(model.apply)
    same = np.isclose(apply(params, x), apply(params, x.at[0, 5].set(4))).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_convolution_is_one():
    model = tasks.ConvNet(channels=(4,), hidden=3, classes=2)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
    params = model.init(jax.random.key(1), x)
    _, seen = model.apply(params, x, capture_intermediates=True)
    kernel = params["params"]["Dense_0"]["kernel"].reshape(3, 3, 1, 4)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = seen["intermediates"]["Dense_0"]["__call__"][0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
