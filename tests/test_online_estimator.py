"""The estimator of streams against dense algebra and scikit-learn's own."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.decomposition import PCA, IncrementalPCA

from lowrank_optax.online import trackers
from lowrank_optax.online.estimator import StreamingPCA


def data(n=400, d=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.geomspace(5, 0.1, d) + rng.normal(size=d)


def in_batches(model, x, sizes, **given):
    for at in np.split(np.arange(len(x)), np.cumsum(sizes)):
        model.partial_fit(x[at], **{name: w[at] for name, w in given.items()})
    return model


def same_span(a, b):
    return np.linalg.svd(a @ b.T, compute_uv=False).min()


@pytest.mark.parametrize("sizes", [[1, 1, 3, 50, 120], [300]])
def test_it_is_pca_while_nothing_is_truncated(sizes):
    x = data()
    model, exact = in_batches(StreamingPCA(3, slots=12), x, sizes), PCA(3).fit(x)
    np.testing.assert_allclose(model.mean_, exact.mean_, rtol=1e-10)
    np.testing.assert_allclose(model.explained_variance_, exact.explained_variance_ * 399 / 400)
    assert same_span(model.components_, exact.components_) > 1 - 1e-9
    back = model.inverse_transform(model.transform(x))
    np.testing.assert_allclose(back, exact.inverse_transform(exact.transform(x)), atol=1e-8)


def test_it_is_no_worse_than_scikit_learns():
    x = data(600, 60, 1)
    model, theirs, best = StreamingPCA(5), IncrementalPCA(5), PCA(5).fit(x).components_
    for batch in np.split(x, 30):
        model.partial_fit(batch)
        theirs.partial_fit(batch)
    assert same_span(model.components_, best) >= same_span(theirs.components_, best) - 1e-12


def test_weights_are_repetitions_and_zero_is_absence():
    x, times = data(40), np.random.default_rng(2).integers(0, 3, 40)
    weighted = in_batches(StreamingPCA(2, slots=12), x, [7], sample_weight=times.astype(float))
    repeated = StreamingPCA(2, slots=12).fit(np.repeat(x, times, axis=0))
    np.testing.assert_allclose(weighted.mean_, repeated.mean_)
    np.testing.assert_allclose(weighted.explained_variance_, repeated.explained_variance_)


def test_a_window_forgets_exactly_and_beta_by_its_decay():
    x = data(200)
    last = in_batches(StreamingPCA(3, window=50, slots=12), x, [3, 90])
    np.testing.assert_allclose(
        last.explained_variance_, PCA(3).fit(x[-50:]).explained_variance_ * 49 / 50
    )
    w = 0.95 ** np.arange(199, -1, -1.0)
    faded = in_batches(StreamingPCA(3, beta=0.95, slots=12), x, [3, 90])
    mean = w @ x / w.sum()
    c = (x - mean).T @ ((x - mean) * w[:, None]) / w.sum()
    np.testing.assert_allclose(faded.mean_, mean)
    np.testing.assert_allclose(faded.explained_variance_, np.linalg.eigvalsh(c)[:-4:-1])


def test_a_tracker_can_stand_behind_it():
    x = data(500)
    model = in_batches(StreamingPCA(2, tracker=trackers.PAST(2)), x, [100, 1])
    assert same_span(model.components_, PCA(2).fit(x).components_) > 0.99
    assert model.n_samples_seen_ == 500 and int(model._state.seen) == 500


@pytest.mark.parametrize(
    "message, make",
    {
        "pass the window alone": lambda: StreamingPCA(2, window=5, beta=0.9),
        "pass one of rank 2": lambda: StreamingPCA(2, tracker=trackers.PAST(3)),
        "n_components is 20": lambda: StreamingPCA(20),
        "slots is 1": lambda: StreamingPCA(2, slots=1),
    }.items(),
)
def test_nonsense_is_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make().fit(data())
    with pytest.raises(ValueError, match="one weight"):
        StreamingPCA(2).fit(data(), sample_weight=np.ones(3))
