"""Every way to a gradient: exact where it says so, and off by what it says elsewhere."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode.rows import Rows
from jode.window import Params, Window

REVERSIBLE = [jode.Reversible(jode.midpoint), jode.Reversible(jode.rk4), jode.reversible_heun, jode.leapfrog, jode.Momentum(0.9)]
W = 0.7 * jax.random.normal(jax.random.key(0), (3, 3))
Y0 = jax.random.normal(jax.random.key(1), (3,))
TS = jnp.array([0.0, 0.3, 1.0])


def field(t, y, w):
    return jnp.tanh(w @ y) * (1 + 0.3 * jnp.sin(t)) - 0.2 * y


def gradient(solver, adjoint, f=field):
    """Of a loss of every saved state, with respect to y0, args and every save time."""

    def loss(y0, w, ts):
        ys = jode.odeint(f, y0, ts, w, solver=solver, adjoint=adjoint)
        return jnp.sum(jnp.sin(ys) * jnp.arange(1.0, 1 + ys.size).reshape(ys.shape))

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def gap(a, b):
    """The largest difference, relative to the largest entry of each leaf."""
    return max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", REVERSIBLE, ids=str)
def test_memory_free_is_exact_on_reversible_methods(method):
    solver = jode.Fixed(method, 500)
    exact = gradient(solver, jode.Backprop(None))(Y0, W, TS)
    assert gap(gradient(solver, jode.MemoryFree())(Y0, W, TS), exact) <= 1e-11


@pytest.mark.sweep
@pytest.mark.parametrize("method", [jode.Reversible(jode.bosh3), jode.reversible_heun, jode.leapfrog], ids=str)
def test_memory_free_is_exact_on_adaptive_reversible_methods(method):
    solver = jode.Adaptive(method, 1e-5, 1e-5, max_steps=800)
    sol = jode.solve(field, Y0, TS, W, solver=solver)
    truth = jode.odeint(field, Y0, TS, W, solver=jode.Fixed(jode.rk4, 200))
    np.testing.assert_allclose(sol.ys, truth, atol=1e-3)
    exact = gradient(solver, jode.Backprop(None))(Y0, W, TS)
    assert gap(gradient(solver, jode.MemoryFree())(Y0, W, TS), exact) <= 1e-11


@pytest.mark.parametrize(("method", "order"), [(m, m.order) for m in REVERSIBLE], ids=str)
def test_reversible_methods_have_their_order(method, order):
    truth = jode.odeint(field, Y0, (0.0, 1.0), W, solver=jode.Adaptive(jode.dopri8, 1e-13, 1e-13))[-1]
    steps = [160, 320] if order == 1 else [20, 40]
    errors = [
        float(jnp.max(jnp.abs(jode.odeint(field, Y0, (0.0, 1.0), W, solver=jode.Fixed(method, n))[-1] - truth))) for n in steps
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("method", REVERSIBLE, ids=str)
def test_a_step_and_its_inverse_cancel(method):
    F = lambda t, y, params: (jnp.tanh(W @ y[0]) * (1 + 3 * t),)
    h, none = jnp.asarray(0.1), Params([], [], [], [])
    first, second = (Window(F, Rows(), n * h, h, none) for n in (0, 1))
    s = method.start((Y0,), lambda: first(0.0, (Y0,)))
    s = method.step(first, s).state  # away from the start, where the copies are equal
    back = method.inverse(second, method.step(second, s).state)
    for a, b in zip(back, s, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["f32", "f64"])
def test_a_long_way_back_stays_at_the_true_states(dtype):
    """10^5 steps: without anchors rounding would grow by 0.999^-100000, more than any float can hold."""
    y0, w = Y0.astype(dtype), W.astype(dtype)
    solver = jode.Fixed(jode.Reversible(jode.midpoint), 100_000)
    final = lambda adjoint: jax.jit(
        jax.grad(lambda y0, w: jnp.sum(jode.odeint(field, y0, (0.0, 1.0), w, solver=solver, adjoint=adjoint)[-1] ** 2), (0, 1))
    )(y0, w)
    exact = final(jode.Backprop())
    assert gap(final(jode.MemoryFree()), exact) <= 2e3 * float(jnp.finfo(dtype).eps)
    assert all(np.isnan(x).all() for x in final(jode.MemoryFree(anchors=None)))


def weights(n, rough=False):
    t = jnp.linspace(0.0, 1.0, n)[:, None, None]
    smooth = jnp.cos(3 * t + jnp.arange(9.0).reshape(1, 3, 3))
    return jax.random.normal(jax.random.key(3), (n, 3, 3)) if rough else smooth


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("method", "degree", "rough", "slope"),
    [
        (jode.euler, 0, False, (0.9, 1.1)),
        (jode.heun, 0, False, (1.9, 3.2)),
        (jode.heun, 1, False, (1.9, 3.2)),
        (jode.euler, 0, True, (0.6, 1.5)),
        (jode.heun, 1, True, (0.6, 1.7)),
    ],
)
def test_memory_free_residual_networks_err_as_theory_says(method, degree, rough, slope):
    """Sander, Ablin & Peyré 2022: the gradient is off by O(1/N), with Heun and smooth weights by O(1/N²) or better."""
    block = lambda t, x, w: jnp.tanh(w @ x)
    depths, errors = [16, 90, 512], []
    for n in depths:
        w = weights(n + degree, rough)
        loss = lambda x, w, a: jnp.sum(
            jode.odeint(block, x, (0.0, 1.0), w, solver=jode.Layers(method, degree), adjoint=a)[-1] * jnp.arange(1.0, 4.0)
        )
        exact, found = (
            jax.jit(jax.grad(lambda x, w, a=a: loss(x, w, a), (0, 1)))(Y0, w) for a in (jode.Backprop(), jode.MemoryFree())
        )
        errors.append(float(jnp.linalg.norm(found[1] - exact[1]) / jnp.linalg.norm(exact[1])))
    assert slope[0] <= -np.polyfit(np.log(depths), np.log(errors), 1)[0] <= slope[1]


def test_layers_at_nodes_are_heun_with_two_weights():
    w = weights(6)
    x, h = Y0, 1 / 5
    for a, b in itertools.pairwise(w):
        k1 = jnp.tanh(a @ x)
        k2 = jnp.tanh(b @ (x + h * k1))
        x = x + h / 2 * (k1 + k2)
    found = jode.odeint(lambda t, x, w: jnp.tanh(w @ x), Y0, (0.0, 1.0), w, solver=jode.Layers(jode.heun, degree=1))[-1]
    np.testing.assert_allclose(found, x, rtol=1e-14)


def test_the_continuous_adjoint_converges_with_the_tolerance():
    truth = gradient(jode.Adaptive(jode.dopri8, 1e-13, 1e-13), jode.Backprop())(Y0, W, TS)
    tols = [1e-3, 1e-5, 1e-7, 1e-9]
    run = jax.jit(lambda tol: gradient(jode.Adaptive(jode.dopri5, tol, tol), jode.Backsolve())(Y0, W, TS))
    errors = [gap(run(tol), truth) for tol in tols]
    assert np.polyfit(np.log(tols), np.log(errors), 1)[0] >= 0.75
    assert errors[-1] <= 1e-7


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_continuous_adjoint_matches_finite_differences(direction):
    """y0, t0, t1, the save time between, and arrays closed over."""
    x = (Y0, W, direction * TS)
    solver = jode.Adaptive(jode.dopri8, 1e-11, 1e-11)

    def loss(y0, w, ts):
        ys = jode.odeint(lambda t, y, _: field(t, y, w), y0, ts, solver=solver, adjoint=jode.Backsolve())
        return jnp.sum(jnp.sin(ys) * jnp.arange(1.0, 10.0).reshape(3, 3))

    loss = jax.jit(loss)
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*x)
    for i, j in [(0, 0), (1, 4), (2, 0), (2, 1), (2, 2)]:
        h = 1e-4
        along = lambda e, i=i, j=j: float(
            loss(*(v.ravel().at[j].add(e).reshape(v.shape) if k == i else v for k, v in enumerate(x)))
        )
        fd = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        assert abs(fd - grads[i].ravel()[j]) <= 1e-6 * max(1, float(jnp.abs(grads[i]).max()))


def lorenz(t, y, p):
    return jnp.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])


@pytest.mark.parametrize(
    ("f", "y0", "t1", "p"),
    [(lorenz, jnp.ones(3), 10.0, jnp.array([10.0, 28.0, 8 / 3])), (lambda t, y, k: -k * y, jnp.ones(1), 1.0, jnp.array([50.0]))],
    ids=["chaotic", "dissipative"],
)
def test_a_way_back_that_diverges_is_nan(f, y0, t1, p):
    loss = lambda p: jnp.sum(jode.odeint(f, y0, (0.0, t1), p, adjoint=jode.Backsolve())[-1])
    assert np.isfinite(loss(p))
    assert np.isnan(jax.jit(jax.grad(loss))(p)).all()


SMOOTH = [jode.Backprop(), jode.Backprop(3), jode.MemoryFree(), jode.Backsolve()]
SOLVERS = [
    jode.Fixed(jode.midpoint, 8000),
    jode.Fixed(jode.midpoint, jnp.asarray(8000)),
    jode.Adaptive(jode.tsit5, 1e-10, 1e-10, max_steps=256),
]


@cache
def truth():
    """Gradients of the sum of squares at t = 1 from two states, and a Hessian-vector product, of the exact flow."""
    solver, ys, v = jode.Adaptive(jode.tsit5, 1e-12, 1e-12), jnp.stack([Y0, 2 * Y0]), jnp.ones_like(W)
    grad = jax.jit(jax.grad(lambda w, y: jnp.sum(jode.odeint(field, y, (0.0, 1.0), w, solver=solver)[-1] ** 2)))
    return [grad(W, y) for y in ys], jax.jit(lambda w: jax.jvp(lambda w: grad(w, Y0), (w,), (v,))[1])(W)


@pytest.mark.sweep
@pytest.mark.parametrize("adjoint", [jode.MemoryFree(), jode.Backsolve()], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=["fixed", "traced", "adaptive"])
def test_adjoints_under_the_transformations_of_jax(solver, adjoint):
    """jit, grad of vmap, vmap of grad, forward over reverse and reverse over reverse."""
    loss = lambda w, y, a: jnp.sum(jode.odeint(field, y, (0.0, 1.0), w, solver=solver, adjoint=a)[-1] ** 2)
    ys = jnp.stack([Y0, 2 * Y0])
    total = lambda w, a: jnp.sum(jax.vmap(lambda y: loss(w, y, a))(ys))
    exact, true_hvp = truth()
    np.testing.assert_allclose(jax.jit(jax.grad(total), static_argnums=1)(W, adjoint), sum(exact), rtol=2e-7, atol=1e-8)
    each = jax.jit(jax.vmap(jax.grad(lambda w, y: loss(w, y, adjoint)), (None, 0)))(W, ys)
    np.testing.assert_allclose(each, jnp.stack(exact), rtol=2e-7, atol=1e-8)
    v = jnp.ones_like(W)
    hvp = jax.jit(lambda w: jax.jvp(jax.grad(lambda w: loss(w, Y0, adjoint)), (w,), (v,))[1])(W)
    np.testing.assert_allclose(hvp, true_hvp, rtol=1e-5, atol=1e-6)
    twice = jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(lambda w: loss(w, Y0, adjoint))(w) * v)))(W)
    np.testing.assert_allclose(twice, true_hvp, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS, ids=["fixed", "traced", "adaptive"])
def test_forward_mode_agrees_with_backprop(solver):
    """jvp is the transpose of vjp to rounding, for y0, args and times."""
    x = (Y0, W, TS)
    v = jax.tree.map(lambda a: jnp.cos(jnp.arange(float(a.size))).reshape(a.shape), x)
    loss = lambda y0, w, ts: jnp.sum(jnp.sin(jode.odeint(field, y0, ts, w, solver=solver)))
    _, along = jax.jit(lambda x: jax.jvp(loss, x, v))(x)
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*x)
    dot = sum(jnp.sum(a * b) for a, b in zip(grads, v, strict=True))
    np.testing.assert_allclose(along, dot, rtol=1e-12)
    jac = jax.jit(jax.jacfwd(loss, 1))(*x)
    np.testing.assert_allclose(jac, grads[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adjoint", SMOOTH, ids=str)
def test_arguments_of_every_kind(adjoint):
    """Closed-over arrays, a Module, integer, PRNG-key and static leaves: gradients where there are any, none elsewhere."""
    import equinox as eqx

    mlp = eqx.nn.MLP(3, 3, 8, 1, key=jax.random.key(5), dtype=jnp.float64, activation=jnp.tanh)
    scale = jnp.array(0.5)
    args = {"n": jnp.array(2), "key": jax.random.key(7), "name": "hare", "params": {"kernel": W}}

    def loss(mlp, scale, kernel, adjoint):
        def f(t, y, args):
            noise = jax.random.normal(args["key"], (3,), jnp.float64)
            return scale * mlp(y) + args["params"]["kernel"] @ y / args["n"].astype(jnp.float64) + 0.1 * noise

        given = {**args, "params": {"kernel": kernel}}
        return jnp.sum(jode.odeint(f, Y0, (0.0, 1.0), given, solver=jode.Fixed(jode.rk4, 60), adjoint=adjoint)[-1] ** 2)

    params, static = eqx.partition(mlp, eqx.is_inexact_array)
    found, exact = (
        jax.jit(jax.grad(lambda p, s, k, a=a: loss(eqx.combine(p, static), s, k, a), (0, 1, 2)))(params, scale, W)
        for a in (adjoint, jode.Backprop())
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("adjoint", SMOOTH, ids=str)
@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 40), jode.Adaptive(jode.tsit5, 1e-8, 1e-8)], ids=["fixed", "adaptive"])
def test_a_failed_row_harms_no_other(adjoint, solver):
    """y' = -θ √y: the third row leaves the domain; masked out of the loss, it changes nothing."""
    y0 = jnp.array([1.0, 4.0, 0.01])

    def loss(theta):
        sol = jax.vmap(
            lambda y: jode.solve(lambda t, y, p: -p * jnp.sqrt(y), y, (0.0, 1.0), theta, solver=solver, adjoint=adjoint)
        )(y0)
        ok = sol.status == jode.Status.success
        return jnp.sum(jnp.where(ok, sol.ys[:, -1], 0)), ok

    (value, ok), bar = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.array(1.0))
    assert ok.tolist() == [True, True, False]
    np.testing.assert_allclose(value, 0.25 + 2.25, rtol=1e-6)
    np.testing.assert_allclose(bar, -2.0, rtol=1e-5)  # Σ -(√y0 - θ/2)


