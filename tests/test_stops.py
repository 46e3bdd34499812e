"""Stops, where f jumps, and jumps, where the state is reset: right in value, in every derivative, in batches, at the price of the
pieces.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode

FINE = jode.Adaptive(jode.tsit5, 1e-11, 1e-13)
SOLVERS = {
    "tsit5": FINE,
    "dopri8": jode.Adaptive(jode.dopri8, 1e-11, 1e-13),
    "reversible": jode.Adaptive(jode.Reversible(jode.dopri8), 1e-11, 1e-13),
    "fixed": jode.Fixed(jode.dopri8, 12),
}
TIMES, AMOUNTS = jnp.array([0.0, 0.5, 1.2, 1.2, 3.0, jnp.inf, -1.0]), jnp.array([1.0, 2.0, 3.0, 0.5, 9.0, 9.0, 9.0])
TS = jnp.array([0.0, 0.3, 1.2, 2.0, 3.0])


def decay(t, y, k):
    return -k * y


def add(t, y, k, x):
    return y + x


def doses(solver, k, y0, times, amounts, ts=TS, adjoint=jode.Backprop()):
    return jode.solve(decay, y0, ts, k, solver=solver, adjoint=adjoint, jumps=(times, add, amounts))


def after_doses(t, k, y0, times, amounts):
    """Those before t apply, and those at ts[0]."""
    given = ((times < t) & (times >= 0)) | ((times == 0) & (t > 0))
    gone = jnp.where(given, amounts * jnp.exp(-k * (t - jnp.where(given, times, 0))), 0)
    return y0 * jnp.exp(-k * t) + jnp.sum(gone)


@pytest.mark.parametrize(
    "solver", [pytest.param(s, id=k, marks=[pytest.mark.sweep] if k == "dopri8" else []) for k, s in SOLVERS.items()]
)
def test_doses_are_the_closed_form_and_so_are_their_gradients(solver):
    """Doses at the start, at a save time, two at once, at the end (does not apply), never, and before the start."""
    x = (1.3, 0.7, TIMES, AMOUNTS)
    sol = jode.check(doses(solver, *x))
    # at 1.2 two doses coincide with a save time: what is later than that has smooth derivatives
    loss = lambda *x: jnp.sum(doses(solver, *x).ys[3:] ** 2)
    exact = lambda *x: sum(after_doses(t, *x) ** 2 for t in TS[3:])
    by_all = lambda derivative, f: jax.jit(derivative(f, (0, 1, 2, 3)))(*x)
    np.testing.assert_allclose(sol.ys, jax.jit(jax.vmap(lambda t: after_doses(t, *x)))(TS), rtol=0, atol=2e-10)
    got, want, forward = by_all(jax.grad, loss), by_all(jax.grad, exact), by_all(jax.jacfwd, loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-8), got, want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), got, forward)


RATES = jnp.array([[-0.9, 0.3], [0.5, -0.3]])  # elimination 0.4 and exchange between blood and tissue


def two_compartments(t, rates, times, amounts):
    """Amounts in blood and tissue at t, by eigenvectors: each dose into the blood decays from its time on."""
    d = jnp.sqrt((rates[0, 0] - rates[1, 1]) ** 2 + 4 * rates[0, 1] * rates[1, 0])
    trace = rates[0, 0] + rates[1, 1]
    slow, fast = (trace + d) / 2, (trace - d) / 2
    since = jnp.where(times < t, t - times, 0)
    given = jnp.where(times < t, amounts, 0)
    a, b = given * jnp.exp(slow * since), given * jnp.exp(fast * since)  # exp(M t) = Σ exp(λ t) (M - other λ) / (λ - other λ)
    blood = jnp.sum(a * (rates[0, 0] - fast) - b * (rates[0, 0] - slow)) / d
    return jnp.stack([blood, jnp.sum(a - b) * rates[1, 0] / d])


@pytest.mark.parametrize(
    "solver", [jode.Adaptive(jode.dopri8, 1e-12, 1e-13), jode.Fixed(jode.dopri8, 12)], ids=["adaptive", "fixed"]
)
def test_twelve_doses_into_two_compartments_are_the_matrix_exponential(solver):
    times, amounts = 6.0 * jnp.arange(12.0) + 0.3 * jnp.sin(jnp.arange(12.0)), 1.0 + 0.1 * jnp.arange(12.0)
    ts = jnp.linspace(-1.0, 75.0, 20)

    def solved(times, amounts):
        dose = lambda t, y, rates, x: y.at[0].add(x)
        return jode.odeint(lambda t, y, rates: rates @ y, jnp.zeros(2), ts, RATES, solver=solver, jumps=(times, dose, amounts))

    exact = lambda times, amounts: jax.vmap(lambda t: two_compartments(t, RATES, times, amounts))(ts)
    np.testing.assert_allclose(jax.jit(solved)(times, amounts), jax.jit(exact)(times, amounts), rtol=0, atol=1e-10)
    weights = jnp.cos(jnp.arange(40.0)).reshape(20, 2)
    got, want = (jax.jit(jax.grad(lambda *x, f=f: jnp.sum(weights * f(*x) ** 2), (0, 1)))(times, amounts) for f in (solved, exact))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), got, want)


@pytest.mark.parametrize("solver", [FINE, SOLVERS["fixed"]], ids=["adaptive", "fixed"])
def test_rows_have_schedules_of_their_own(solver):
    key = jax.random.key(0)
    n = 37
    times = jnp.sort(jax.random.uniform(key, (n, 5), float, 0.0, 3.4), axis=1)
    k, y0 = jnp.linspace(0.5, 2, n), jnp.linspace(0.1, 1, n)  # a row at rest takes wide steps, and its derivative by y0 is coarse
    amounts = jax.random.uniform(jax.random.key(1), (5,))

    def loss(k, y0, times, amounts):
        ys = jax.vmap(lambda k, y0, times: doses(solver, k, y0, times, amounts).ys)(k, y0, times)
        return jnp.sum(ys[:, 1:] ** 2), ys

    def exact(k, y0, times, amounts):
        one = lambda k, y0, times: jnp.stack([after_doses(t, k, y0, times, amounts) for t in TS[1:]])
        return jnp.sum(jax.vmap(one)(k, y0, times) ** 2)

    (value, ys), got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(k, y0, times, amounts)
    alone = jax.jit(lambda *x: doses(solver, *x).ys)
    one = [alone(k[i], y0[i], times[i], amounts) for i in (0, n - 1)]
    np.testing.assert_allclose(np.array(ys)[[0, n - 1]], one, rtol=1e-9, atol=1e-11)
    true, want = jax.jit(jax.value_and_grad(exact, (0, 1, 2, 3)))(k, y0, times, amounts)
    np.testing.assert_allclose(value, true, rtol=1e-9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), got, want)


@pytest.mark.parametrize("solver", [jode.Adaptive(rtol=1e-10, atol=1e-10), SOLVERS["fixed"]], ids=["adaptive", "fixed"])
def test_rows_that_share_a_schedule_have_gradients(solver):
    end = lambda y0, T: doses(solver, 1.3, y0, T[None], jnp.ones(1), ts=(0.0, 1.0)).ys[-1]
    slopes = jax.vmap(jax.grad(end, (0, 1)), (0, None))(jnp.array([0.7, 0.1]), jnp.float64(0.5))
    np.testing.assert_allclose(slopes[0], np.exp(-1.3), rtol=1e-8)
    np.testing.assert_allclose(slopes[1], 1.3 * np.exp(-0.65), rtol=1e-8)


EQUAL, FOUND = jode.Fixed(jode.dopri8, 12), jode.Adaptive(jode.dopri8, 1e-12, 1e-12)
CASES = [(a, s) for a in (jode.Backprop(None), jode.Backprop(4), jode.MemoryFree()) for s in (EQUAL, FOUND)]
CASES += [(jode.MemoryFree(), replace(s, method=jode.Reversible(jode.dopri8))) for s in (replace(EQUAL, steps=40), FOUND)]


def pendulum(t, y, a):
    return jnp.stack([y[1], -a * jnp.sin(y[0])])


def kick(t, y, a, x):
    return jnp.stack([y[0], x * jnp.cos(t) * y[0] - 0.3 * y[1] ** 2])


KICKS = 1.1, jnp.array([0.7, 1.9, 2.5]), jnp.array([0.4, -0.8, 0.3])


@cache
def kicked_by_hand():
    """Derivatives of the sum of squares at 1 and 4, solved piece by piece."""

    def pieces(a, times, xs):
        y, t, total = jnp.array([1.0, 0.2]), jnp.zeros(()), 0.0
        for end, x in [(times[0], xs[0]), (jnp.ones(()), None), (times[1], xs[1]), (times[2], xs[2]), (4 * jnp.ones(()), None)]:
            y = jode.odeint(pendulum, y, jnp.stack([t, end]), a, solver=jode.Adaptive(jode.dopri8, 1e-13, 1e-13))[-1]
            total, t = total + (jnp.sum(y**2) if x is None else 0), end
            y = y if x is None else kick(end, y, a, x)
        return total

    return jax.jit(jax.grad(pieces, (0, 1, 2)))(*KICKS)


@pytest.mark.parametrize("adjoint, solver", CASES, ids=repr)
def test_every_discrete_adjoint_goes_back_through_jumps(solver, adjoint):
    """A reset that loses information, between checkpoints and under inverse steps; found grids in chapters besides."""

    def loss(a, times, xs):
        ys = jode.odeint(
            pendulum, jnp.array([1.0, 0.2]), (0.0, 1.0, 4.0), a, solver=solver, adjoint=adjoint, jumps=(times, kick, xs)
        )
        return jnp.sum(ys[1:] ** 2)

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(*KICKS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-8), got, kicked_by_hand())


@pytest.mark.parametrize("method", [jode.dopri5, jode.Reversible(jode.bosh3)], ids=repr)
@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 40), jode.Adaptive(rtol=1e-8, atol=1e-8)], ids=["fixed", "adaptive"])
def test_inverse_steps_start_from_what_was_before_each_jump(solver, method):
    """Beside jumps that never come, times that an observer looks at, and events within steps that end at a jump."""
    times, xs = jnp.array([jnp.inf, 0.7, 1.9]), jnp.array([9.0, 2.0, 3.0])
    solver = replace(solver, method=method)

    def seen(k, times, xs, adjoint, event):
        observe = [jode.At([0.2, 0.6], lambda t, y, k: y[0]), *([event] if event else [])]
        options = {"solver": solver, "adjoint": adjoint, "observe": observe, "jumps": (times, add, xs)}
        sol = jode.solve(decay, jnp.array([1.0, 0.5]), (0.0, 2.5), k, **options)
        at, *crossing = sol.observed
        return jnp.sum(at**2) + (crossing[0].t if event else jnp.sum(sol.ys[-1] ** 2))

    for event in (None, jode.Event(lambda t, y, k: y[0] - jnp.exp(-0.69 * k), direction=-1)):
        x = (1.3, times, xs)
        gradient = jax.jit(jax.grad(seen, (0, 1, 2)), static_argnums=(3, 4))
        got, want = gradient(*x, jode.MemoryFree(), event), gradient(*x, jode.Backprop(), event)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), got, want)


@pytest.mark.parametrize("solver", [jode.Adaptive(), jode.Fixed(jode.rk4, 3)], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd], ids=["grad", "jacfwd"])
def test_between_a_stop_and_an_equal_jump_f_is_what_it_is_after_the_stop(solver, derivative):
    """y' = a before S and b after it, y doubles at T: y(1) = 2 (a S + b (T - S)) + b (1 - T) for S <= T."""

    def end(S, T):
        f = lambda t, y, S: jnp.where(t < S, 2.0, -3.0)
        return jode.odeint(f, 0.0, (0.0, 1.0), S, solver=solver, stops=S[None], jumps=(T[None], lambda t, y, S: 2 * y))[-1]

    got = derivative(end, (0, 1))(jnp.float64(0.37), jnp.float64(0.37))
    np.testing.assert_allclose(got, (2 * 5.0, -3.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("outer", [jax.jacfwd, pytest.param(jax.jacrev, marks=pytest.mark.sweep)], ids=["jacfwd", "jacrev"])
def test_second_derivatives_go_through_jumps(outer):
    x = (1.3, 0.7, TIMES[1:3], AMOUNTS[1:3])
    loss = lambda *x: doses(FINE, *x).ys[-1] ** 2
    exact = lambda *x: after_doses(TS[-1], *x) ** 2
    got, want = (jax.jit(second)(*x) for second in (outer(jax.grad(loss, (0, 2, 3)), (0, 2, 3)), jax.hessian(exact, (0, 2, 3))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), got, want)


def test_grids_found_again_in_chapters_have_their_jumps():
    """More than the 256 steps that are recorded at once, in a batch too large for one table."""
    times, solver = jnp.linspace(0.05, 2.9, 40), jode.Adaptive(jode.bosh3, 1e-9, 1e-10)
    k, amounts = jnp.linspace(0.5, 2, 16), jnp.ones(40)
    ends = lambda k, times: jax.vmap(lambda k: doses(solver, k, 0.7, times, amounts, ts=(0.0, 3.0)).ys[-1])(k)
    exact = lambda k, times: jax.vmap(lambda k: after_doses(3.0, k, 0.7, times, amounts))(k)
    assert int(doses(solver, 2.0, 0.7, times, amounts).stats.steps) > 600
    got, want = (jax.jit(jax.grad(lambda k, times: jnp.sum(f(k, times) ** 2), (0, 1)))(k, times) for f in (ends, exact))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


def square(t, y, a):
    return jnp.where(jnp.floor(t) % 2 == 0, 1.0, -1.0) - a * y


def test_a_square_wave_costs_no_more_than_its_pieces_and_keeps_its_order():
    stops, ts = jnp.arange(1.0, 9.0), (0.0, 8.0)
    held = lambda t, y, a: a[1] - a[0] * y

    def exact(a):
        y = 0.0
        for i in range(8):
            u = 1.0 if i % 2 == 0 else -1.0
            y = (y - u / a) * np.exp(-a) + u / a
        return y

    errors = []
    for tol in (1e-6, 1e-9):
        solver = jode.Adaptive(jode.tsit5, tol, tol)
        sol = jode.solve(square, 0.0, ts, 0.8, solver=solver, stops=stops)
        errors.append(abs(float(sol.ys[-1]) - exact(0.8)))
        pieces, y = 0, 0.0
        for i in range(8):
            u = 1.0 if i % 2 == 0 else -1.0
            piece = jode.solve(held, y, np.array([i, i + 1.0]), (0.8, u), solver=solver)
            pieces, y = pieces + int(piece.stats.nfe), piece.ys[-1]
        plain = jode.solve(square, 0.0, ts, 0.8, solver=solver)
        assert int(sol.stats.nfe) <= min(pieces, int(plain.stats.nfe))
        assert errors[-1] < 10 * tol
        assert abs(float(plain.ys[-1]) - exact(0.8)) < 1e3 * tol
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "solver", [jode.Adaptive(), jode.Fixed(jode.rk4, 3), jode.Fixed(jode.dopri5, 1)], ids=["adaptive", "rk4", "dopri5"]
)
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd], ids=["grad", "jacfwd"])
def test_the_time_of_a_stop_has_a_gradient(solver, derivative):
    """y' = a before T and b after: dy(1)/dT = a - b."""
    f = lambda t, y, p: jnp.where(t < p[2], p[0], p[1])
    end = lambda T, ts: jode.odeint(f, 0.0, ts, jnp.stack([2.0, -3.0, T]), solver=solver, stops=T[None])[-1]
    slope, ts = jax.jit(derivative(end)), np.array([0.0, 1.0])
    np.testing.assert_allclose(slope(0.37, ts), 5.0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(slope(0.37, ts[::-1]), -5.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [jode.Adaptive(), jode.Fixed(jode.rk4, 3)], ids=["adaptive", "fixed"])
def test_a_solve_over_no_time_has_the_slope_at_a_stop_for_its_derivative(solver):
    end = lambda t: jode.odeint(decay, 1.0, jnp.stack([jnp.ones(()), t]), 1.3, solver=solver, stops=[1.0])[-1]
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(derivative(end)(jnp.float64(1.0)), -1.3, rtol=1e-14)


@pytest.mark.parametrize("way", [1, -1], ids=["on", "back"])
def test_an_input_held_between_its_knots_is_solved_to_the_order_of_the_method(way):
    knots = jnp.linspace(0.0, 2.0, 9)
    values = jnp.sin(5 * knots)
    held = lambda t: values[jnp.searchsorted(knots, t, side="right") - 1]
    f = lambda t, y, a: held(t) - y
    y, exact = 1.0, [1.0]
    for i in range(8):
        u = values[i] if way == 1 else values[7 - i]
        y = (y - u) * np.exp(-way * 0.25) + u
        exact.append(y)
    ys = jode.odeint(f, 1.0, knots[::way], solver=jode.Fixed(jode.dopri5, 1), stops=knots)
    np.testing.assert_allclose(ys, exact, rtol=0, atol=1e-5)
    off = jode.odeint(f, 1.0, knots[::way], solver=jode.Fixed(jode.dopri5, 1))
    assert np.max(np.abs(off - jnp.stack(exact))) > 1e-3


SIDES = {"from the left": lambda t, T: t > T, "from the right": lambda t, T: t >= T}
SEEN = {
    "euler": jode.Fixed(jode.euler, 1),
    "rk4": jode.Fixed(jode.rk4, 3),
    "adaptive": jode.Adaptive(),
    "rodas5p": jode.Adaptive(jode.rodas5p),
    "reversible": jode.Adaptive(jode.Reversible(jode.dopri5)),
    "leapfrog": jode.Fixed(jode.leapfrog, 2),
    "memory free": jode.Adaptive(jode.leapfrog),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("solver", SEEN)
def test_a_field_may_be_continuous_from_either_side(solver, side):
    """y' = a before S, b from there to T, c after it, and y + 1 at T; between save times, at one, and where the solve starts and ends."""
    later = SIDES[side]
    f = lambda t, y, a: jnp.where(later(t, a[4]), a[2], jnp.where(later(t, a[3]), a[1], a[0])) + 0 * y
    adjoint = jode.MemoryFree() if solver == "memory free" else jode.Backprop()

    def end(a, S, T, ts):
        given = {"stops": S[None], "jumps": (T[None], lambda t, y, a: y + 1)}
        return jode.odeint(f, 4.0, ts, a, solver=SEEN[solver], adjoint=adjoint, **given)

    @jax.jit
    def both(S, T, ts):
        a = jnp.stack([2.0, -3.0, 5.0, S, T])
        solve = lambda S, T: end(a, S, T, ts)
        return solve(S, T), jax.vjp(solve, S, T)[1](jnp.array([0.0, 0.0, 1.0])), jax.jvp(lambda a: end(a, S, T, ts), (a,), (a,))[1]

    rows = jnp.array([[0.3, 0.7], [0.5, 0.7], [0.3, 0.5], [0.0, 0.5], [0.0, 1.0], [-1.0, 0.0], [-0.25, 0.0], [0.3, 1.0]])
    for ts in (jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 0.5, 0.0]), jnp.array([-0.5, 0.5, 1.0])):
        ys, slopes, moved = jax.vmap(both, (0, 0, None))(*rows.T, ts)
        sign = 1 if ts[-1] > ts[0] else -1
        for i, (S, T) in enumerate(rows):
            F = lambda t, S=S, T=T: 2 * jnp.minimum(t, S) - 3 * (jnp.clip(t, S, T) - S) + 5 * (jnp.maximum(t, T) - T)
            jumped = (sign * (ts - T) > 0) & (sign * (T - ts[0]) >= 0)
            np.testing.assert_allclose(
                ys[i] - 4, F(ts) - F(ts[0]) + jumped.astype(float), rtol=0, atol=1e-12, err_msg=f"{ts} {S} {T}"
            )
            np.testing.assert_allclose(moved[i], F(ts) - F(ts[0]), rtol=0, atol=1e-12)
            inside = [min(ts[0], ts[-1]) < x < max(ts[0], ts[-1]) for x in (S, T)]
            want = [sign * x for x in (5.0, -8.0)]
            for got, slope, known in zip(slopes, want, inside, strict=True):
                if known:
                    np.testing.assert_allclose(got[i], slope, rtol=0, atol=1e-12)


