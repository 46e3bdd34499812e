"""Answers that were wrong once, by kind: over solvers, adjoints, dtypes and nestings."""

import itertools
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import Status

F32, F64 = jnp.float32, jnp.float64
SOLVERS = {
    "fixed": jode.Fixed(jode.heun, 4),
    "traced": jode.Fixed(jode.heun, jnp.asarray(4), max_steps=8),
    "adaptive": jode.Adaptive(jode.bosh3, 1e-4, 1e-4, max_steps=64),
    "reversible": jode.Fixed(jode.reversible_heun, 4),
}
ADJOINTS = [jode.Backprop(), jode.Backprop(2), jode.MemoryFree(), jode.Backsolve()]
CHOSEN = [
    ("fixed", ADJOINTS[0]),
    ("traced", ADJOINTS[1]),
    ("adaptive", ADJOINTS[0]),
    ("adaptive", ADJOINTS[3]),
    ("reversible", ADJOINTS[2]),
    ("fixed", ADJOINTS[2]),
]
FEW = [pytest.param(SOLVERS[s], a, id=f"{s}-{type(a).__name__}") for s, a in CHOSEN]
PAIRS = [
    pytest.param(
        SOLVERS[s],
        a,
        id=f"{s}-{type(a).__name__}{getattr(a, 'checkpoints', '') or ''}",
        marks=[] if (s, a) in CHOSEN else [pytest.mark.sweep],
    )
    for s, a in itertools.product(SOLVERS, ADJOINTS)
    if a.refusal(SOLVERS[s]) is None
]
TS = jnp.linspace(0.0, 1.0, 3)


def decay(t, y, a):
    return -a * y


# A solve that no mapped operand reaches.


@pytest.mark.parametrize(("solver", "adjoint"), PAIRS)
def test_a_solve_that_no_row_reaches_is_done_once(solver, adjoint):
    solve = lambda a=0.7: jode.odeint(decay, jnp.ones(2), TS, a, solver=solver, adjoint=adjoint)
    alone, x = solve()[None], jnp.arange(24.0).reshape(4, 3, 2)
    target = lambda o: o - solve()
    np.testing.assert_array_equal(jax.vmap(target)(x), x - alone)
    np.testing.assert_array_equal(jax.jit(jax.vmap(target, 1, 1))(x.swapaxes(0, 1)), (x - alone).swapaxes(0, 1))
    np.testing.assert_array_equal(jax.vmap(jax.vmap(target))(jnp.stack([x, 2 * x]))[1], 2 * x - alone)
    noisy = lambda key: jax.random.normal(key, (3, 2)) + jax.vmap(lambda _: solve())(jnp.arange(2))[0]
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(jax.vmap(noisy)(keys) - alone, jax.vmap(lambda k: jax.random.normal(k, (3, 2)))(keys), atol=1e-12)


@pytest.mark.parametrize(("solver", "adjoint"), FEW)
def test_derivatives_beside_a_constant_solve(solver, adjoint):
    solve = lambda a=0.7: jode.odeint(decay, jnp.ones(2), TS, a, solver=solver, adjoint=adjoint)
    size = jnp.sum(solve())
    np.testing.assert_allclose(jax.hessian(lambda z: jnp.sum(z[0] ** 2 * solve()) + z[1])(jnp.ones(2))[0, 0], 2 * size)
    np.testing.assert_allclose(jax.jacfwd(lambda z: solve() * z)(2.0), solve())
    np.testing.assert_allclose(jax.jacrev(lambda z: solve() * z)(2.0), solve())
    each = jax.vmap(lambda o: jax.grad(lambda a: jnp.sum(solve(a)) - o)(0.7))(jnp.ones(3))
    np.testing.assert_allclose(each, jnp.full(3, jax.grad(lambda a: jnp.sum(solve(a)))(0.7)), rtol=1e-12)


def test_a_network_of_constants_inside_vmap():
    layer, weights = lambda t, x, w: jnp.tanh(w * x), jnp.ones((4, 2))
    out = jode.resnet(layer, jnp.ones(2), weights)
    np.testing.assert_array_equal(jax.vmap(lambda o: o - jode.resnet(layer, jnp.ones(2), weights))(jnp.zeros((3, 2))), [-out] * 3)


