"""What people look at while they train: scalars for a logger, memory beforehand, a fit's bar."""

import collections
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import spectral

PARAMS = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
GRADS = {"w": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(6)}


def after_two_steps(tx, **extra):
    state = tx.init(PARAMS)
    for scale in (1.0, 2.0):
        grads = optax.tree.scale(scale, GRADS)
        _, state = tx.update(grads, state, PARAMS, **extra)
    return state


class TestScalars:
    def test_of_vectors_inside_a_chain(self):
        tx = optax.chain(optax.clip_by_global_norm(1.0), lro.whiten(4), optax.adam(1e-2))
        state = after_two_steps(tx)
        seen, logged = lro.diagnose.summary(state), lro.diagnose.scalars(state)
        assert logged["lre/effective_rank"] == float(seen.effective_rank[0])
        assert logged["lre/largest_eigenvalue"] == float(seen.spectrum[0, 0])
        assert all(type(x) is float for x in logged.values())

    def test_of_many_groups_has_mean_and_range(self):
        state = after_two_steps(lro.lre(1.0, basis=lro.basis.GGT(3), groups=lro.per_leaf))
        energy = np.asarray(lro.diagnose.summary(state).captured_energy, np.float64)
        logged = lro.diagnose.scalars(state)
        got = [logged[f"lre/captured_energy/{by}"] for by in ("mean", "min", "max")]
        np.testing.assert_allclose(got, [energy.mean(), energy.min(), energy.max()])

    def test_of_matrices(self):
        logged = lro.diagnose.scalars(after_two_steps(lro.soap_muon(1e-2)))
        assert logged["matrices/4x6/captured_energy"] == pytest.approx(1.0, abs=1e-5)
        assert logged["matrices/4x6/dropped"] == logged["matrices/rest/dropped"] == 0.0

    def test_of_least_squares(self):
        residuals = lambda p: jnp.concatenate([p["w"].ravel() - 2.0, p["b"]])
        state = after_two_steps(lro.levenberg_marquardt(), residuals_fn=residuals)
        logged = lro.diagnose.scalars(state)
        assert logged["levenberg_marquardt/loss"] == float(state.loss)

    def test_counts_what_was_dropped(self):
        tx = lro.lre(1.0, basis=lro.basis.GGT(3), groups=lro.per_leaf)
        bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
        _, state = tx.update(bad, tx.init(PARAMS), PARAMS)
        assert lro.diagnose.scalars(state)["lre/dropped"] == 2.0

    def test_two_of_a_kind_have_names_of_their_own(self):
        logged = lro.diagnose.scalars(after_two_steps(optax.chain(lro.whiten(3), lro.whiten(2))))
        assert {name.split("/")[0] for name in logged} == {"lre", "lre_1"}

    def test_refusals(self):
        with pytest.raises(ValueError, match="no state of this library"):
            lro.diagnose.scalars(optax.adam(1.0).init(PARAMS))
        tx = lro.whiten(2)
        with pytest.raises(ValueError, match="outside of jit"):
            jax.jit(lro.diagnose.scalars)(tx.init(PARAMS))

    def test_summary_of_matrices_says_where_to_look(self):
        with pytest.raises(ValueError, match="diagnose.matrices"):
            lro.diagnose.summary(lro.soap_muon(1e-2).init(PARAMS))


OPTIMIZERS = {
    "whitening": lro.whitened_adam(1e-2, 5),
    "per leaf": lro.lre(1.0, basis=lro.basis.Eigen(3), groups=lro.per_leaf),
    "matrices": lro.soap_muon(1e-2),
    "projected": lro.galore(1e-2, 2),
    "least squares": lro.levenberg_marquardt(),
    "chain": optax.chain(lro.whiten(3), optax.contrib.muon(1e-2)),
    "adam": optax.adam(1e-2),
}


class TestMemory:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_is_that_of_the_state(self, name):
        tx = OPTIMIZERS[name]
        found = lro.diagnose.memory(jax.eval_shape(lambda: PARAMS), tx)
        size = sum(x.nbytes for x in jax.tree.leaves(tx.init(PARAMS)))
        assert found.total == sum(found.parts.values()) == found.per_device == size
        assert found.adam == sum(x.nbytes for x in jax.tree.leaves(optax.adam(1.0).init(PARAMS)))

    def test_of_leaves(self):
        leaves = lro.diagnose.memory(PARAMS, OPTIMIZERS["adam"]).leaves
        assert leaves == {"w": 2 * PARAMS["w"].nbytes, "b": 2 * PARAMS["b"].nbytes}
        leaves = lro.diagnose.memory(PARAMS, OPTIMIZERS["whitening"]).leaves
        assert leaves["w"] - leaves["b"] == (5 + 2) * (PARAMS["w"].nbytes - PARAMS["b"].nbytes)

    def test_parts_end_where_parameters_begin(self):
        layers = collections.namedtuple("Layers", "kernel bias")
        params = {"dense": layers(jnp.ones((3, 4)), jnp.ones(4))}
        parts = lro.diagnose.memory(params, optax.chain(lro.whiten(2), optax.adam(1e-2))).parts
        assert {"0.basis.rows", "1.mu", "1.nu"} <= set(parts)
        assert not [name for name in parts if "kernel" in name or "dense" in name]

    def test_where_no_leaf_goes_alone(self):
        tx = optax.masked(optax.adam(1.0), {"w": True, "b": False})
        found = lro.diagnose.memory(PARAMS, tx)
        assert found.total == 2 * PARAMS["w"].nbytes + 4

    def test_on_a_mesh(self):
        """Shapes of shards come from the mesh alone: the figure needs no device of it."""
        mesh = jax.make_mesh((1,), ("x",))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
        params = {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=place)}
        found = lro.diagnose.memory(params, OPTIMIZERS["whitening"])
        assert found.per_device == found.total

    def test_prints_a_table(self):
        found = lro.diagnose.memory(PARAMS, OPTIMIZERS["whitening"])
        printed = str(found)
        assert "0.basis.rows" in printed and "times Adam's" in printed


OPERATOR = spectral.operators.Matrix(jnp.diag(jnp.array([4.0, 2.0, 1.0])), everything=True)
TABLE = (lambda key, i: jnp.eye(3, 2) + 0.1, lambda rows, i: rows[i])


def fit(progress):
    method = spectral.NestedLoRA(moments=spectral.WholeBatch())
    return spectral.fit(OPERATOR, TABLE, method=method, steps=20, batch_size=3, progress=progress)


class TestProgress:
    def test_a_function_gets_every_record(self):
        seen = []
        found = fit(seen.append)
        assert tuple(seen) == found.history

    def test_nothing_where_there_is_no_terminal(self, capsys):
        fit(None)
        fit(False)
        assert capsys.readouterr() == ("", "")

    def test_a_bar_and_a_table_on_a_terminal(self, monkeypatch):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", terminal)
        found = fit(None)
        printed = terminal.getvalue()
        assert "20/20" in printed and "standard error" in printed
        assert f"{found.eigenvalues[0]:.5g}" in printed

    def test_anything_else_is_refused(self):
        with pytest.raises(ValueError, match="progress is 3"):
            fit(3)

    def test_without_rich_the_error_names_the_extra(self, monkeypatch):
        from lowrank_optax.spectral import _progress

        monkeypatch.setattr(_progress, "_installed", lambda: False)
        with pytest.raises(ValueError, match=r"lowrank_optax\[demo\]"):
            fit(True)