def test_a_stop_at_time_zero_separates_what_is_before_and_after():
    f = lambda t, y, a: jnp.where(t < 0, 1.0, 100.0)
    for solver in (jode.Adaptive(), jode.Fixed(jode.dopri5, 1)):
        ys = jode.odeint(f, 0.0, (-1.0, 1.0), solver=solver, stops=[0.0])
        np.testing.assert_allclose(ys[-1], 101.0, rtol=1e-12)


def test_a_pytree_is_observed_through_jumps_by_a_function_with_constants():
    """What g closes over has a gradient too; what an observer keeps is of steps, and no jump touches it."""

    class Largest(jode.Observer):
        def init(self, t, y, args):
            return y["a"]

        def step(self, kept, t, y, args):
            return jnp.maximum(kept, y["a"])

    def solved(c):
        g = lambda t, y, args: {"a": y["a"] * c, "b": y["b"]}
        f = lambda t, y, args: {"a": -y["a"], "b": y["a"] * jnp.ones(2)}
        y0 = {"a": jnp.ones(()), "b": jnp.zeros(2)}
        return jode.solve(f, y0, (0.0, 1.0), solver=FINE, observe=Largest(), jumps=([0.5], g))

    sol = solved(3.0)
    np.testing.assert_allclose(sol.ys["a"][-1], 3 * np.exp(-1), rtol=1e-10)
    np.testing.assert_allclose(sol.ys["b"][-1], 1 - np.exp(-0.5) + 3 * (np.exp(-0.5) - np.exp(-1)), rtol=1e-9)
    assert 1 < float(sol.observed) < 3 * np.exp(-0.5)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda c: solved(c).ys["a"][-1]))(3.0), np.exp(-1), rtol=1e-10)


