"""The audit of gradients says what is exact, what is not, and what each costs."""

import jax
import jax.numpy as jnp
import numpy as np

import jode
import jode.audit


def test_an_audit_tells_exact_from_approximate_and_counts_evaluations():
    solver = jode.Fixed(jode.midpoint, 10)
    ys = jax.random.normal(jax.random.key(0), (3, 6))
    params = {"w": jax.random.normal(jax.random.key(1), (6, 6)), "n": 2}

    def loss(adjoint, params, ys):
        f = lambda t, y, p: jnp.tanh(p["w"] @ y)
        return jnp.sum(jax.vmap(lambda y: jode.odeint(f, y, (0.0, 1.0), params, solver=solver, adjoint=adjoint)[-1])(ys) ** 2)

    adjoints = [jode.Backprop(), jode.Backprop(2), jode.MemoryFree(), jode.Backsolve()]
    table = jode.audit.gradient(loss, adjoints, params, ys, repeats=1)
    full, few, free, back = table.rows
    assert full.error["['w']"] <= 1e-28
    assert few.error["['w']"] <= 1e-28
    assert 1e-14 <= free.error["['w']"] <= 1e-3
    assert 1e-14 <= back.error["['w']"] <= 1e-2
    assert all(abs(r.cosine["['w']"] - 1) <= 1e-2 for r in table.rows)
    evaluations = 2 * 10 * 3
    assert [r.nfe_forward for r in table.rows] == [evaluations] * 4
    assert full.nfe_backward == evaluations < few.nfe_backward
    assert free.nfe_backward == 2 * evaluations
    assert all(x in str(table) for x in ("MemoryFree()", "Backprop(checkpoints=2)", "NFE backward"))
    assert np.isfinite(full.time)
    assert full.memory > 0