@pytest.mark.parametrize(
    ("solver", "adjoint", "words"),
    [
        (jode.Layers(jode.euler), jode.Backsolve(), "layers are not one"),
        (jode.Fixed(jode.leapfrog, 4), jode.Backsolve(), "Runge-Kutta or Rosenbrock method on the way back"),
        (jode.Adaptive(jode.Momentum(0.9)), jode.Backprop(), "estimates its error"),
        (jode.Layers(jode.heun, degree=2), jode.Backprop(), "degree must be 0"),
    ],
)
def test_impossible_pairings_are_refused_at_the_door(solver, adjoint, words):
    with pytest.raises(ValueError, match=words):
        jode.solve(field, Y0, (0.0, 1.0), W, solver=solver, adjoint=adjoint)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("adjoint", "method"),
    [(jode.MemoryFree(), jode.Reversible(jode.midpoint)), (jode.MemoryFree(), jode.midpoint), (jode.Backsolve(), jode.midpoint)],
    ids=str,
)
def test_memory_does_not_grow_with_steps(adjoint, method):
    def memory(steps):
        f = lambda t, y, w: jnp.tanh(w * y)
        loss = lambda y, w: jnp.sum(jode.odeint(f, y, (0.0, 1.0), w, solver=jode.Fixed(method, steps), adjoint=adjoint)[-1])
        program = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones(100_000), jnp.ones(100_000)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(4096) <= 1.1 * memory(16)


@pytest.mark.optimized
@pytest.mark.parametrize("adjoint", [jode.MemoryFree(), jode.Backsolve()], ids=["MemoryFree", "Backsolve"])
def test_not_even_a_number_is_kept_for_each_step(adjoint):
    """A scan over arange(n) keeps its n integers: 160 kB of 40,000 steps."""

    def memory(steps):
        f = lambda t, y, w: jnp.tanh(w * y)
        loss = lambda y, w: jnp.sum(jode.odeint(f, y, (0.0, 1.0), w, solver=jode.Fixed(jode.midpoint, steps), adjoint=adjoint)[-1])
        program = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones(1000), jnp.ones(1000)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(40_000) <= 1.01 * memory(16)


@pytest.mark.optimized
def test_memory_of_an_adaptive_solve_without_stored_states():
    def memory(most):
        f = lambda t, y, w: jnp.tanh(w * y)
        solver = jode.Adaptive(jode.Reversible(jode.bosh3), max_steps=most)
        loss = lambda y, w: jnp.sum(jode.odeint(f, y, (0.0, 1.0), w, solver=solver, adjoint=jode.MemoryFree())[-1])
        program = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones(100_000), jnp.ones(100_000)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert memory(4096) <= 1.1 * memory(16)