def test_wrong_use_is_refused_in_words():
    f = lambda t, y, args: -y
    g = lambda t, y, args: 2 * y
    solve = lambda **kw: jode.solve(f, 1.0, (0.0, 1.0), **kw)
    with pytest.raises(TypeError, match="jumps must be"):
        solve(jumps=([0.5], 3.0))
    with pytest.raises(ValueError, match="stops must be a vector"):
        solve(stops=0.5)
    with pytest.raises(ValueError, match="must not be NaN"):
        solve(stops=[jnp.nan])
    with pytest.raises(ValueError, match="lead with an entry for each time"):
        solve(jumps=([0.5], g, jnp.ones(2)))
    with pytest.raises(ValueError, match=r"a list of numbers is a pytree"):
        solve(jumps=([0.5], g, [2.0]))
    with pytest.raises(TypeError) as error:
        solve(jumps=([0.5], lambda t, y, args, x: y))
    assert "the g of jumps" in error.value.__notes__[0]
    with pytest.raises(ValueError, match="Backsolve"):
        solve(stops=[0.5], adjoint=jode.Backsolve())
    with pytest.raises(TypeError, match=r"g\(t, y, args\) must return the structure"):
        solve(jumps=([0.5], lambda t, y, args: (y, y)))
    sol = jax.jit(lambda s: jode.solve(f, 1.0, (0.0, 1.0), stops=s))(jnp.array([jnp.nan]))
    assert sol.status == jode.Status.invalid_input
    assert np.isnan(sol.ys).all()


