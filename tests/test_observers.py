"""Observers inside the loop: every step taken (`Steps`), and the solution at any time (`Dense`), right in value and every derivative."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import expm

import jode
from tests.problems import lorenz, lotka_volterra, users_jit, van_der_pol

TSIT5, DOPRI8 = (jode.Adaptive(m, 1e-11, 1e-11) for m in (jode.tsit5, jode.dopri8))
EQUAL = jode.Fixed(jode.dopri8, 20)


PROBLEMS = {
    "lotka_volterra": (lotka_volterra, [1.0, 1.0], 10.0),
    "lorenz": (lorenz, [1.0, 1.0, 1.0], 5.0),
    "van_der_pol": (van_der_pol(5.0), [2.0, 0.0], 10.0),
}
DAILY = [("lotka_volterra", "tsit5"), ("lorenz", "dopri8"), ("lorenz", "bosh3"), ("van_der_pol", "tsit5")]


@pytest.mark.parametrize(
    ("problem", "method"),
    [
        pytest.param(problem, method, marks=[] if (problem, method) in DAILY else [pytest.mark.sweep])
        for problem in PROBLEMS
        for method in ("tsit5", "dopri8", "bosh3")
    ],
)
def test_the_solution_at_any_time_is_as_good_as_the_end(problem, method):
    """The bound of test_adaptive.py for save times, at a thousand times, each beside a step that ends there; and it costs no step."""
    f, y0, t1 = PROBLEMS[problem]
    tol, y0 = (1e-5 if method == "bosh3" else 1e-7), jnp.array(y0)
    solver = jode.Adaptive(getattr(jode, method), tol, tol)
    times = np.sort(np.random.default_rng(0).uniform(0, t1, 1000))
    sol = jode.check(jode.solve(f, y0, (0.0, t1), solver=solver, observe=jode.Dense(2000)))
    ended = jax.vmap(lambda t: jode.solve(f, y0, jnp.stack([0.0, t]), solver=solver))(jnp.append(times, t1))
    true = jode.odeint(f, y0, np.concatenate([[0.0], times]), solver=jode.Adaptive(jode.dopri8, 1e-13, 1e-13))[1:]
    scale = tol * (1 + np.abs(true).max(1))
    between, at_ends = (np.abs(y - true).max(1) / scale for y in (sol.observed(times), ended.ys[:-1, -1]))
    assert between.max() <= 3 * at_ends.max() + 1
    assert sol.stats.accepted == ended.stats.accepted[-1]


A, Y0 = jnp.array([[-0.3, 1.0], [-1.0, -0.1]]), jnp.array([1.0, 0.5])


def linear(t, y, a):
    return a @ y


X = (A, Y0, 0.7)


def second(f):
    """The derivative of the gradient along ones."""
    return lambda *x: jax.jvp(jax.grad(f, (0, 1, 2)), x, jax.tree.map(jnp.ones_like, x))[1]


@cache
def of_the_exponential(start):
    """The gradient of |exp(a (t - start)) y0|², and its derivative along ones."""
    exact = lambda a, y0, t: jnp.sum((expm(a * (t - start)) @ y0) ** 2)
    return jax.jit(lambda *x: (jax.grad(exact, (0, 1, 2))(*x), second(exact)(*x)))(*X)


CASES = {
    "tsit5": (TSIT5, jode.Backprop()),
    "dopri8": (DOPRI8, jode.Backprop()),
    "reversible tsit5": (jode.Adaptive(jode.Reversible(jode.tsit5), 1e-11, 1e-11), jode.MemoryFree()),
    "four checkpoints": (DOPRI8, jode.Backprop(4)),
    "all stored": (DOPRI8, jode.Backprop(None)),
    "memory-free": (DOPRI8, jode.MemoryFree()),
    "fixed": (EQUAL, jode.Backprop()),
    "fixed, four checkpoints": (EQUAL, jode.Backprop(4)),
    "fixed, memory-free": (EQUAL, jode.MemoryFree()),
    "fixed, traced steps": (jode.Fixed(jode.dopri8, jnp.array(20), max_steps=24), jode.Backprop()),
}


LONG = ("dopri8", "all stored", "fixed, memory-free", "fixed, four checkpoints")


@pytest.mark.parametrize(
    ("case", "ts"),
    [
        *(pytest.param(case, (0.0, 2.0), marks=[pytest.mark.sweep] if case in LONG else []) for case in CASES),
        *((case, (2.0, 0.0)) for case in ("tsit5", "fixed, four checkpoints")),
    ],
    ids=lambda x: x if isinstance(x, str) else "on" if x[0] == 0 else "back",
)
def test_derivatives_at_any_time_are_those_of_the_matrix_exponential(case, ts):
    solver, adjoint = CASES[case]
    at = lambda a, y0, t: jode.solve(linear, y0, ts, a, solver=solver, adjoint=adjoint, observe=jode.Dense(256)).observed(t)
    loss = lambda *x: jnp.sum(at(*x) ** 2)
    got, forward = jax.jit(lambda *x: (jax.grad(loss, (0, 1, 2))(*x), jax.jacfwd(loss, (0, 1, 2))(*x)))(*X)
    want, curved = of_the_exponential(ts[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), got, want)
    # by the inverses of Runge-Kutta steps gradients are as exact as the steps
    atol = 1e-10 if adjoint == jode.MemoryFree() and solver.method == jode.dopri8 else 1e-12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, forward)
    if case in ("tsit5", "memory-free", "fixed"):  # by t twice: the interpolant of tsit5 has error h⁵, this h³
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), jax.jit(second(loss))(*X), curved)


@pytest.mark.parametrize(
    "solver",
    [
        jode.Adaptive(jode.bosh3, 1e-7, 1e-7),
        jode.Adaptive(jode.reversible_heun, 1e-7, 1e-7),
        jode.Fixed(jode.reversible_heun, 200),
        jode.Fixed(jode.leapfrog, 200),
        jode.Fixed(jode.rk4, 10),
        jode.Fixed(jode.Reversible(jode.tsit5), 10),
    ],
    ids=repr,
)
def test_reverse_and_forward_mode_agree_for_every_kind_of_method(solver):
    """Steps too: a loss of both at once."""

    def loss(a, y0, t, t1):
        both = (jode.Dense(), jode.Steps())
        p, steps = jode.solve(linear, y0, jnp.stack([0.0, 0.5, t1]), a, solver=solver, observe=both).observed
        return jnp.sum(p(t) ** 2) + jnp.sum(steps.ys[:5] ** 2) + jnp.sum(steps.ts[:5] ** 2)

    x = (A, Y0, 0.7, 1.5)
    got, want = jax.jit(lambda *x: (jax.grad(loss, (0, 1, 2, 3))(*x), jax.jacfwd(loss, (0, 1, 2, 3))(*x)))(*x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("solver", [TSIT5, EQUAL], ids=["adaptive", "fixed"])
def test_rows_have_polynomials_of_their_own(solver):
    ks, y0, times = jnp.linspace(0.5, 2, 5), jnp.linspace(1, 2, 5), jnp.linspace(0.1, 0.9, 5)
    f = lambda t, y, k: -k * y
    dense = lambda k, y0: jode.solve(f, y0, (0.0, 1.0), k, solver=solver, observe=jode.Dense(64)).observed
    at = lambda k, y0, t: dense(k, y0)(t)
    rows = jax.jit(lambda ks, y0, t: jax.vmap(lambda p, t: p(t))(jax.vmap(dense)(ks, y0), t))(ks, y0, times)
    np.testing.assert_allclose(rows, y0 * jnp.exp(-ks * times), rtol=0, atol=1e-10)
    inside = jax.jit(jax.grad(lambda *x: jnp.sum(jax.vmap(at)(*x) ** 2), (0, 1, 2)))(ks, y0, times)
    outside = jax.jit(jax.vmap(jax.grad(lambda *x: at(*x) ** 2, (0, 1, 2))))(ks, y0, times)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), inside, outside)
    shared = jax.jit(jax.grad(lambda k: jnp.sum(jax.vmap(at, (None, 0, 0))(k, y0, times) ** 2)))(0.8)
    np.testing.assert_allclose(shared, jnp.sum(-2 * times * (y0 * jnp.exp(-0.8 * times)) ** 2), rtol=0, atol=1e-8)


def test_the_solution_leaves_jit_as_a_pytree():
    run = jax.jit(lambda y0: jode.solve(linear, y0, (0.0, 2.0), A, solver=TSIT5, observe={"p": [jode.Dense()]}).observed)
    p = run(Y0)["p"][0]
    times = jnp.array([[0.0, 0.7], [1.3, 2.0]])
    want = jax.jit(jax.vmap(jax.vmap(lambda t: expm(A * t) @ Y0)))(times)
    for found in (p(times), jax.jit(lambda p, t: p(t))(p, times), jax.tree.map(lambda x: x + 0, p)(times)):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ts", [(0.0, 1.0), (1.0, 0.0)], ids=["on", "back"])
@pytest.mark.parametrize("solver", [TSIT5, jode.Fixed(jode.rk4, 7)], ids=["adaptive", "fixed"])
def test_outside_of_the_interval_there_is_no_number(solver, ts):
    f = lambda t, y, k: -k * y
    at = np.array([-1e-6, 0.5, 1 + 1e-6])

    @jax.jit
    def values_and_slopes(k):
        values, back = jax.vjp(lambda k: jode.solve(f, 1.0, ts, k, solver=solver, observe=jode.Dense()).observed(at), k)
        return values, *(back(jax.grad(g)(values))[0] for g in (lambda v: v[1], jnp.nansum, jnp.sum))

    values, alone, masked, raw = values_and_slopes(jnp.float64(0.8))
    np.testing.assert_array_equal(np.isnan(values), [True, False, True])
    assert alone == masked
    assert np.isnan(raw)


@pytest.mark.parametrize("solver", [TSIT5, jode.Fixed(jode.rk4, 7), jode.Layers(jode.heun)], ids=["adaptive", "fixed", "layers"])
def test_the_solution_meets_save_times_and_the_ends_of_steps(solver):
    args = jnp.tile(A, (9, 1, 1)) if solver.layered else A
    ts = jnp.array([0.0, 2.0]) if solver.layered else jnp.array([0.0, 0.3, 0.31, 1.1, 2.0])
    sol = jode.solve(linear, Y0, ts, args, solver=solver, observe=(jode.Dense(), jode.Steps()))
    (p, steps), at = sol.observed, jax.jit(lambda p, t: p(t))
    n, ends, states = int(steps.count), np.array(steps.ts), np.array(steps.ys)
    assert n == sol.stats.accepted
    np.testing.assert_allclose(at(p, ts), sol.ys, rtol=0, atol=4e-15)
    np.testing.assert_allclose(at(p, ends[:n]), states[:n], rtol=0, atol=4e-15)
    assert np.isnan(ends[n:]).all()
    assert np.isnan(states[n:]).all()
    assert ends[n - 1] == ts[-1]


def test_equal_steps_are_those_of_a_hand_loop_bit_for_bit():
    n, h, y = 8, 0.25, Y0  # powers of two: no rounding in the times
    a, b, c, d = (jode.rk4.tableau.b[i] for i in range(4))

    @users_jit
    def step(t, y):
        k1 = linear(t, y, A)
        k2 = linear(t, y + h * (0.5 * k1), A)
        k3 = linear(t, y + h * (0.5 * k2), A)
        k4 = linear(t, y + h * k3, A)
        return y + h * (a * k1 + b * k2 + c * k3 + d * k4)

    states = []
    for i in range(n):
        y = step(i * h, y)
        states.append(y)
    solver, saves = jode.Fixed(jode.rk4, n), jnp.linspace(0.0, 2.0, n + 1)
    steps = users_jit(lambda: jode.solve(linear, Y0, (0.0, 2.0), A, solver=solver, observe=jode.Steps()).observed)()
    np.testing.assert_array_equal(steps.ts, h * np.arange(1, n + 1))
    np.testing.assert_array_equal(steps.ys, states)
    saved = users_jit(lambda: jode.odeint(linear, Y0, saves, A, solver=jode.Fixed(jode.rk4, 1)))()
    np.testing.assert_array_equal(steps.ys, saved[1:])


def test_layers_are_steps_and_their_weights_have_gradients():
    w = 0.3 * jax.random.normal(jax.random.key(0), (7, 3, 3))
    layer = lambda t, x, w: jnp.tanh(w @ x)

    def by_hand(w):
        x, xs = jnp.ones(3), []
        for i in range(7):
            xs.append(x := x + layer(0, x, w[i]) / 7)
        return jnp.stack(xs)

    sol = lambda w: jode.solve(
        layer, jnp.ones(3), (0.0, 1.0), w, solver=jode.Layers(jode.euler), observe=(jode.Dense(), jode.Steps())
    )
    np.testing.assert_allclose(*jax.jit(lambda w: (sol(w).observed[1].ys, by_hand(w)))(w), rtol=0, atol=1e-15)
    third = lambda states: jnp.sum(states[2] ** 2)
    for at in (lambda w: sol(w).observed[1].ys, lambda w: sol(w).observed[0](jnp.arange(1.0, 8.0) / 7)):
        got, want = jax.jit(lambda w, at=at: [jax.grad(lambda w: third(of(w)))(w) for of in (at, by_hand)])(w)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)


def test_a_table_that_is_too_small_says_so_and_harms_no_other_row():
    ks = jnp.array([0.5, 100.0])
    solver = jode.Adaptive(jode.tsit5, 1e-9, 1e-9)

    f = lambda t, y, k: -k * y
    run = jax.vmap(lambda k: jode.solve(f, 1.0, (0.0, 1.0), k, solver=solver, observe=(jode.Dense(40), jode.Steps(40))))

    def loss(ks, pick, shown):
        p, steps = run(ks).observed
        values = pick(jax.vmap(lambda p: p(0.3))(p), steps.ys[:, 1])
        return jnp.sum(jnp.where(shown, values, 0.0))

    sol = jax.jit(run)(ks)
    np.testing.assert_array_equal(sol.status, [jode.Status.success, jode.Status.capacity])
    assert sol.stats.accepted[1] > 40
    np.testing.assert_allclose(sol.ys[:, -1], jnp.exp(-ks), rtol=1e-7, atol=1e-9)  # the states are known all the same
    p, steps = sol.observed
    assert all(np.isnan(x[1]).all() for x in jax.tree.leaves((p.starts, p.widths, p.coefficients, steps.ts, steps.ys)))
    with pytest.raises(jode.SolveError, match=r"capacity.*larger capacity"):
        jode.check(sol)
    picks = (lambda dense, steps: dense), (lambda dense, steps: steps)
    first, both = np.array([True, False]), np.array([True, True])
    slopes = jax.jit(jax.grad(loss), static_argnums=1)
    for pick in picks:
        alone, masked, raw = slopes(ks[:1], pick, both[:1]), slopes(ks, pick, first), slopes(ks, pick, both)
        np.testing.assert_allclose(masked, [alone[0], 0], rtol=1e-12)
        np.testing.assert_array_equal(np.isnan(raw), [False, True])
    shared = jax.jit(jax.grad(lambda c, shown: loss(c * ks, picks[0], shown)))
    np.testing.assert_allclose(shared(1.0, first), -0.15 * np.exp(-0.15), rtol=1e-6)
    assert np.isnan(shared(1.0, both))


@pytest.mark.parametrize("solver", [jode.Adaptive(jode.tsit5, 1e-6, 1e-6), jode.Fixed(jode.rk4, 60)], ids=["adaptive", "fixed"])
def test_beyond_a_failure_there_is_no_number(solver):
    """y' = a y²: y(t) = y0 / (1 - a y0 t); the second row ends at t = 1."""
    f = lambda t, y, a: a * y**2

    def values(a, y0, t):
        sol = jax.vmap(lambda y: jode.solve(f, y, (0.0, 0.6, 2.0), a, solver=solver, observe=jode.Dense(400)))(y0)
        return sol.status, jax.vmap(lambda p: p(t))(sol.observed)

    @jax.jit
    def slopes(a, y0, t, known):
        """By a and y0 of the sum of values, of all or of those that are known."""
        kept = lambda x: jnp.where(jnp.isnan(x) & known, 0.0, x)
        return jax.grad(lambda a, y0: jnp.sum(kept(values(a, y0, t)[1])), (0, 1))(a, y0)

    x = (jnp.float64(1.0), jnp.array([0.1, 1.0]))
    status, at = jax.jit(values)(*x, jnp.array([0.5, 1.5]))
    np.testing.assert_array_equal(status == jode.Status.success, [True, False])
    np.testing.assert_array_equal(np.isnan(at), [[False, False], [False, True]])
    np.testing.assert_allclose(at[:, 0], x[1] / (1 - 0.5 * x[1]), rtol=1e-5)
    early = slopes(*x, 0.5, False)
    np.testing.assert_allclose(early[1], 1 / (1 - 0.5 * x[1]) ** 2, rtol=1e-4)
    np.testing.assert_allclose(early[0], jnp.sum(0.5 * x[1] ** 2 / (1 - 0.5 * x[1]) ** 2), rtol=1e-4)
    late = slopes(*x, 1.5, True)
    np.testing.assert_allclose(late[0], 1.5 * 0.1**2 / 0.85**2, rtol=1e-4)
    np.testing.assert_allclose(late[1], [1 / 0.85**2, 0], rtol=1e-4)
    raw = slopes(*x, 1.5, False)
    assert np.isnan(raw[0])
    np.testing.assert_array_equal(np.isnan(raw[1]), [False, True])