# Forward mode was refused by the adjoints for reverse mode; it is exact whatever the adjoint.


@cache
def reverse_mode():
    solve = lambda a: jode.odeint(decay, jnp.ones(2), TS, a, solver=SOLVERS["fixed"], adjoint=jode.Backprop(None))
    return jax.jit(jax.jacrev(solve))(0.7)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "linearize", "jit", "vmap"])
def test_forward_mode_is_exact_whatever_the_adjoint(mode, adjoint):
    solve = lambda a: jode.odeint(decay, jnp.ones(2), TS, a, solver=SOLVERS["fixed"], adjoint=adjoint)
    found = {
        "jvp": lambda: jax.jvp(solve, (0.7,), (1.0,))[1],
        "jacfwd": lambda: jax.jacfwd(solve)(0.7),
        "linearize": lambda: jax.linearize(solve, 0.7)[1](1.0),
        "jit": lambda: jax.jit(jax.jacfwd(solve))(0.7),
        "vmap": lambda: jax.jvp(jax.vmap(solve), (jnp.full(2, 0.7),), (jnp.ones(2),))[1][1],
    }[mode]()
    np.testing.assert_allclose(found, reverse_mode(), rtol=1e-12)


# A state at rest says nothing about the scale of time.

REST = {
    "flow initialised at zero": (lambda t, y, a: jnp.tanh(0 * y), 1.0, (1.0, 0.0), 1.0),
    "fixed point": (lambda t, y, a: y * (1 - y), 1.0, (1.0, 2.0), 1.0),
    "from zero, late": (lambda t, y, a: 1 - y, 0.0, (100.0, 101.0), 1 - np.exp(-1)),
    "from zero, very late": (lambda t, y, a: 1 - y, 0.0, (1e4, 1e4 + 4), 1 - np.exp(-4)),
    "backwards": (lambda t, y, a: 1 + y, 0.0, (1000.0, 999.0), np.exp(-1) - 1),
    "wakes up": (lambda t, y, a: jnp.exp(-((t - 1001) ** 2)) * jnp.ones_like(y), 0.0, (1000.0, 1002.0), 1.4936482656),
    "at minus": (lambda t, y, a: -y, 0.0, (-500.0, -499.0), 0.0),
}


@pytest.mark.parametrize("method", [jode.tsit5, jode.bosh3, jode.dopri8], ids=str)
@pytest.mark.parametrize("name", REST)
def test_a_solve_in_float32_starts_from_rest(name, method):
    f, y0, ts, end = REST[name]
    sol = jode.solve(f, jnp.full(2, y0, F32), ts, solver=jode.Adaptive(method, 1e-5, 1e-5))
    assert sol.status == Status.success
    tol = 1e-3 if name in ("wakes up", "from zero, very late") else 1e-4  # of which 1e-3 is an ulp of t
    np.testing.assert_allclose(sol.ys[-1], end, atol=tol)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_gradient_of_a_flow_initialised_at_zero(adjoint):
    f = lambda t, y, w: jnp.tanh(w * y)
    end = lambda w: jnp.sum(jode.odeint(f, jnp.ones(3, F32), (1.0, 0.0), w, adjoint=adjoint)[-1])
    np.testing.assert_allclose(jax.grad(end)(jnp.zeros((), F32)), -3.0, rtol=1e-5)


@pytest.mark.parametrize("first", [1e-12, 0.0])
def test_a_first_step_below_the_resolution_of_time_is_widened(first):
    solver = jode.Adaptive(first_step=first)
    np.testing.assert_allclose(
        jode.odeint(lambda t, y, a: -y, jnp.ones(1, F32), (1.0, 2.0), solver=solver)[-1], np.exp(-1), rtol=1e-5
    )


# Numbers known only at run time.

