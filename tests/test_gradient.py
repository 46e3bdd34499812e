"""Exact gradients: equal to autodiff through a hand-written loop on the same grid, and to finite differences."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode.adjoint.backprop import recomputed

Y0, ARGS = jnp.array([1.0, 1.2]), {"a": jnp.array([1.5, 1.0, 3.0, 1.0]), "n": 2, "who": "hare"}
ADJOINTS = [jode.Backprop(), jode.Backprop(None), jode.Backprop(5)]
FIXED = {
    "euler": jode.Fixed(jode.euler, 7),
    "heun": jode.Fixed(jode.heun, 6),
    "rk4": jode.Fixed(jode.rk4, 4),
    "dopri5": jode.Fixed(jode.dopri5, 3),
    "traced": jode.Fixed(jode.rk4, jnp.asarray(4), max_steps=4),
}
SOLVERS = {
    **FIXED,
    "tsit5": jode.Adaptive(jode.tsit5, 1e-9, 1e-9, max_steps=400),
    "dopri8": jode.Adaptive(jode.dopri8, 1e-11, 1e-11, max_steps=400),
}


def f(t, y, args):
    a = args["a"]
    return jnp.stack([a[0] * y[0] - a[1] * y[0] * y[1], -a[2] * y[1] + a[3] * y[0] * y[1]]) * (1 + 0.1 * jnp.sin(t))


def loss_of(solver, adjoint):
    def loss(y0, a, ts):
        ys = jode.odeint(f, y0, ts, {**ARGS, "a": a}, solver=solver, adjoint=adjoint)
        return jnp.sum(jnp.sin(ys) * jnp.arange(1.0, 1 + ys.size).reshape(ys.shape))

    return loss


def by_hand(method, steps):
    """The same solve as a plain scan that JAX differentiates."""
    t_ = method.tableau

    def loss(y0, a, ts):
        y, ys = y0, [y0]
        for start, end in itertools.pairwise(ts):
            h = (end - start) / steps

            def step(y, n, start=start, h=h):
                ks = []
                for c, row in zip(t_.c, t_.a, strict=True):
                    at = y + h * sum((w * k for w, k in zip(row, ks, strict=True)), jnp.zeros(2))
                    ks.append(f(start + n * h + c * h, at, {"a": a}))
                return y + h * sum(b * k for b, k in zip(t_.b, ks, strict=True)), None

            y, _ = jax.lax.scan(step, y, jnp.arange(float(steps)))
            ys.append(y)
        ys = jnp.stack(ys)
        return jnp.sum(jnp.sin(ys) * jnp.arange(1.0, 1 + ys.size).reshape(ys.shape))

    return loss


@cache
def hand_gradient(name, saves):
    solver, ts = FIXED[name], jnp.linspace(0.0, 1.0, saves)
    return jax.jit(jax.grad(by_hand(solver.method, int(solver.steps)), (0, 1, 2)))(Y0, ARGS["a"], ts)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize(("name", "saves"), [*((name, 3) for name in FIXED), ("rk4", 2)])
def test_fixed_steps_equal_autodiff_of_a_loop(name, saves, adjoint):
    solver, ts = FIXED[name], jnp.linspace(0.0, 1.0, saves)
    ours = jax.jit(jax.grad(loss_of(solver, adjoint), (0, 1, 2)))(Y0, ARGS["a"], ts)
    theirs = hand_gradient(name, saves)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def accepted_grid(solver, ts):
    """The times at which the accepted steps end, read off a vector field that reports where it is called."""
    times = []

    def spied(t, y, args):
        jax.debug.callback(lambda t: times.append(float(t)), t, ordered=True)
        return f(t, y, args)

    sol = jode.solve(spied, Y0, ts, ARGS, solver=solver)
    jax.effects_barrier()
    assert sol.stats.rejected == 0
    stages = solver.method.tableau.stages
    return [float(ts[0]), *times[2:][stages - 1 :: stages]]  # two calls choose the first step


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_adaptive_steps_equal_autodiff_of_a_loop_over_the_accepted_grid(adjoint):
    solver, t = jode.Adaptive(jode.dopri5, 1e-4, 1e-4, max_steps=20), jode.dopri5.tableau
    grid = accepted_grid(solver, (0.0, 1.0))

    def loss(y0, a):
        y = y0
        for start, end in itertools.pairwise(grid):
            ks, h = [], end - start
            for c, row in zip(t.c, t.a, strict=True):
                at = y + h * sum((w * k for w, k in zip(row, ks, strict=True)), jnp.zeros(2))
                ks.append(f(jnp.asarray(start + c * h), at, {"a": a}))
            y = y + h * sum(b * k for b, k in zip(t.b, ks, strict=True))
        return jnp.sum(y**2)

    ours = jax.grad(
        lambda y0, a: jnp.sum(jode.odeint(f, y0, (0.0, 1.0), {**ARGS, "a": a}, solver=solver, adjoint=adjoint)[-1] ** 2), (0, 1)
    )
    for a, b in zip(jax.jit(ours)(Y0, ARGS["a"]), jax.jit(jax.grad(loss, (0, 1)))(Y0, ARGS["a"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert len(grid) > 3


@pytest.mark.parametrize(
    ("name", "direction", "saves"),
    [("rk4", -1.0, 5), ("traced", 1.0, 5), ("tsit5", 1.0, 2), ("tsit5", -1.0, 5), ("tsit5", 1.0, 5), ("dopri8", 1.0, 5)],
)
def test_every_input_matches_finite_differences(name, direction, saves):
    """y0, args, t0, t1 and every save time between."""
    x = (Y0, ARGS["a"], direction * jnp.linspace(0.0, 1.0, saves) ** 1.3)
    loss = jax.jit(loss_of(SOLVERS[name], jode.Backprop()))
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*x)
    for i, g in enumerate(grads):
        for j in range(g.size):

            def along(e, i=i, j=j):
                return float(loss(*(v.at[j].add(e) if k == i else v for k, v in enumerate(x))))

            h = 1e-4
            fd = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
            assert abs(fd - g[j]) <= 1e-6 * max(1, np.abs(g).max())


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "saves"), [("rk4", 4), ("traced", 4), ("tsit5", 4)])
def test_second_derivatives(name, saves):
    """Forward over reverse, against differences of the gradient; reverse over reverse too on a grid of static length."""
    ts, a = jnp.linspace(0.0, 1.0, saves), ARGS["a"]
    gradient = jax.jit(jax.grad(loss_of(SOLVERS[name], jode.Backprop()), 1))
    hessian = jax.jit(jax.jacfwd(gradient, 1))(Y0, a, ts)
    h = 1e-4
    for j in range(4):
        fd = (
            8 * (gradient(Y0, a.at[j].add(h), ts) - gradient(Y0, a.at[j].add(-h), ts))
            - (gradient(Y0, a.at[j].add(2 * h), ts) - gradient(Y0, a.at[j].add(-2 * h), ts))
        ) / (12 * h)
        np.testing.assert_allclose(fd, hessian[:, j], rtol=1e-6, atol=1e-6 * np.abs(hessian).max())
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-6, atol=1e-7 * np.abs(hessian).max())
    if name == "rk4":
        np.testing.assert_allclose(jax.jit(jax.jacrev(gradient, 1))(Y0, a, ts), hessian, rtol=1e-9)


@pytest.mark.sweep
def test_second_derivatives_inside_an_outer_scan():
    def through_scan(a):
        def body(y, _):
            return jode.odeint(f, y, (0.0, 0.3), {**ARGS, "a": a}, solver=jode.Fixed(jode.heun, 4))[-1], None

        return jnp.sum(jax.lax.scan(body, Y0, None, length=2)[0] ** 2)

    def unrolled(a):
        y = Y0
        for _ in range(2):
            y = jode.odeint(f, y, (0.0, 0.3), {**ARGS, "a": a}, solver=jode.Fixed(jode.heun, 4))[-1]
        return jnp.sum(y**2)

    expected = jax.jit(jax.hessian(unrolled))(ARGS["a"])
    for hessian in (jax.hessian, lambda g: jax.jacrev(jax.jacrev(g))):
        np.testing.assert_allclose(jax.jit(hessian(through_scan))(ARGS["a"]), expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["rk4", "tsit5"])
def test_closed_over_arrays_get_gradients(name):
    solver, a = SOLVERS[name], ARGS["a"]
    inside = jax.grad(lambda a: jnp.sum(jode.odeint(lambda t, y, _: f(t, y, {"a": a}), Y0, (0.0, 1.0), solver=solver)))(a)
    outside = jax.grad(lambda a: jnp.sum(jode.odeint(f, Y0, (0.0, 1.0), {**ARGS, "a": a}, solver=solver)))(a)
    np.testing.assert_allclose(inside, outside, rtol=1e-12)


@pytest.mark.parametrize("name", ["rk4", "tsit5"])
def test_equinox_modules_are_vector_fields_and_arguments(name):
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))

    def value(net, y0, inside):
        field = (lambda t, y, args: net(y)) if inside else (lambda t, y, args: args(y))
        return jnp.sum(jode.odeint(field, y0, (0.0, 1.0), None if inside else net, solver=SOLVERS[name])[-1])

    a, b = (eqx.filter_grad(lambda net, inside=inside: value(net, Y0, inside))(net) for inside in (True, False))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


def test_a_complex_gradient_is_that_of_the_closed_form():
    y0, w = jnp.array([1.0 + 0.3j]), jnp.array(0.2 + 1.0j)
    ours = jax.grad(
        lambda y0, w: (
            jnp.abs(
                jode.odeint(lambda t, y, w: w * y, y0, (0.0, 1.0), w, solver=jode.Adaptive(jode.tsit5, 1e-11, 1e-11))[-1, 0] - 2
            )
            ** 2
        ),
        (0, 1),
    )
    theirs = jax.grad(lambda y0, w: jnp.abs(y0[0] * jnp.exp(w) - 2) ** 2, (0, 1))
    for a, b in zip(ours(y0, w), theirs(y0, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


@pytest.mark.parametrize(("steps", "checkpoints"), [(1, 2), (7, 1), (7, 3), (20, 2), (61, 3), (61, 8)])
def test_the_checkpoint_schedule_is_optimal(steps, checkpoints):
    """Steps taken again, counted at run time, equal the least possible, found by dynamic programming."""
    calls = []

    def field(t, y, args):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return -y

    solver, adjoint = jode.Fixed(jode.euler, steps), jode.Backprop(checkpoints)
    gradient, sol = jax.grad(
        lambda y: (lambda s: (s.ys[-1, 0], s))(jode.solve(field, y, (0.0, 1.0), solver=solver, adjoint=adjoint)), has_aux=True
    )(jnp.ones(1))
    jax.effects_barrier()
    again = 0 if checkpoints >= steps else fewest(steps, checkpoints)
    assert len(calls) == steps + again + steps  # once forwards, once to be differentiated
    assert sol.stats.nfe_backward == again + steps
    np.testing.assert_allclose(gradient, (1 - 1 / steps) ** steps, rtol=1e-12)


def fewest(steps, checkpoints, memo={}):  # noqa: B006
    """The least number of steps to take again to reverse `steps` of them from the first state, keeping so many states."""
    if steps == 1:
        return 0
    if checkpoints == 1:
        return steps * (steps - 1) // 2
    key = steps, checkpoints
    if key not in memo:
        memo[key] = min(m + fewest(steps - m, checkpoints - 1) + fewest(m, checkpoints) for m in range(1, steps))
    return memo[key]


def test_the_count_of_repeated_steps_is_the_least_possible():
    count = jax.jit(recomputed, static_argnums=1)
    for checkpoints in (1, 2, 3, 5, 8, 40):
        for steps in (1, 2, 3, 5, 17, 39, 41, 64):
            assert int(count(jnp.asarray(steps), checkpoints)) == (fewest(steps, checkpoints) if checkpoints < steps else steps - 1)


def test_the_schedule_is_logarithmic():
    assert int(recomputed(jnp.asarray(100_000), 64)) <= 4 * 100_000


@pytest.mark.sweep
@pytest.mark.optimized
def test_memory_follows_the_checkpoints():
    """Bytes of temporaries of a gradient of 1,024 steps on a state of 4,096 numbers."""

    def memory(steps, adjoint):
        loss = lambda y: jnp.sum(
            jode.odeint(lambda t, y, a: jnp.sin(y), y, (0.0, 1.0), solver=jode.Fixed(jode.euler, steps), adjoint=adjoint)[-1]
        )
        return jax.jit(jax.grad(loss)).lower(jnp.ones(4096)).compile().memory_analysis().temp_size_in_bytes / (8 * 4096)

    assert memory(1024, jode.Backprop(None)) > 1024
    assert memory(1024, jode.Backprop(16)) < 32
    assert memory(1024, jode.Backprop(64)) < 80
    assert memory(4096, jode.Backprop(16)) <= 1.01 * memory(256, jode.Backprop(16))


@pytest.mark.optimized
def test_the_default_never_stores_a_large_multiple_of_the_state():
    """4,096 possible steps of a state of 2 MB would be 8 GB; the default keeps to its budget."""
    loss = lambda y: jnp.sum(jode.odeint(lambda t, y, a: jnp.sin(y), y, (0.0, 1.0), solver=jode.Adaptive())[-1])
    stats = jax.jit(jax.grad(loss)).lower(jnp.ones(2**18)).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 2**26 + 64 * 2**21


@pytest.mark.optimized
def test_a_solve_without_gradients_stores_only_its_save_times():
    solve = jax.jit(lambda y: jode.odeint(lambda t, y, a: jnp.sin(y), y, (0.0, 1.0), solver=jode.Adaptive()))
    assert solve.lower(jnp.ones(2**16)).compile().memory_analysis().temp_size_in_bytes < 24 * 2**19
    scan = jax.jit(lambda y: jode.odeint(lambda t, y, a: jnp.sin(y), y, (0.0, 1.0), solver=jode.Fixed(jode.rk4, 4096)))
    assert scan.lower(jnp.ones(2**16)).compile().memory_analysis().temp_size_in_bytes < 8 * 2**19


def test_save_times_at_the_start_have_the_slope_for_a_derivative():
    """Repeated save times, at the start too: the same cotangents as on a grid known beforehand, for one and for a batch."""
    ys = jnp.stack([Y0, 1.1 * Y0])

    def loss(solver):
        one = lambda y, ts: jnp.sum(jode.odeint(f, y, ts, ARGS, solver=solver) * jnp.arange(1.0, 11.0).reshape(5, 2))
        return jax.jit(jax.grad(lambda ts: one(Y0, ts) + jnp.sum(jax.vmap(one, (0, None))(ys, ts))))

    found, known = loss(SOLVERS["tsit5"]), loss(jode.Fixed(jode.dopri5, 60))
    ts = jnp.array([0.0, 0.0, 0.5, 0.5, 1.0])
    for x in (ts, -ts, 0 * ts):
        np.testing.assert_allclose(found(x), known(x), rtol=1e-6, atol=1e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("checkpoints", ["auto", 5], ids=str)
@pytest.mark.parametrize("ts", [(0.0, 3.0), (3.0, 0.0), (0.0, 0.0, 1.1, 2.0, 3.0)], ids=["two", "back", "saves"])
def test_a_gradient_over_chapters_of_steps_is_that_over_all_at_once(ts, checkpoints):
    """A batch whose tables would be large records 256 steps at a time; a single row records them all. One row fails, one is done early."""
    solver = jode.Adaptive(jode.bosh3, 1e-9, 1e-9, max_steps=1500)

    def loss(y, a, ts):
        sol = jode.solve(lambda t, y, a: jnp.stack([a * y[1], -a * y[0] * jnp.cos(t)]), y, ts, a, solver=solver, adjoint=adjoint)
        return jnp.sum(jnp.sin(jnp.where(sol.status == 0, sol.ys, 0.0))), sol.stats.accepted

    rows = 16
    rate, y0 = jnp.linspace(0.0, 6.0, rows).at[3].set(1e3), jax.random.normal(jax.random.key(0), (rows, 2))
    ts = jnp.asarray(ts)
    adjoint = jode.Backprop(None)
    alone = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, steps), exact = jax.tree.map(lambda *x: jnp.stack(x), *[alone(y0[i], rate[i], ts) for i in range(rows)])
    adjoint = jode.Backprop(checkpoints)
    total = lambda y, a, ts: jnp.sum(jax.vmap(lambda y, a: loss(y, a, ts)[0])(y, a))
    found = jax.jit(jax.grad(total, (0, 1, 2)))(y0, rate, ts)
    assert steps.max() > 600
    assert steps.min() < 30
    for a, b in zip(found, (*exact[:2], exact[2].sum(0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    each = jax.jit(jax.vmap(jax.grad(lambda a, y: loss(y, a, ts)[0])))(rate, y0)
    np.testing.assert_allclose(each, exact[1], rtol=1e-8, atol=1e-9)