def test_a_solve_that_never_starts_has_no_steps():
    sol = jode.solve(lambda t, y, a: jnp.log(-y), 1.0, (0.0, 1.0), observe=(jode.Dense(), jode.Steps()))
    assert sol.status == jode.Status.nonfinite_dynamics
    assert sol.observed[1].count == 0
    assert np.isnan(sol.observed[0](jnp.array([0.0, 0.5]))).all()


@pytest.mark.parametrize("solver", [jode.Adaptive(jode.tsit5, 1e-6, 1e-6), jode.Fixed(jode.rk4, 30)], ids=["adaptive", "fixed"])
def test_leaves_of_different_dtypes_keep_theirs(solver):
    y0 = {
        "half": jnp.ones(2, jnp.float16),
        "single": jnp.ones((3, 1), jnp.float32),
        "double": jnp.ones(()),
        "z": jnp.ones(2, complex),
    }
    f = lambda t, y, a: jax.tree.map(lambda x: -x, y)
    p, steps = jode.solve(f, y0, (0.0, 1.0), solver=solver, observe=(jode.Dense(), jode.Steps())).observed
    kept, half = jax.tree.map(lambda x: (x.dtype, x.shape), y0), jax.jit(lambda p: p(0.5))(p)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), half) == kept
    assert jax.tree.map(lambda x: (x.dtype, x.shape[1:]), steps.ys) == kept
    for name, x in half.items():
        np.testing.assert_allclose(x, np.full(x.shape, np.exp(-0.5)), rtol=2e-3 if name == "half" else 2e-6)