BAD_TIMES = [[0, -1.0, 1.0], [0, 1.0, 0.5], [0, np.nan, 1.0], [np.nan, 0, 1.0], [0, np.inf, 1.0], [0, -1.0, -0.5]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_traced_times_out_of_order_are_a_status(solver):
    run = jax.jit(lambda ts: jode.solve(lambda t, y, a: -y, jnp.ones(2), ts, solver=SOLVERS[solver]))
    for ts in BAD_TIMES:
        sol = run(jnp.asarray(ts))
        assert sol.status == Status.invalid_input, ts
        assert np.isnan(sol.ys).all()
        assert sol.stats.nfe == 0
        with pytest.raises(jode.SolveError, match=r"invalid_input.*ts must be finite"):
            jode.check(sol)


@pytest.mark.sweep
@pytest.mark.parametrize(("solver", "adjoint"), FEW)
def test_a_row_with_invalid_times_harms_no_other(solver, adjoint):
    tss = jnp.asarray([[0, 0.5, 1.0], [0, 1.0, 0.5], [0, np.nan, 1.0], [0, -0.5, -1.0]])

    def total(a, tss):
        sol = jax.vmap(lambda ts: jode.solve(decay, jnp.ones(2), ts, a, solver=solver, adjoint=adjoint))(tss)
        good = sol.status == Status.success
        return jnp.sum(jnp.where(good[:, None], sol.ys[:, -1], 0.0)), sol.status

    value, status = total(0.7, tss)
    assert [Status(int(s)).name for s in status] == ["success", "invalid_input", "invalid_input", "success"]
    good = tss[jnp.array([0, 3])]
    np.testing.assert_allclose(value, total(0.7, good)[0], rtol=1e-12)
    gradient = jax.grad(total, (0, 1), has_aux=True)
    (a, ts), (a_good, ts_good) = gradient(0.7, tss)[0], gradient(0.7, good)[0]
    np.testing.assert_allclose(a, a_good, rtol=1e-12)
    np.testing.assert_allclose(ts[jnp.array([0, 3])], ts_good, rtol=1e-12)


@pytest.mark.parametrize("steps", [0, -3, 9])
@pytest.mark.parametrize("nesting", ["jit", "vmap", "args"])
def test_a_traced_step_count_out_of_range_is_a_status(nesting, steps):
    solve = lambda n: jode.solve(lambda t, y, a: -y, jnp.ones(1), (0.0, 1.0), solver=jode.Fixed(jode.rk4, n, max_steps=8))
    if nesting == "args":
        with pytest.raises(ValueError, match="steps must be at least 1 and at most max_steps = 8"):
            solve(jnp.asarray(steps))
        return
    sol = jax.jit(solve)(steps) if nesting == "jit" else jax.tree.map(lambda x: x[1], jax.vmap(solve)(jnp.array([5, steps])))
    assert sol.status == Status.invalid_input
    assert np.isnan(sol.ys).all()
    assert sol.stats.nfe == 0


@pytest.mark.parametrize(("rtol", "atol"), [(np.nan, 1e-3), (-1e-3, 1e-3), (0.0, 0.0), (1e-3, np.inf)])
def test_traced_tolerances_out_of_range_are_a_status(rtol, atol):
    solve = jax.jit(lambda r, a: jode.solve(lambda t, y, _: -y, jnp.ones(1), (0.0, 1.0), solver=jode.Adaptive(rtol=r, atol=a)))
    assert solve(rtol, atol).status == Status.invalid_input


# What f may return.


@pytest.mark.parametrize("number", [0.5, 1, True, np.float64(2), np.int32(3), np.array(0.25), jnp.float32(2)], ids=str)
@pytest.mark.parametrize("solver", ["fixed", "adaptive"])
def test_a_number_returned_by_f_is_a_slope(solver, number):
    f = lambda t, y, a: {"a": -y["a"], "b": number}
    y0 = {"a": jnp.ones(2), "b": 1.0}
    np.testing.assert_allclose(jode.odeint(f, y0, (0.0, 2.0), solver=SOLVERS[solver])["b"][-1], 1 + 2 * float(number), rtol=1e-6)
    batch = jax.vmap(lambda b: jode.odeint(f, {**y0, "b": b}, (0.0, 2.0), solver=SOLVERS[solver])["b"][-1])(jnp.arange(2.0))
    np.testing.assert_allclose(batch, np.arange(2.0) + 2 * float(number), rtol=1e-6)


@pytest.mark.parametrize("out", [list, tuple])
def test_a_list_for_an_array_names_the_remedy(out):
    with pytest.raises(TypeError, match=r"one of the 2 entries with jnp.stack"):
        jode.solve(lambda t, y, a: out([-y[0], y[1]]), jnp.ones(2), (0.0, 1.0))


# Time has a dtype of its own.


@pytest.mark.parametrize("start", [1e7, -1e6])
@pytest.mark.parametrize("state", [F32, jnp.bfloat16, F64])
@pytest.mark.parametrize("solver", ["fixed", "adaptive", "reversible"])
def test_f_sees_times_in_their_own_dtype(solver, state, start):
    """y' = cos 2πt from a late whole number: sin(2πt) / 2π, of which float32 times keep nothing."""
    ts = start + np.array([0, 0.25, 0.5, 1.0])
    many = {
        "fixed": jode.Fixed(jode.rk4, 20),
        "adaptive": jode.Adaptive(jode.tsit5, 1e-5, 1e-5),
        "reversible": jode.Fixed(jode.leapfrog, 50),
    }
    ys = jode.odeint(lambda t, y, a: jnp.cos(2 * jnp.pi * t), jnp.zeros((), state), ts, solver=many[solver])
    assert ys.dtype == state
    np.testing.assert_allclose(ys.astype(float), [0, 0.5 / np.pi, 0, 0], atol=0.01 if state == jnp.bfloat16 else 2e-4)


@pytest.mark.parametrize(
    ("ts", "state", "seen"),
    [
        ((0.0, 1.0), F32, F32),
        ((0, 1), jnp.bfloat16, F32),
        ((0.0, 1.0), jnp.complex64, F32),
        ([0.0, 1.0], F64, F64),
        (np.array([0.0, 1.0]), F32, F64),
        (jnp.array([0.0, 1.0], F32), F64, F32),
        (jnp.array([0.0, 1.0], jnp.bfloat16), F32, F32),
        ((0.0, jnp.float64(1.0)), F32, F64),
        (jnp.arange(2), F32, F32),
    ],
    ids=str,
)
def test_python_times_take_the_precision_of_the_state(ts, state, seen):
    dtypes = []
    f = lambda t, y, a: (dtypes.append(t.dtype), -y)[1]
    sol = jode.solve(f, jnp.ones(2, state), ts)
    assert set(dtypes) == {jnp.dtype(seen)} == {sol.ts.dtype}
    assert sol.ys.dtype == state


@pytest.mark.parametrize("ts", [[1e8, 1e8 + 1], (0.0, 1e8, 1e8 + 1), [2**24, 2**24 + 1], [1.0, 1.0 + 1e-9]], ids=str)
def test_times_that_one_dtype_cannot_tell_apart_are_refused(ts):
    with pytest.raises(ValueError, match=r"are the same number in float32.*float64"):
        jode.solve(lambda t, y, a: -y, jnp.ones(1, F32), ts)
    assert jode.solve(lambda t, y, a: -y, jnp.ones(1), ts, solver=jode.Fixed(jode.euler, 1)).status == Status.success


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz])
@pytest.mark.parametrize("nest", [lambda x: x, lambda x: {"a": jnp.ones(2), "b": x}], ids=["array", "leaf"])
def test_states_too_coarse_to_advance_are_refused(nest, dtype):
    with pytest.raises(TypeError, match=r"y0.*too coarse to advance"):
        jode.solve(lambda t, y, a: y, nest(jnp.ones(2, dtype)), (0.0, 1.0))


