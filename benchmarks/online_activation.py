"""A bottleneck of four directions inside a digit classifier: learned for its logits against PCA.

A 64-64-64-10 network is trained on digits. Its last hidden activation ``h`` is then replaced by ``P
h``, ``P`` an orthogonal projection of rank 4, and held-out accuracy counted, with no further
training. PCA takes the leading eigenvectors of ``E h h^T`` on the training digits; the learned
subspace is ``lro.online.learner`` with ``Activation``, KL divergence to the network's own logits,
plus 0.1 of reconstruction, on random batches of the same activations; labels are used by neither.
Beside them signed PCA of ``E h h^T / E‖h‖² + 0.1 F / tr F``, ``F`` the Fisher information of the
logits about ``h``: the quadratic stand-in. It keeps directions that logits depend on, but not the
logits, and is no better than PCA.

    python benchmarks/online_activation.py [--quick] [--seeds 5] [--out DIR]
"""

from online_setup import (
    accuracy,
    arguments,
    decaying,
    digits,
    few,
    jax,
    jnp,
    layers,
    learn,
    lro,
    network,
    optax,
    pca,
    publish,
    train,
    unit,
)

METHODS = {
    "full": "no bottleneck",
    "pca": "PCA of activations",
    "signed": "signed PCA, with Fisher",
    "learned": "learned: KL + 0.1 reconstruction",
}


def run(seed: int, rank: int, training: int, steps: int) -> dict:
    data, key = digits(seed), jax.random.key(seed)
    tx = optax.adam(3e-3)
    params = train(network(key, (64, 64, 64, 10)), data.x, data.y, tx, training, key)
    w, b = params[-1]
    head = lambda h: h @ w + b
    h, h_test = layers(params, data.x)[-2], layers(params, data.x_test)[-2]
    own = head(h_test).argmax(-1)

    # The rows √p_c (w_c - Σ p w) of every example make up F = E W (diag p - p p^T) W^T.
    p = jax.nn.softmax(head(h))
    fisher = (jnp.sqrt(p)[..., None] * (w.T - (p @ w.T)[:, None])).reshape(-1, len(w))

    learner = lro.online.learner(
        rank, (lro.online.Activation(1.0, head),), decaying(0.01, steps), reconstruction=0.1
    )
    operators = {
        "pca": pca(rank, h),
        "signed": lro.online.signed_pca(rank, (1.0, few(unit(h))), (0.1, few(unit(fisher)))),
        "learned": learn(learner, jax.random.key(seed + 1), h, steps),
    }

    out = {"full": {"accuracy": accuracy(params, data.x_test, data.y_test), "agreement": 1.0}}
    for name, operator in operators.items():
        answer = head(operator.project(h_test)).argmax(-1)
        out[name] = {
            "accuracy": float((answer == data.y_test).mean()),
            "agreement": float((answer == own).mean()),
        }
    return out


def main() -> None:
    args = arguments(__doc__, {"training": 200, "steps": 100}, training=1000, steps=1500)
    runs = [run(seed, 4, args.training, args.steps) for seed in range(args.seeds)]
    metrics = {"accuracy": "accuracy", "agreement": "agreement with the full network"}
    title = "Activation bottleneck, rank 4"
    publish("online_activation", title, runs, METHODS, metrics, args)


if __name__ == "__main__":
    main()