@dataclass(frozen=True)
class Largest(jode.Observer):
    def init(self, t, y, args):
        return y["a"]

    def step(self, kept, t, y, args):
        return jnp.maximum(kept, y["a"])


@pytest.mark.parametrize("solver", [TSIT5, EQUAL], ids=["adaptive", "fixed"])
def test_observers_stand_beside_one_another_in_any_pytree(solver):
    """y = c sin t, its largest value among the ends of steps, its polynomial and its steps."""
    f = lambda t, y, c: {"a": c * jnp.cos(t), "b": -y["b"]}

    def run(c):
        y0 = {"a": jnp.zeros(()), "b": jnp.ones(2)}
        return jode.solve(f, y0, (0.0, 3.0), c, solver=solver, observe={"most": Largest(), "p": jode.Dense(), "s": [jode.Steps()]})

    seen, at = jax.jit(lambda c: (o := run(c).observed, o["p"](2.0)["a"]))(1.5)
    assert seen["most"] == np.nanmax(seen["s"][0].ys["a"])
    np.testing.assert_allclose(at, 1.5 * np.sin(2.0), rtol=0, atol=1e-9)
    loss = lambda c: (o := run(c).observed)["most"] + 10 * o["p"](2.0)["a"] + 100 * o["s"][0].ys["a"][2]
    want = seen["most"] / 1.5 + 10 * np.sin(2.0) + 100 * seen["s"][0].ys["a"][2] / 1.5
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(1.5), want, rtol=0, atol=1e-8)