# No NaN is computed on the way to a good answer.


@pytest.mark.sweep
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no jit"])
@pytest.mark.parametrize("solver", ["fixed", "adaptive", "reversible"])
def test_healthy_solves_compute_no_nan(solver, jit):
    solver = jode.Adaptive(jode.bosh3, 1e-2, 1e-2, max_steps=32) if solver == "adaptive" else SOLVERS[solver]
    solve = lambda y, ts=TS, a=0.7: jode.odeint(lambda t, y, a: -a * y * jnp.cos(t), y, ts, a, solver=solver)
    rows = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 100.0]])
    with jax.debug_nans(True), jax.disable_jit(not jit):
        solve(rows[0])
        jax.vmap(solve)(rows)
        jax.vmap(solve, (None, 0))(rows[0], jnp.stack([TS, -2 * TS, 0 * TS]))
        jax.grad(lambda a: jnp.sum(jax.vmap(lambda y: solve(y, a=a))(rows)))(0.7)


# Reversible methods are as accurate as what they are made of.

PROBLEMS = {
    "Lotka-Volterra": (lambda t, y, a: jnp.stack([1.5 * y[0] - y[0] * y[1], -3 * y[1] + y[0] * y[1]]), [1.0, 1.0], 20.0),
    "decay": (lambda t, y, a: -jnp.array([1.0, 3.0]) * y, [1.0, 1.0], 5.0),
    "pendulum": (lambda t, y, a: jnp.stack([y[1], -jnp.sin(y[0])]), [1.0, 0.0], 20.0),
    "van der Pol": (lambda t, y, a: jnp.stack([y[1], (1 - y[0] ** 2) * y[1] - y[0]]), [2.0, 0.0], 20.0),
}


