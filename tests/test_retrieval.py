"""Benchmarks of pairs: scores, the features' layout, the claims of retrieval in a small form."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from lowrank_optax import spectral


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return lambda name: importlib.import_module(f"spectral_{name}")


@pytest.mark.parametrize("interpolated", [False, True])
def test_average_precision_against_its_definition(benchmark, interpolated):
    relevant = np.random.default_rng(0).random((20, 15)) < 0.3
    relevant[0] = False
    expected = []
    for row in relevant:
        at = [row[:i].mean() for i in range(1, 16)]
        seen = [max(at[i:]) if interpolated else at[i] for i in np.flatnonzero(row)]
        expected.append(np.mean(seen) if seen else 0)
    found = benchmark("retrieval").average_precision(relevant, interpolated)
    np.testing.assert_allclose(found, expected)


def test_retrieval_in_blocks(benchmark):
    module, rng = benchmark("retrieval"), np.random.default_rng(0)
    a, b = rng.normal(size=(700, 3)), rng.normal(size=(60, 3))
    views = module.Views(a, b, rng.integers(0, 4, 700), rng.integers(0, 4, 60))
    hits = [
        (views.y_class[np.argsort(-b @ q)[:7]] == c).mean()
        for q, c in zip(a, views.x_class, strict=True)
    ]
    np.testing.assert_allclose(module.retrieval((a, b), views, 7)["precision"], np.mean(hits))


def test_cca_finds_the_angles_between_column_spaces(benchmark):
    module, rng = benchmark("retrieval"), np.random.default_rng(1)
    x = rng.normal(size=(200, 5))
    y = x[:, :4] @ rng.normal(size=(4, 4)) + rng.normal(size=(200, 4))
    views = module.Views(x, y, np.zeros(200), np.zeros(200))
    a, b = module.cca(views, views, ridge=0)
    basis = [np.linalg.qr(v - v.mean(0))[0] for v in (x, y)]
    angles = np.linalg.svd(basis[0].T @ basis[1], compute_uv=False)
    np.testing.assert_allclose(a.T @ a / 200, np.diag(angles), atol=1e-10)
    np.testing.assert_allclose(a.T @ b / 200, np.diag(angles**2), atol=1e-10)


def write(root, part, kind, classes, features):
    folder = root / "data" / "SketchyVGG" / "split1"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [f"{name}/{i}.jpg" for i, name in enumerate(classes)]
    np.savez_compressed(
        folder / f"{part}_{kind}.npz", features=features, classes=classes, paths=paths
    )


def test_sketchy_features_are_read_paired_and_scored(benchmark, tmp_path):
    """Two linear views of a class' code: learned on 20 classes, asked about 4 others."""
    module, rng = benchmark("retrieval"), np.random.default_rng(0)
    maps = rng.normal(size=(2, 3, 6))
    for part, names in (("train", range(20)), ("test", range(20, 24))):
        codes = rng.normal(size=(len(names), 3))
        for kind, view, count in (("sketch", maps[0], 6), ("photo", maps[1], 9)):
            at = np.repeat(np.arange(len(names)), count)
            features = codes[at] @ view + 0.1 * rng.normal(size=(len(at), 6))
            write(tmp_path, part, kind, np.array([f"class {names[i]}" for i in at]), features)
    train, test = (module.sketchy(tmp_path, part=part) for part in ("train", "test"))
    assert train.x.shape == (120, 6) and test.y.shape == (36, 6) and test.y.dtype == np.float32
    assert list(test.x_class[:7]) == ["class 20"] * 6 + ["class 21"]

    x, y = module.pairs_of_a_class(train, 45)
    owner = lambda rows, among: [np.flatnonzero((among == r).all(1))[0] for r in rows]
    classes = train.x_class[owner(x, train.x)]
    np.testing.assert_array_equal(classes, train.y_class[owner(y, train.y)])
    assert set(np.unique(classes, return_counts=True)[1]) == {2, 3}

    scores = module.zero_shot(train, test, steps=200, modes=3, pairs=1000)
    assert scores["map"] > 0.6  # by chance 0.25 and what 36 photos add
    assert scores["precision"] == pytest.approx(0.25)  # of 100, all 36


def test_sketchy_says_what_is_missing(benchmark, tmp_path):
    module, classes = benchmark("retrieval"), np.array(["a", "b"])
    with pytest.raises(FileNotFoundError, match="sem-pcyc"):
        module.sketchy(tmp_path)
    write(tmp_path, "train", "sketch", classes, np.zeros((2, 3)))
    write(tmp_path, "train", "photo", np.array(["a", "c"]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\['b', 'c'\]"):
        module.sketchy(tmp_path)
    write(tmp_path, "train", "photo", classes, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="shapes"):
        module.sketchy(tmp_path)
    np.savez(tmp_path / "data/SketchyVGG/split1/train_photo.npz", features=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\['classes', 'paths'\]"):
        module.sketchy(tmp_path)


def test_nested_modes_can_be_cut_and_beat_cca(benchmark):
    module = benchmark("retrieval")
    train, test = module.halves(0)
    learn = lambda nesting: module.learn(nesting, 16, train.x, train.y, 200, 0)
    score = lambda pair, d: module.retrieval([v[:, :d] for v in pair], test)["precision"]
    joint = module.outputs(learn(spectral.JointNesting()), test)
    plain = module.outputs(learn(spectral.Unnested()), test)
    assert score(joint, 16) > score(module.cca(train, test), 16) + 0.05
    assert score(joint, 4) > score(plain, 4) + 0.05
    assert score(plain, 16) > score(module.cca(train, test), 16) + 0.05


def test_galerkin_with_all_indicators_is_the_chain_itself(benchmark):
    """Of a transfer matrix that a trigonometric polynomial makes of finite rank."""
    module = benchmark("langevin")
    _, p, weights = module.transfer(60)
    np.testing.assert_allclose(weights @ p, weights, atol=1e-12)
    singular, values = module.spectra(p, weights)
    np.testing.assert_allclose(singular[0], 1, rtol=1e-10)
    assert singular[module.POWER] > 1e-4 > 1e-10 > singular[module.POWER + 1]
    gram, cross = np.diag(weights), weights[:, None] * p
    np.testing.assert_allclose(module.canonical(gram, gram, cross), singular, atol=1e-10)
    found, vectors = module.galerkin(gram, cross)
    np.testing.assert_allclose(found[:4], values[:4], atol=1e-8)
    np.testing.assert_allclose(p @ vectors[:, :2], vectors[:, :2] * found[:2], atol=1e-8)


def test_the_map_and_its_matrix_agree(benchmark):
    module = benchmark("langevin")
    x, y = module.logistic(0, 40_000)
    np.testing.assert_array_equal(x[1:], y[:-1])
    points, p, weights = module.transfer(400)
    for k in (1, 2, 3):  # moments of a step, and of the stationary measure
        wave = lambda z, k=k: np.exp(2j * np.pi * k * z)
        np.testing.assert_allclose(wave(x).mean(), weights @ wave(points), atol=0.02)
        both = weights @ (np.conj(wave(points)) * (p @ wave(points)))
        np.testing.assert_allclose(np.mean(np.conj(wave(x)) * wave(y)), both, atol=0.02)