def test_grids_found_again_in_chapters_have_their_polynomials():
    """More than the 256 steps that are recorded at once, in a batch too large for one table: y' = -k y cos 20 t."""
    solver, ks = jode.Adaptive(jode.bosh3, 1e-8, 1e-8), jnp.linspace(0.5, 2, 16)
    f = lambda t, y, k: -k * y * jnp.cos(20 * t)
    times = jnp.array([0.1, 1.0, 2.9])
    exact = lambda k: jnp.exp(-k * jnp.sin(20 * times) / 20)
    sol = lambda k: jode.solve(f, 1.0, (0.0, 3.0), k, solver=solver, observe=jode.Dense(3000))
    batch = jax.vmap(sol)(ks)
    assert batch.stats.accepted.min() > 600
    loss = lambda f, ks: jnp.sum(jax.vmap(f)(ks) ** 2)
    got, want = (jax.jit(jax.grad(lambda ks, f=f: loss(f, ks)))(ks) for f in (lambda k: sol(k).observed(times), exact))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    one = jax.jit(jax.grad(lambda k: jnp.sum(sol(k).observed(times) ** 2)))(ks[3])
    np.testing.assert_allclose(got[3], one, rtol=1e-11)


@pytest.mark.parametrize("solver", [TSIT5, jode.Fixed(jode.dopri8, 8)], ids=["adaptive", "fixed"])
def test_at_a_jump_the_solution_is_the_state_before_it(solver):
    times, amounts = jnp.array([0.0, 0.4, 0.7]), jnp.array([1.0, 2.0, 3.0])
    add = lambda t, y, k, x: y + x
    f, observe = lambda t, y, k: -k * y, (jode.Dense(), jode.Steps())
    run = lambda k, times, xs: jode.solve(f, 1.0, (0.0, 0.7, 1.0), k, solver=solver, jumps=(times, add, xs), observe=observe)
    exact = lambda k, times, xs, t: jnp.exp(-k * t) + jnp.sum(jnp.where(times < t, xs * jnp.exp(-k * (t - times)), 0))
    sol = run(1.3, times, amounts)
    (p, steps), at = sol.observed, np.array([0.4, 0.7, 0.0, *(times + 1e-9)])
    found, want = jax.jit(lambda p, at: (p(at), jax.vmap(lambda t: exact(1.3, times, amounts, t))(at)))(p, at)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found[1], sol.ys[1], rtol=0, atol=1e-13)  # dopri8's coefficients are hundreds of times their sum
    ends = np.array(steps.ts)
    nearest = np.nanargmin(np.abs(ends - 0.4))
    assert ends[nearest] == 0.4
    np.testing.assert_allclose(steps.ys[nearest], found[0], rtol=0, atol=1e-13)
    value = lambda *x: run(*x[:3]).observed[0](x[3])
    x = (1.3, times[1:], amounts[1:], 0.9)
    start = lambda k, times, xs, t: value(k, jnp.concatenate([jnp.zeros(1), times]), jnp.concatenate([jnp.ones(1), xs]), t)
    true = lambda k, times, xs, t: exact(k, times, xs, t) + jnp.exp(-k * t)
    by_all = lambda derivative, f: jax.jit(derivative(f, (0, 1, 2, 3)))(*x)
    got, want, forward = by_all(jax.grad, start), by_all(jax.grad, true), by_all(jax.jacfwd, start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, forward)


