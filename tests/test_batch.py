"""`vmap` means what it says, runs as one native loop, and keeps what is shared shared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode.native import Promise, Rule, native

SOLVERS = {
    "fixed": jode.Fixed(jode.midpoint, 10),
    "traced": jode.Fixed(jode.heun, jnp.asarray(7)),
    "adaptive": jode.Adaptive(jode.bosh3, 1e-4, 1e-4, max_steps=200),
}


def small(t, y, w):
    return jnp.tanh(w @ y) * jnp.cos(t)


def large(t, y, w):
    return {"u": jnp.tanh(y["u"] @ w) + y["v"][0], "v": -y["v"]}


STATES = {
    "small": (small, lambda k: jax.random.normal(k, (3,)), jax.random.normal(jax.random.key(9), (3, 3))),
    "large": (
        large,
        lambda k: {"u": jax.random.normal(k, (5, 8)), "v": jax.random.normal(k, (4,))},
        jax.random.normal(jax.random.key(9), (8, 8)) / 3,
    ),
}


def setup(state, solver, ts=(0.0, 0.4, 1.0)):
    f, draw, w = STATES[state]
    y0 = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4))

    def loss(y0, w, ts):
        ys = jode.odeint(f, y0, ts, w, solver=SOLVERS[solver])
        return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(ys))

    return loss, y0, w, jnp.array(ts)


def close(a, b, tol=1e-11):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_solved_as_if_alone(state, solver):
    f, _, w = STATES[state]
    _, y0, _, ts = setup(state, solver)
    solve = lambda y0: jode.solve(f, y0, ts, w, solver=SOLVERS[solver])
    batch = jax.vmap(solve)(y0)
    for i in range(4):
        alone = solve(row(y0, i))
        close(row(batch.ys, i), alone.ys, 1e-13)
        assert all(np.array_equal(a[i], b) for a, b in zip(batch.stats[:4], alone.stats[:4], strict=True))
        assert batch.status[i] == alone.status


@pytest.mark.sweep
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_of_a_batch_and_batch_of_gradients(state, solver):
    loss, y0, w, ts = setup(state, solver)
    one = jax.jit(jax.grad(loss, (0, 1, 2)))
    alone = [one(row(y0, i), w, ts) for i in range(4)]
    total = lambda y0, w, ts: jnp.sum(jax.vmap(loss, (0, None, None))(y0, w, ts))
    y0_bar, w_bar, ts_bar = jax.jit(jax.grad(total, (0, 1, 2)))(y0, w, ts)
    close(y0_bar, jax.tree.map(lambda *x: jnp.stack(x), *[a[0] for a in alone]))
    close((w_bar, ts_bar), jax.tree.map(lambda *x: sum(x), *[a[1:] for a in alone]))
    each = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None)))(y0, w, ts)
    close(each, jax.tree.map(lambda *x: jnp.stack(x), *alone))


@pytest.mark.parametrize(
    ("solver", "mapped"), [("adaptive", "w"), ("adaptive", "ts"), ("fixed", "ts"), *((solver, "all") for solver in SOLVERS)]
)
def test_weights_and_times_may_differ_by_row(solver, mapped):
    loss, y0, w, ts = setup("small", solver)
    ws = jnp.stack([w, 2 * w, -w, w.T])
    tss = ts[None] * jnp.array([1.0, 0.5, -1.0, 2.0])[:, None]
    axes = {"w": (None, 0, None), "ts": (None, None, 0), "all": (0, 0, 0)}[mapped]
    x = tuple(b if a == 0 else s for a, b, s in zip(axes, (y0, ws, tss), (y0[0], w, ts), strict=True))
    total = lambda *x: jnp.sum(jax.vmap(loss, axes)(*x))
    value, bars = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*x)
    one = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    values, alone = zip(*(one(*(v[i] if a == 0 else v for a, v in zip(axes, x, strict=True))) for i in range(4)), strict=True)
    close(value, sum(values))
    for bar, a, each in zip(bars, axes, zip(*alone, strict=True), strict=True):
        close(bar, jnp.stack(each) if a == 0 else sum(each))


@pytest.mark.sweep
@pytest.mark.parametrize("solver", SOLVERS)
def test_nested_vmaps_fold(solver):
    loss, y0, w, ts = setup("small", solver)
    ws = jnp.stack([w, 0.5 * w])
    nested = lambda y0, ws: jnp.sum(jax.vmap(lambda w: jax.vmap(lambda y: loss(y, w, ts))(y0))(ws))
    one = jax.jit(jax.value_and_grad(loss, (0, 1)))
    values, (y0_bar, ws_bar) = jax.tree.map(lambda *x: jnp.stack(x), *[one(y, w, ts) for w in ws for y in y0])
    y0_bar, ws_bar = (x.reshape(2, 4, *x.shape[1:]) for x in (y0_bar, ws_bar))
    close(jax.jit(jax.value_and_grad(nested, (0, 1)))(y0, ws), (jnp.sum(values), (y0_bar.sum(0), ws_bar.sum(1))))
    inner = jax.jit(jax.vmap(jax.grad(lambda w: jnp.sum(jax.vmap(lambda y: loss(y, w, ts))(y0)))))(ws)
    close(inner, ws_bar.sum(1))


@pytest.mark.sweep
def test_tolerances_and_step_counts_may_differ_by_row():
    f, _, w = STATES["small"]
    _, y0, _, ts = setup("small", "fixed")
    tols, counts = jnp.array([1e-2, 1e-4, 1e-6]), jnp.array([1, 5, 12])
    adaptive = lambda tol: jode.solve(f, y0[0], ts, w, solver=jode.Adaptive(jode.bosh3, tol, tol))
    fixed = lambda n: jode.solve(f, y0[0], ts, w, solver=jode.Fixed(jode.heun, n))
    for run, values in ((jax.jit(adaptive), tols), (jax.jit(fixed), counts)):
        batch = jax.jit(jax.vmap(run))(values)
        for i, value in enumerate(values):
            alone = run(value)
            close(batch.ys[i], alone.ys, 1e-13)
            assert batch.stats.nfe[i] == alone.stats.nfe
    loss = lambda w, n: jnp.sum(jode.odeint(f, y0[0], ts, w, solver=jode.Fixed(jode.heun, n)))
    gradient = jax.jit(jax.grad(loss))
    alone = jnp.stack([gradient(w, n) for n in counts])
    close(jax.jit(jax.vmap(gradient, (None, 0)))(w, counts), alone)
    close(jax.jit(jax.grad(lambda w: jnp.sum(jax.vmap(loss, (None, 0))(w, counts))))(w), alone.sum(0))


@pytest.mark.sweep
def test_hessians_of_a_batch():
    loss, y0, w, ts = setup("small", "adaptive")
    total = lambda w: jnp.sum(jax.vmap(loss, (0, None, None))(y0, w, ts))
    one = jax.jit(jax.hessian(loss, 1))
    close(jax.jit(jax.hessian(total))(w), sum(one(y, w, ts) for y in y0), 1e-9)


@pytest.mark.optimized
def test_memory_does_not_grow_with_batch_times_weights():
    """The cotangent of shared weights is one copy, whatever the batch: 128 rows of a 64-128-64 perceptron."""
    f = lambda t, y, w: jnp.tanh(jnp.tanh(y @ w[0]) @ w[1])
    w = (jnp.ones((64, 128)), jnp.ones((128, 64)))

    def memory(rows):
        loss = lambda w, y: jnp.sum(
            jax.vmap(lambda y: jode.odeint(f, y, (0.0, 1.0), w, solver=jode.Fixed(jode.midpoint, 10))[-1])(y)
        )
        stats = jax.jit(jax.grad(loss)).lower(w, jnp.ones((rows, 64))).compile().memory_analysis()
        return stats.temp_size_in_bytes

    weights = 8 * 2 * 64 * 128
    assert memory(128) - memory(16) < 112 * 64 * 8 * 40 < 112 * weights / 4


@pytest.mark.parametrize(
    "transform", ["plain", "jit", "vmap", "grad_vmap_jit", "vmap_grad", "directions", "scan", "remat", "hessian"]
)
def test_a_native_march_composes(transform):
    """A rule with a batched form of its own under the transformations of JAX: 2 w sin x, its transpose counted in the way back."""
    used = []

    def run(batch, platform):
        used.append(batch)
        return lambda moving, still: (
            moving[0] * jnp.sin(moving[1]) * still,
            jnp.zeros((), jnp.int32) if batch is None else jnp.zeros(batch.size, jnp.int32),
        )

    def record(batch, platform, sized):
        return lambda moving, still: (*run(batch, platform)(moving, still), jnp.cos(moving[1]))

    def pull(batch, platform):
        def form(moving, still, values, rest, cos, bar):
            w = jnp.sin(moving[1]) * still * bar
            return (jnp.sum(w) if batch and not batch.mapped[0][0] else w), moving[0] * cos * still * bar

        return form

    shape = jax.ShapeDtypeStruct
    promise = Promise(shape((), jnp.result_type(float)), shape((), jnp.int32), (), 1)
    f = lambda x, w=2.0: native(Rule(run, record, pull), (jnp.asarray(w), jnp.asarray(x)), jnp.asarray(1.0), promise)[0]
    x = jnp.array([0.1, 0.2])
    if transform == "plain":
        close(f(x[0]), 2 * jnp.sin(x[0]))
    elif transform == "jit":
        close(jax.jit(jax.grad(f))(x[0]), 2 * jnp.cos(x[0]))
    elif transform == "vmap":
        close(jax.vmap(f)(x), 2 * jnp.sin(x))
        assert any(b is not None and b.size == 2 for b in used)
    elif transform == "grad_vmap_jit":
        close(jax.grad(lambda w: jnp.sum(jax.vmap(jax.jit(lambda x: f(x, w)))(x)))(2.0), jnp.sum(jnp.sin(x)))
    elif transform == "vmap_grad":
        close(jax.vmap(jax.grad(f, 1), (0, None))(x, 2.0), jnp.sin(x))
        close(
            jax.vmap(jax.vmap(jax.grad(f, (0, 1)), (0, None)), (None, 0))(x, x),
            (jnp.outer(x, jnp.cos(x)), jnp.outer(jnp.ones(2), jnp.sin(x))),
        )
    elif transform == "directions":
        both = lambda z: f(z[0], z[1])
        close(jax.jacfwd(both)(x), jax.jacrev(both)(x))
        close(jax.vmap(jax.jacfwd(both))(x[None]), jax.vmap(jax.grad(both))(x[None]))
    elif transform == "scan":
        close(
            jax.grad(lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0])(x[0]),
            jax.grad(lambda x: 2 * jnp.sin(2 * jnp.sin(2 * jnp.sin(x))))(x[0]),
        )
    elif transform == "remat":
        close(jax.grad(jax.checkpoint(f))(x[0]), 2 * jnp.cos(x[0]))
    else:
        both = lambda z: f(z[0], z[1])
        for second in (
            jax.hessian,
            lambda f: jax.jacfwd(jax.jacfwd(f)),
            lambda f: jax.jacrev(jax.jacrev(f)),
            lambda f: jax.jacrev(jax.jacfwd(f)),
        ):
            close(second(both)(x), jax.hessian(lambda z: z[1] * jnp.sin(z[0]))(x))


@pytest.mark.parametrize("solver", ["fixed", "adaptive"])
def test_directions_share_the_work_of_the_solve(solver):
    """A Jacobian, by either mode, evaluates f as often as one derivative does, however many directions it has."""
    calls = []

    def f(t, y, w):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tanh(w @ y)

    def count(transform, *x):
        calls.clear()
        jax.block_until_ready(jax.jit(transform)(*x))
        jax.effects_barrier()
        return len(calls)

    y, w = jnp.array([0.3, -0.2, 0.5]), STATES["small"][2]
    solve = lambda y: jode.odeint(f, y, (0.0, 1.0), w, solver=SOLVERS[solver])[-1]
    assert count(jax.jacfwd(solve), y) == count(lambda y: jax.jvp(solve, (y,), (y,)), y) == count(solve, y)
    assert count(jax.jacrev(solve), y) == count(jax.grad(lambda y: jnp.sum(solve(y))), y)


@pytest.mark.parametrize("fast", [40, 500])
def test_many_unequal_rows_are_solved_as_few_are(fast):
    """Rows that want twenty times the steps are regrouped: by every sign the answers are those of one loop over all."""
    n = 4096
    rng = np.random.default_rng(0)
    rate = np.ones(n)
    rate[rng.choice(n, fast, replace=False)] = 20.0
    rate[[7, 99]] = np.nan, 1e4  # one fails at once, one runs out of steps
    rate, ends = jnp.asarray(rate), jnp.stack([jnp.zeros(n), jnp.full(n, 3.0), jnp.linspace(4.0, 5.0, n)], 1)

    def solve(rate, ts):
        f = lambda t, y, a: jnp.stack([a * y[1], -a * y[0]])
        return jode.solve(f, jnp.array([1.0, 0.0]), ts, rate, solver=jode.Adaptive(jode.bosh3, 1e-3, 1e-3, max_steps=900))

    grouped = jax.jit(jax.vmap(solve))(rate, ends)
    halves = jax.jit(jax.vmap(solve))
    plain = jax.tree.map(
        lambda *x: jnp.concatenate(x), halves(rate[: n // 2], ends[: n // 2]), halves(rate[n // 2 :], ends[n // 2 :])
    )
    np.testing.assert_array_equal(grouped.status, plain.status)
    assert jode.Status(int(grouped.status[7])) == jode.Status.nonfinite_dynamics
    assert jode.Status(int(grouped.status[99])) == jode.Status.max_steps
    close(grouped.stats, plain.stats, 0)
    close(grouped.ys, plain.ys)
    good = np.isfinite(grouped.ys[:, -1, 0])
    assert good.sum() == n - 2
    np.testing.assert_allclose(grouped.ys[good, -1, 0], np.cos(rate * ends[:, -1])[good], atol=0.5)