@pytest.mark.sweep
@pytest.mark.parametrize("problem", PROBLEMS)
def test_reversible_methods_are_as_accurate_as_their_own(problem):
    """Within ten times the error of the method itself wherever that is small, whatever the step count."""
    f, y0, end = PROBLEMS[problem]
    final = lambda solver: jode.odeint(f, jnp.array(y0), (0.0, end), solver=solver)[-1]
    true = final(jode.Adaptive(jode.dopri8, 1e-12, 1e-12, max_steps=10_000))
    seen = 0
    for method, steps in itertools.product((jode.midpoint, jode.bosh3, jode.rk4), (50, 200, 2000)):
        own = jnp.max(jnp.abs(final(jode.Fixed(method, steps)) - true))
        if own < 1e-2:
            seen += 1
            error = jnp.max(jnp.abs(final(jode.Fixed(jode.Reversible(method), steps)) - true))
            assert error < 10 * own + 1e-12, (method, steps, own, error)
    assert seen >= 4


@pytest.mark.sweep
def test_reversible_on_lotka_volterra_at_its_default():
    f, y0, end = PROBLEMS["Lotka-Volterra"]
    final = lambda method, adjoint=jode.Backprop(): (
        lambda y: jode.odeint(f, y, (0.0, end), solver=jode.Fixed(method, 2000), adjoint=adjoint)[-1]
    )
    y0, rk4, reversible = jnp.array(y0), final(jode.rk4), jode.Reversible(jode.rk4)
    true = jode.odeint(f, y0, (0.0, end), solver=jode.Adaptive(jode.dopri8, 1e-12, 1e-12))[-1]
    error = lambda y: float(jnp.max(jnp.abs(y - true)))
    assert error(final(reversible)(y0)) < 2 * error(rk4(y0)) < 1e-6
    gradient = lambda adjoint: jax.grad(lambda y: jnp.sum(final(reversible, adjoint)(y) ** 2))(y0)
    np.testing.assert_allclose(gradient(jode.MemoryFree()), gradient(jode.Backprop()), rtol=1e-9)


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("problem", ["decay", "pendulum"])
def test_adaptive_steps_keep_the_copies_together(problem, tol):
    f, y0, end = PROBLEMS[problem]
    final = lambda method, tol: jode.odeint(f, jnp.array(y0), (0.0, end), solver=jode.Adaptive(method, tol, tol))[-1]
    for coupling in (0.5, 0.9, None):
        error = jnp.max(jnp.abs(final(jode.Reversible(jode.tsit5, coupling), tol) - final(jode.dopri8, 1e-12)))
        assert error < 50 * tol, coupling


@pytest.mark.parametrize("solver", ["fixed", "adaptive"])
def test_a_batch_of_no_rows(solver):
    solve = lambda k, y: jode.odeint(decay, y, (0.0, 1.0), k, solver=SOLVERS[solver])[-1]
    value, gradient = jax.value_and_grad(lambda k: jnp.sum(jax.vmap(lambda y: solve(k, y))(jnp.zeros((0, 2)))))(1.0)
    assert value == gradient == 0


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda f: jode.solve(f, TS, jnp.ones(2)), "solve's own order is f, y0, ts, args"),
        (lambda f: jode.solve(lambda y, t, a: f(t, y, a), jnp.ones(2), TS), "t a scalar and y0 of float64\\[2\\]"),
    ],
)
def test_arguments_in_another_order_are_told_how_f_is_called(call, hint):
    def f(t, y, args):
        a, b = y
        return jnp.stack([b, -a])

    with pytest.raises((TypeError, ValueError)) as caught:
        call(f)
    assert re.search(hint, "".join([str(caught.value), *getattr(caught.value, "__notes__", [])]))