def test_wrong_use_is_refused_in_words():
    solve = lambda **kw: jode.solve(lambda t, y, a: -y, 1.0, (0.0, 1.0), **kw)
    for observer in (jode.Dense, jode.Steps):
        with pytest.raises(ValueError, match=r"Backsolve .*: use jode.Backprop"):
            solve(observe=observer(), adjoint=jode.Backsolve())
        for capacity in (0, -1, True, 2.5):
            with pytest.raises(ValueError, match="capacity must be a positive int or None"):
                observer(capacity)
        with pytest.raises(ValueError, match=r"give \w+\(capacity=...\) or Fixed\(..., max_steps=bound\)"):
            solve(observe=observer(), solver=jode.Fixed(jode.rk4, jnp.array(4)))
    with pytest.raises(TypeError, match=r"observe must be a jode\.Observer, jode\.Steps\(\) or the like"):
        solve(observe=[jode.Dense(), jode.Dense])
    traced = solve(observe=jode.Steps(9), solver=jode.Fixed(jode.rk4, jnp.array(4)))
    assert traced.observed.count == 4


def test_where_equal_steps_fail_the_whole_interval_is_unknown():
    """They are judged by save times, as `Solution.reached` says: y' = y², y(0) = 1, ends at t = 1."""
    f = lambda t, y, a: y**2
    at = lambda y, t: jode.solve(f, y, (0.0, 0.2, 2.0), solver=jode.Fixed(jode.rk4, 100), observe=jode.Dense()).observed(t)
    np.testing.assert_array_equal(np.isnan(jax.jit(at)(1.0, np.array([0.1, 0.2, 0.5]))), [False, False, True])
    slope = jax.jit(jax.grad(at))
    np.testing.assert_allclose(slope(1.0, 0.1), 1 / 0.9**2, rtol=1e-6)
    assert np.isnan(slope(1.0, 0.5))