def test_a_field_that_fails_after_a_jump_says_so():
    f = lambda t, y, args: jnp.sqrt(y)
    for solver in (jode.Adaptive(), jode.Fixed(jode.rk4, 10)):
        run = lambda x, solver=solver: jode.solve(f, 1.0, (0.0, 0.2, 1.0), solver=solver, jumps=([0.5], lambda t, y, args, x: x, x))
        sol = jax.vmap(run)(jnp.array([[1.0], [-1.0]]))
        assert sol.status[0] == 0
        assert sol.status[1] != 0
        np.testing.assert_array_equal(np.isnan(sol.ys), [[False] * 3, [False, False, True]])


@pytest.mark.parametrize("method", [jode.tsit5, jode.reversible_heun], ids=str)
def test_rows_of_several_components_have_gradients_without_memory_beside_jumps(method):
    adjoint, jumps = jode.MemoryFree(), (jnp.array([0.5]), lambda t, y, a: y + 1)
    end = lambda y: jode.odeint(lambda t, y, a: -y, y, (0.0, 1.0), solver=jode.Adaptive(method), adjoint=adjoint, jumps=jumps)[-1]
    got = jax.vmap(jax.grad(lambda y: jnp.sum(end(y))))(jnp.ones((3, 2)))
    np.testing.assert_allclose(got, np.exp(-1.0), rtol=1e-4)
