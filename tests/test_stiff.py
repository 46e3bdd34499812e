"""Rosenbrock methods: orders, digits, gradients, the ways to solve their systems, and what happens where those fail."""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import jode
from jode.method.linear import inverse
from jode.models.kinetics import robertson
from tests.stiff import STIFF, brusselator, brusselator_start, solved, van_der_pol

METHODS = {"rodas5p": jode.rodas5p, "rosenbrock23": jode.rosenbrock23}
RATES = jnp.array([0.04, 3e7, 1e4])


def wavy(t, y, a):
    """Neither linear nor autonomous."""
    return jnp.stack([-a * y[0] ** 2 * jnp.cos(t) + y[1] * t, jnp.sin(y[0]) * y[1] - t])


Y0, TS, A = jnp.array([1.0, 0.5]), (0.0, 0.5, 1.2), 1.1


def by_hand(tableau, f, y, times, args):
    """The states after steps between the times, by the formula as it is published: (I/(hγ) - J) u_i = f_i + Σ C_ij u_j / h + h d_i T."""

    def step(y, span):
        t, t1 = span
        h = t1 - t
        J, T = jax.jacfwd(f, 1)(t, y, args), jax.jacfwd(f, 0)(t, y, args)
        us = []
        for c, d, a, C in zip(tableau.c, tableau.d, tableau.a, tableau.C, strict=True):
            slope = f(t + c * h, y + sum((w * u for w, u in zip(a, us, strict=True)), jnp.zeros_like(y)), args)
            r = slope + sum((w / h * u for w, u in zip(C, us, strict=True)), jnp.zeros_like(y)) + h * d * T
            us.append(jnp.linalg.solve(jnp.eye(len(y)) / (h * tableau.gamma) - J, r))
        y = y + sum(b * u for b, u in zip(tableau.b, us, strict=True))
        return y, y

    return jax.lax.scan(step, y, (times[:-1], times[1:]))[1]


# --- orders


@pytest.mark.parametrize(("name", "steps"), [("rodas5p", (8, 16, 32, 64)), ("rosenbrock23", (32, 64, 128, 256))])
@pytest.mark.parametrize("ts", [(0.0, 1.2), (1.2, 0.0)], ids=["forwards", "backwards"])
def test_observed_orders(name, steps, ts):
    method = METHODS[name]
    exact = jode.odeint(wavy, Y0, ts, A, solver=jode.Adaptive(jode.dopri8, 1e-13, 1e-13))[-1]
    run = jax.jit(lambda n: jode.odeint(wavy, Y0, ts, A, solver=jode.Fixed(method, n, max_steps=256))[-1])
    errors = [jnp.abs(run(n) - exact).max() for n in steps]
    slope = -np.polyfit(np.log2(steps), np.log2(errors), 1)[0]
    assert abs(slope - method.order) < 0.2


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_very_stiff_is_followed_with_steps_far_wider_than_its_time_scale(method):
    """Prothero & Robinson 1974: y' = λ (y - φ) + φ', φ = sin; order is lower here, and errors stay small for any λ."""
    run = jax.jit(
        lambda scale, n: jode.odeint(
            lambda t, y, a: -a * (y - jnp.sin(t)) + jnp.cos(t), 0.0, (0.0, 2.0), scale, solver=jode.Fixed(method, n, max_steps=64)
        )[-1]
    )
    for scale in (1e3, 1e6, 1e12):
        errors = [abs(run(scale, n) - np.sin(2)) for n in (16, 32, 64)]
        assert max(errors) < 1e-2
        assert errors[-1] < errors[0] or errors[0] < 1e-12


# --- digits

CASES = [(name, "rodas5p", tol) for name in STIFF for tol in (1e-4, 1e-6, 1e-8, 1e-10)]
CASES += [(name, "rosenbrock23", tol) for name in STIFF for tol in (1e-3, 1e-4, 1e-5)]
DAILY = {("robertson 40", "rodas5p"), ("hires", "rodas5p"), ("van der pol", "rodas5p"), ("robertson 40", "rosenbrock23")}


@pytest.mark.parametrize(
    ("name", "method", "tol"),
    [pytest.param(*c, marks=() if c[:2] in DAILY and c[2] >= 1e-6 else pytest.mark.sweep) for c in CASES],
)
def test_errors_are_within_a_hundred_tolerances_of_published_digits(name, method, tol):
    """Measured: at most 10 with rodas5p. The second order of rosenbrock23 adds up over the cycle of the Oregonator, 93 to 230, and at
    1e-3 rounding decides what is left of E5's invariant, 24 or 133.
    """
    bound = 300 if name in ("oregonator 360", "e5") and method == "rosenbrock23" else 100
    sol, error = solved(name, lambda rtol, atol: jode.Adaptive(METHODS[method], rtol, atol, max_steps=20_000), tol)
    assert sol.status == jode.Status.success
    assert error < bound
    stages = METHODS[method].tableau.stages
    assert sol.stats.nfe == stages * sol.stats.steps + 2
    assert sol.stats.jacobians == sol.stats.steps


# --- ways to solve the systems


def chain(t, y, a):
    """A stiff chain: component i sees its neighbours i - 1, i + 1 and i + 2 alone."""
    wide = jnp.pad(y, (1, 2))
    return a * (wide[:-3] - 2 * y + 0.5 * wide[2:-1] + 0.5 * wide[3:]) * 50 - y**3 + jnp.sin(t)


WAYS = {
    "dense": {},
    "jac": {"jac": jax.jacfwd(chain, 1)},
    "bands": {"bands": (1, 2)},
    "krylov": {"krylov": lx.GMRES(rtol=1e-13, atol=1e-13, restart=20, stagnation_iters=20)},
}


def chained(way, n):
    method = replace(jode.rodas5p, **WAYS[way])

    def run(y, a):
        return jode.solve(chain, y, (0.0, 0.4, 1.0), a, solver=jode.Adaptive(method, 1e-6, 1e-6))

    return run, jnp.sin(jnp.arange(1.0, n + 1))


@cache
def everything(way, n):
    """A solve, a batch, and gradients of both by the state and a shared number."""
    run, y0 = chained(way, n)
    loss = lambda y, a: jnp.sum(run(y, a).ys[1:] ** 2)
    rows = jnp.stack([y0, 2 * y0, -y0])

    @jax.jit
    def both(y0, rows, a):
        batch = jax.vmap(run, (0, None))(rows, a)
        of_batch = jax.grad(lambda y, a: jnp.sum(jax.vmap(loss, (0, None))(y, a)), (0, 1))(rows, a)
        return run(y0, a).ys, batch.ys, batch.status, jax.grad(loss, (0, 1))(y0, a), of_batch

    return both(y0, rows, 1.3)


@pytest.mark.parametrize(
    ("way", "n"),
    [
        ("jac", 3),
        ("bands", 9),
        *(pytest.param(w, 9, marks=pytest.mark.sweep) for w in ("jac", "krylov")),
        *(pytest.param(w, 40, marks=pytest.mark.sweep) for w in list(WAYS)[1:]),
    ],
)
def test_all_ways_to_solve_the_systems_agree(way, n):
    """Small and middle matrices are inverted, large ones factorised; with bands and without a matrix too."""
    for a, b in zip(jax.tree.leaves(everything(way, n)), jax.tree.leaves(everything("dense", n)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [3, 9])
def test_a_row_of_a_batch_is_the_trajectory_alone(n):
    ys, batch, status, of_one, of_batch = everything("dense", n)
    np.testing.assert_allclose(batch[0], ys, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(status, 0)
    np.testing.assert_allclose(of_batch[0][0], of_one[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [3, 5, 8, 20])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_matrices_that_need_pivots_are_inverted(n, rows):
    """Diagonals of zero, and of next to nothing, in every third row; a singular one, and one of NaN, harm no other."""
    W = np.random.default_rng(n).normal(size=(rows, n, n)) + 3 * np.eye(n)
    W[::3, range(n), range(n)] = 0
    W[1::6, range(n), range(n)] = 1e-13
    sound = np.arange(rows) % 5 != 2
    W[2::10, 1], W[7::10, 0, 1] = 0, np.nan
    M = jnp.moveaxis(jax.jit(inverse)(jnp.moveaxis(jnp.asarray(W), 0, -1)), -1, 0)
    np.testing.assert_allclose(M[sound] @ W[sound], np.broadcast_to(np.eye(n), M[sound].shape), atol=1e-9)
    assert not np.isfinite(M[~sound]).all((1, 2)).any()
    np.testing.assert_allclose(jax.jit(inverse)(jnp.asarray(W[0])), np.linalg.inv(W[0]), rtol=1e-8, atol=1e-10)
    narrow = jnp.moveaxis(jax.jit(inverse)(jnp.moveaxis(jnp.asarray(W[sound], jnp.float32), 0, -1)), -1, 0)
    np.testing.assert_allclose(narrow, np.asarray(M[sound]), rtol=1e-2, atol=1e-2)


def test_bands_solve_a_partial_differential_equation_by_lines():
    """Against the dense matrix; each Jacobian takes five derivatives, not 2 n."""
    y0 = jnp.array(brusselator_start(16))
    solver = jode.Adaptive(replace(jode.rodas5p, bands=(2, 2)), 1e-7, 1e-7)
    banded = jode.odeint(brusselator, y0, (0.0, 10.0), 0.02, solver=solver)[-1]
    dense = jode.odeint(brusselator, y0, (0.0, 10.0), 0.02, solver=replace(solver, method=jode.rodas5p))[-1]
    np.testing.assert_allclose(banded, dense, rtol=1e-9)


@pytest.mark.sweep
@pytest.mark.parametrize("n", [32, 128, 512])
def test_bands_reach_the_tolerance_on_grids_of_any_width(n):
    """Against LSODA, at 1e-13. Measured: 0.2 to 1.8 tolerances, in 44 to 467 steps, as many on each grid."""
    y0 = brusselator_start(n)
    f = jax.jit(lambda t, y: brusselator(t, y, 0.02))
    of = {"lband": 2, "uband": 2, "rtol": 1e-13, "atol": 1e-13}
    true = solve_ivp(lambda t, y: np.asarray(f(t, y)), (0, 10.0), y0, "LSODA", **of).y[:, -1]
    method = replace(jode.rodas5p, bands=(2, 2))
    run = jax.jit(lambda tol: jode.solve(brusselator, jnp.asarray(y0), (0.0, 10.0), 0.02, solver=jode.Adaptive(method, tol, tol)))
    for tol in (1e-4, 1e-6, 1e-8, 1e-10):
        sol = run(tol)
        assert sol.status == jode.Status.success
        assert np.max(np.abs(sol.ys[-1] - true) / (tol + tol * np.abs(true))) < 10


@pytest.mark.parametrize("bands", [(7, 5), (60, 80)], ids=str)
def test_bands_may_be_wide(bands):
    """Wider than they must be, and than the state is; a program of a few equations whatever their width."""
    f = lambda t, y, a: a * jnp.diff(jnp.pad(y, 1), 2) - y**3
    y0 = jnp.sin(jnp.arange(1.0, 40.0))
    run = lambda m: jode.solve(f, y0, (0.0, 1.0), 30.0, solver=jode.Adaptive(m, 1e-6, 1e-6)).ys[-1]
    assert len(str(jax.make_jaxpr(run, static_argnums=0)(replace(jode.rodas5p, bands=bands)))) < 300_000
    np.testing.assert_allclose(run(replace(jode.rodas5p, bands=bands)), run(jode.rodas5p), atol=1e-12)


def test_states_without_components():
    """Nothing to solve, alone and in a batch."""
    run = lambda y: jode.odeint(lambda t, y, a: y, y, (0.0, 1.0), solver=jode.Adaptive(jode.rodas5p))
    assert run(jnp.zeros(0)).shape == (2, 0)
    assert run({}) == {}
    assert jax.vmap(run)(jnp.zeros((3, 0))).shape == (3, 2, 0)


@dataclass(frozen=True)
class Sum(jode.Observer):
    """What y sums up to after the steps, times args."""

    dtype: str = "float64"

    def init(self, t, y, args):
        return jnp.zeros((), self.dtype)

    def step(self, kept, t, y, args):
        return kept + (args * jnp.sum(y)).astype(self.dtype)


@pytest.mark.parametrize("way", [{"bands": (1, 1)}, {"jac": jax.jacfwd(wavy, 1)}], ids=["bands", "jac"])
def test_what_observers_keep_is_no_part_of_the_system(way):
    """Of another dtype than the state, and with jumps, whose rows are behind args."""
    jumps = (jnp.array([0.7]), lambda t, y, a: y + a)
    run = lambda m: jode.solve(
        wavy, Y0, TS, A, solver=jode.Fixed(m, 8), observe={"wide": Sum(), "narrow": Sum("float32")}, jumps=jumps
    )
    sol = run(replace(jode.rodas5p, **way))
    for a, b in zip(*(jax.tree.leaves((x.ys, x.observed)) for x in (sol, run(jode.rodas5p))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_states_may_be_trees_of_several_dtypes_and_complex():
    """Also where f is not holomorphic: derivatives are those by real and imaginary parts."""

    def f(t, y, args):
        z = y["z"]
        return {"z": -500j * jnp.conj(z) - (800 + 5j) * (z - 1), "x": -y["x"] + jnp.real(z).astype(jnp.float32)}

    y0 = {"z": jnp.array([1 + 1j, 0.5j]), "x": jnp.ones(2, jnp.float32)}
    run = lambda y, m: jode.odeint(f, y, (0.0, 1.0), solver=jode.Adaptive(m, 1e-6, 1e-8))
    for a, b in zip(*(jax.tree.leaves(run(y0, m)) for m in (jode.rodas5p, jode.dopri8)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5)
    rows = jax.tree.map(lambda x: jnp.stack([x, x]), y0)
    np.testing.assert_allclose(jax.vmap(lambda y: run(y, jode.rodas5p))(rows)["z"][1], run(y0, jode.rodas5p)["z"], rtol=1e-10)


def test_networks_take_implicit_steps_too():
    """Layers, whose weights are interpolated in depth, count in the derivative by time."""
    weights = 0.3 * jax.random.normal(jax.random.key(0), (33, 2, 2))
    f = lambda t, y, w: jnp.tanh(w @ y)
    fine = jode.resnet(f, Y0, weights, method=jode.rk4)
    np.testing.assert_allclose(jode.resnet(f, Y0, weights, method=jode.rodas5p), fine, atol=3e-2)
    pair = jode.odeint(
        lambda t, y, args: {"y": f(t, y["y"], args)}, {"y": Y0}, (0.0, 1.0), weights[0], solver=jode.Fixed(jode.rodas5p, 4)
    )
    exact = jode.odeint(f, Y0, (0.0, 1.0), weights[0], solver=jode.Adaptive(jode.dopri8, 1e-12, 1e-12))
    np.testing.assert_allclose(pair["y"], exact, atol=1e-7)


# --- derivatives


@pytest.mark.parametrize("method", [jode.rodas5p, pytest.param(jode.rosenbrock23, marks=pytest.mark.sweep)], ids=str)
def test_derivatives_of_every_order_are_those_of_the_steps_taken(method):
    """Against automatic differentiation of a loop written by hand on the same grid, in which each stage solves anew."""
    solver = jode.Adaptive(method, 1e-4, 1e-4)
    grid = jode.solve(wavy, Y0, (0.0, 1.2), A, solver=solver, observe=jode.Steps(64)).observed
    times = jnp.concatenate([jnp.zeros(1), grid.ts[: int(grid.count)]])
    mine = lambda y, a: jnp.sum(jnp.sin(jode.odeint(wavy, y, (0.0, 1.2), a, solver=solver)[-1]))
    hand = lambda y, a: jnp.sum(jnp.sin(by_hand(method.tableau, wavy, y, times, a)[-1]))

    @jax.jit
    def derivatives(y, a, w):
        out = []
        for loss in (mine, hand):
            along = jax.jvp(lambda y, a: loss(y, a), (y, a), w)[1]
            gradient = jax.grad(loss, (0, 1))(y, a)
            hessian = jax.hessian(loss)(y, a)
            product = jax.jvp(jax.grad(loss), (y, a), w)[1]
            out.append((loss(y, a), gradient, along, hessian, product, jax.grad(lambda y: jnp.sum(jax.grad(loss)(y, a) ** 2))(y)))
        return out

    mine_, hand_ = derivatives(Y0, jnp.asarray(A), (jnp.array([0.3, -0.2]), jnp.asarray(0.7)))
    for a, b in zip(jax.tree.leaves(mine_), jax.tree.leaves(hand_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.sweep
def test_second_derivatives_through_matrices_inverted_in_a_loop():
    """Against the loop by hand; forwards over backwards, backwards twice, alone and for rows."""
    times, y0 = jnp.linspace(0, 1.0, 4), jnp.sin(jnp.arange(1.0, 7.0))
    mine = lambda y, a: jnp.sum(jnp.sin(jode.odeint(chain, y, (0.0, 1.0), a, solver=jode.Fixed(jode.rodas5p, 3))[-1]))
    hand = lambda y, a: jnp.sum(jnp.sin(by_hand(jode.rodas5p.tableau, chain, y, times, a)[-1]))

    def derivatives(loss, y, a):
        return jax.hessian(loss, (0, 1))(y, a), jax.grad(lambda y: jnp.sum(jax.grad(loss)(y, a) ** 2))(y)

    found = [jax.jit(jax.vmap(partial(derivatives, loss)))(jnp.stack([y0, -y0]), jnp.array([1.3, 0.7])) for loss in (mine, hand)]
    found.append(jax.tree.map(lambda x: jnp.stack([x, x]), jax.jit(partial(derivatives, mine))(y0, 1.3)))
    for a, b, alone in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(alone[0], a[0], rtol=1e-8, atol=1e-11)


def test_gradients_by_the_rates_of_robertson():
    """1e-11 of the same loop by hand, 1e-5 of central differences of a tight solve; scaled by the rates."""
    y0, ts, weights = jnp.array([1.0, 0.0, 0.0]), (0.0, 40.0), jnp.array([1.0, 1e4, 1.0])
    solver = jode.Adaptive(jode.rodas5p, 1e-6, 1e-12)
    grid = jode.solve(robertson, y0, ts, RATES, solver=solver, observe=jode.Steps(200)).observed
    times = jnp.concatenate([jnp.zeros(1), grid.ts[: int(grid.count)]])
    mine = lambda log: weights @ jode.odeint(robertson, y0, ts, jnp.exp(log), solver=solver)[-1]
    hand = lambda log: weights @ by_hand(jode.rodas5p.tableau, robertson, y0, times, jnp.exp(log))[-1]
    tight = jode.Adaptive(jode.rodas5p, 1e-11, 1e-17, max_steps=10_000)
    best = jax.jit(lambda log: weights @ jode.odeint(robertson, y0, ts, jnp.exp(log), solver=tight)[-1])
    log, e = jnp.log(RATES), 1e-4
    gradient = jax.grad(mine)(log)
    np.testing.assert_allclose(gradient, jax.grad(hand)(log), rtol=1e-11)
    differences = [(best(log.at[i].add(e)) - best(log.at[i].add(-e))) / (2 * e) for i in range(3)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-5)


@pytest.mark.parametrize("adjoint", [jode.Backprop(None), jode.Backprop(4)], ids=str)
def test_checkpoints_change_nothing(adjoint):
    loss = lambda y, a, adjoint: jnp.sum(
        jode.odeint(wavy, y, TS, a, solver=jode.Adaptive(jode.rodas5p, 1e-8, 1e-8), adjoint=adjoint)
    )
    of = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    for a, b in zip(jax.tree.leaves(of(Y0, A, adjoint)), jax.tree.leaves(of(Y0, A, jode.Backprop())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_the_continuous_adjoint_takes_implicit_steps_back():
    """Its integrals for parameters and times are taken on the interpolant."""
    loss = lambda y, a, ts, adjoint: jnp.sum(
        jode.odeint(wavy, y, ts, a, solver=jode.Adaptive(jode.rodas5p, 1e-9, 1e-9), adjoint=adjoint)
    )
    of = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for a, b in zip(*(jax.tree.leaves(of(Y0, A, jnp.array(TS), x)) for x in (jode.Backsolve(), jode.Backprop())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [jode.tsit5, jode.rodas5p], ids=str)
def test_a_step_back_that_left_the_domain_is_tried_again_by_the_continuous_adjoint(method):
    """Nothing of it is left in the integrals: y' = 3 a y log y, y(1) = 2^exp(3 a), back with a first step into y < 0."""
    f = lambda t, y, a: 3 * a * y * jnp.log(y)
    wide = jode.Backsolve(solver=jode.Adaptive(method, 1e-8, 1e-8, first_step=1.0))
    loss = lambda y, a: jode.odeint(f, y, (0.0, 1.0), a, solver=jode.Adaptive(method, 1e-8, 1e-8), adjoint=wide)[-1]
    exact = lambda y, a: y ** jnp.exp(3 * a)
    np.testing.assert_allclose(jax.grad(loss, (0, 1))(2.0, 0.5), jax.grad(exact, (0, 1))(2.0, 0.5), rtol=1e-6)


def test_what_happens_on_the_way_is_seen():
    """Dense, steps, crossings, stops and jumps, as with an explicit method."""
    g = lambda t, y, a: y[1] - 0.4
    observe = {"p": jode.Dense(), "at": jode.At(jnp.array([0.3, 0.9]), lambda t, y, a: y), "hit": jode.Event(g, terminate=False)}
    options = {"observe": observe, "stops": [0.25], "jumps": (jnp.array([0.7]), lambda t, y, a: y + a)}

    @jax.jit
    def both(y, a):
        return [jode.solve(wavy, y, TS, a, solver=jode.Adaptive(m, 1e-10, 1e-10), **options) for m in (jode.rodas5p, jode.dopri8)]

    mine, other = both(Y0, A)
    np.testing.assert_allclose(mine.ys, other.ys, atol=1e-8)
    np.testing.assert_allclose(mine.observed["at"], other.observed["at"], atol=1e-8)
    np.testing.assert_allclose(mine.observed["hit"].t, other.observed["hit"].t, atol=1e-8)
    np.testing.assert_allclose(mine.observed["p"](0.6), other.observed["p"](0.6), atol=1e-8)
    np.testing.assert_allclose(mine.observed["p"](0.3), mine.observed["at"][0], rtol=1e-14)


# --- what goes wrong


def test_a_singular_matrix_is_a_step_that_is_tried_again_narrower():
    grows = lambda t, y, a: a * y
    gamma = jode.rodas5p.tableau.gamma
    rates = jnp.array([1.0, 1.0 / gamma])  # with a step of 1 the second row's matrix is I - h γ J = 0
    run = lambda solver: jax.vmap(lambda a: jode.solve(grows, 1.0, (0.0, 1.0), a, solver=solver))(rates)
    sol = run(jode.Adaptive(jode.rodas5p, 1e-8, 1e-8, first_step=1.0))
    np.testing.assert_array_equal(sol.status, jode.Status.success)
    np.testing.assert_allclose(sol.ys[:, -1], jnp.exp(rates), rtol=1e-6)
    assert sol.stats.rejected[1] > 0


def test_a_singular_matrix_of_equal_steps_fails_in_its_row():
    f = lambda t, y, M: M @ y
    M = jnp.stack([jnp.eye(6), jnp.full((6, 6), jnp.inf)])
    sol = jax.vmap(lambda M: jode.solve(f, jnp.ones(6), (0.0, 1.0), M, solver=jode.Fixed(jode.rodas5p, 2)))(M)
    np.testing.assert_array_equal(sol.status, [jode.Status.success, jode.Status.nonfinite_state])
    np.testing.assert_allclose(sol.ys[0, -1], jnp.e, rtol=1e-3)
    assert jnp.isnan(sol.ys[1, -1]).all()


@pytest.mark.parametrize("way", ["bands", "krylov"])
def test_systems_that_are_not_solved_are_steps_that_are_tried_again(way):
    """Blocks without a pivot, a singular matrix, one product where many are needed."""
    spin = lambda t, y, a: a * jnp.stack([y[1] - y[0], y[0] + y[1]])
    given = {"bands": {"bands": (1, 1)}, "krylov": {"krylov": lx.GMRES(rtol=1e-10, atol=1e-10, restart=1, max_steps=1)}}[way]
    sol = jode.solve(
        spin, jnp.array([1.0, 0.5]), (0.0, 1.0), 1 / jode.rodas5p.tableau.gamma,
        solver=jode.Adaptive(replace(jode.rodas5p, **given), 1e-6, 1e-6, first_step=1.0, max_steps=200),
    )  # fmt: skip
    exact = jode.odeint(spin, jnp.array([1.0, 0.5]), (0.0, 1.0), 1 / jode.rodas5p.tableau.gamma, solver=jode.Adaptive(rtol=1e-10))
    if sol.status == jode.Status.success:
        np.testing.assert_allclose(sol.ys[-1], exact[-1], rtol=1e-4)
    else:
        assert jnp.isnan(sol.ys[-1]).all()
    assert sol.stats.rejected > 0


def ring(t, y, c):
    """A chain of pairs, whose ends touch where c is not zero."""
    wide = jnp.concatenate([c * y[-1:], y, c * y[:1]])
    return 300 * jnp.diff(wide, 2) - y**3 + jnp.sin(t)


def sleeping(t, y, c):
    """Far components meet only where the first one has grown."""
    return -50 * y + 1.0 + 50 * c * jnp.maximum(y[0] - 0.01, 0) * y[::-1]


def narrow(f, dtype=jnp.float64):
    """Solves with the bands that f has where c is 0, by both controls: how it ended and at which numbers."""
    y0 = (jnp.sin(jnp.arange(1.0, 13)) / 30).at[0].set(0).astype(dtype)
    method = replace(jode.rodas5p, bands=(1, 1))
    solvers = jode.Adaptive(method, 1e-4, 1e-4, max_steps=1000), jode.Fixed(method, 40)
    return [lambda c, s=s: jode.solve(f, y0, np.array([0, 0.05, 0.5], dtype), c, solver=s) for s in solvers]


@pytest.mark.parametrize(("f", "dtype"), [(ring, jnp.float64), (ring, jnp.float32), (sleeping, jnp.float64)])
def test_bands_that_f_does_not_keep_to_are_told_in_their_rows(f, dtype):
    """Also where f leaves them late, and by little; rows that keep to them arrive, and have gradients."""
    c = jnp.array([0.0, 1.0, 0.1, 0.0], dtype)
    for run in narrow(f, dtype):
        sol = jax.jit(jax.vmap(run))(c)
        np.testing.assert_array_equal(sol.status, np.where(c == 0, jode.Status.success, jode.Status.linear_solve))
        assert np.isnan(sol.ys[1:3, -1]).all()
        assert np.isfinite(sol.ys[::3]).all()
        with pytest.raises(
            jode.SolveError, match=r"trajectory 1 of 4 \(2 failed\) ended with linear_solve.*with bands, f depends on"
        ):
            jode.check(sol)
    loss = lambda k: jnp.sum(jnp.where(sol.status == 0, jax.vmap(lambda c: run(k * c).ys[-1, 1])(c), 0))
    assert dtype == jnp.float32 or np.isfinite(jax.jit(jax.grad(loss))(1.0))


@pytest.mark.parametrize("scale", [1.0, 1e9], ids=str)
def test_bands_that_f_keeps_to_are_never_called_wrong(scale):
    """Single precision, sizes nine orders apart, what is subtracted again, several leaves, and observers beside."""

    def f(t, y, c):
        u, v = y["u"] * scale, y["v"]
        return {"u": (-1e3 * u + 5e3 * v[0] - 5e3 * v[0]) / scale, "v": jnp.diff(jnp.pad(v, 1), 2) * 1e3 - v**3}

    y0 = {"u": jnp.ones(1, jnp.float32), "v": jnp.sin(jnp.arange(1.0, 9)).astype(jnp.float32)}
    solver = jode.Adaptive(replace(jode.rodas5p, bands=(1, 1)), 1e-3, 1e-3)
    sol = jode.solve(f, y0, (0.0, 1.0), solver=solver, observe=jode.Steps())
    assert sol.status == jode.Status.success
    assert sol.stats.steps < 60


@pytest.mark.parametrize(
    "solver", [jode.Adaptive(jode.rodas5p, max_steps=60), jode.Fixed(jode.rodas5p, 4)], ids=["adaptive", "fixed"]
)
def test_a_krylov_solver_that_does_not_converge_is_named(solver):
    """And not the solution; where f leaves its domain the solver is not to blame. No remedy names the method that is in use."""
    few = lx.GMRES(rtol=1e-10, atol=1e-10, restart=2, max_steps=2)
    run = lambda f, a, k: jode.solve(
        f, jnp.sin(jnp.arange(1.0, 10)), (0.0, 1.0), a, solver=replace(solver, method=replace(solver.method, krylov=k))
    )
    sol = run(chain, 1.3, few)
    assert sol.status == jode.Status.linear_solve
    assert jnp.isnan(sol.ys[-1]).all()
    with pytest.raises(jode.SolveError, match=r"linear_solve.*with krylov, its solver did not converge"):
        jode.check(sol)
    leaves = run(lambda t, y, a: -a * y * jnp.sqrt(0.5 - t), 1.3, lx.GMRES(rtol=1e-8, atol=1e-8))
    assert leaves.status in (jode.Status.step_underflow, jode.Status.max_steps, jode.Status.nonfinite_state)
    with pytest.raises(jode.SolveError, match=r"^((?!rodas5p).)*$"):
        jode.check(leaves)


def test_a_jacobian_of_nan_harms_no_other_row():
    """sqrt(|y|) at zero: f is finite, its derivative is not. Gradients of what rows share are those of the others."""
    f = lambda t, y, a: -a * 1e3 * (y - jnp.sqrt(jnp.abs(y)))
    run = lambda y, a: jode.solve(f, y, (0.0, 0.1), a, solver=jode.Adaptive(jode.rodas5p, 1e-6, 1e-6, max_steps=100))
    rows = jnp.array([0.5, 0.0, 2.0])
    sol = jax.vmap(run, (0, None))(rows, 1.0)
    np.testing.assert_array_equal(sol.status != 0, [False, True, False])
    np.testing.assert_allclose(sol.ys[::2, -1], 1.0, rtol=1e-4)
    assert jnp.isnan(sol.ys[1, -1])
    masked = lambda rows, a: jnp.sum(jnp.where(sol.status == 0, jax.vmap(run, (0, None))(rows, a).ys[:, -1], 0))
    np.testing.assert_allclose(jax.grad(masked, 1)(rows, 1.0), jax.grad(masked, 1)(rows[::2].repeat(2)[:3], 1.0) * 0, atol=1e-5)
    assert jnp.isfinite(jax.grad(masked, 1)(rows, 1.0))


def test_eigenvalues_twelve_orders_apart():
    M = jnp.array([[-5e11 - 0.5, 5e11 - 0.5], [5e11 - 0.5, -5e11 - 0.5]])  # eigenvalues -1e12 and -1
    sol = jode.solve(lambda t, y, M: M @ y, jnp.array([2.0, 0.0]), (0.0, 1.0), M, solver=jode.Adaptive(jode.rodas5p, 1e-4, 1e-4))
    assert sol.status == jode.Status.success
    np.testing.assert_allclose(sol.ys[-1], jnp.exp(-1.0), rtol=1e-3)  # M y is rounded to 6e-5
    assert sol.stats.steps < 100


def test_a_field_that_jumps_costs_narrow_steps_and_no_wrong_number():
    f = lambda t, y, a: -1e4 * (y - jnp.where(t < 0.5, 1.0, 2.0))
    sol = jode.solve(f, 0.0, (0.0, 0.4, 1.0), solver=jode.Adaptive(jode.rodas5p, 1e-8, 1e-8))
    assert sol.status == jode.Status.success
    np.testing.assert_allclose(sol.ys[1:], [1.0, 2.0], rtol=1e-7)
    stopped = jode.solve(f, 0.0, (0.0, 0.4, 1.0), solver=jode.Adaptive(jode.rodas5p, 1e-8, 1e-8), stops=[0.5])
    np.testing.assert_allclose(stopped.ys[1:], [1.0, 2.0], rtol=1e-7)
    assert stopped.stats.steps < sol.stats.steps


EXPLICIT = [jode.bosh3, jode.dopri5, jode.tsit5, jode.dopri8]


@pytest.mark.parametrize("method", EXPLICIT, ids=str)
def test_an_explicit_solve_says_that_stability_kept_it_from_its_end(method):
    """Row by row: others of the batch run out of steps, or arrive, by their own accuracy."""
    run = lambda eps, t1: jode.solve(
        van_der_pol, jnp.array([2.0, 0.0]), (0.0, t1), eps, solver=jode.Adaptive(method, max_steps=600)
    )
    sol = jax.vmap(run)(jnp.array([1e-5, 1.0, 1.0]), jnp.array([1.0, 1.0, 1e5]))
    np.testing.assert_array_equal(sol.status, [jode.Status.stiff, jode.Status.success, jode.Status.max_steps])
    assert run(1e-5, 1.0).status == jode.Status.stiff
    with pytest.raises(jode.SolveError, match=r"ended with stiff.*jode.rodas5p"):
        jode.check(sol)


def test_stiff_is_said_whichever_way_time_runs_and_whoever_looks_on():
    follow = lambda t, y, a: -a * (y - jnp.cos(t))
    run = lambda a, ts, **more: int(jode.solve(follow, jnp.ones(2), ts, a, solver=jode.Adaptive(max_steps=200), **more).status)
    assert run(1e4, (0.0, 5.0)) == run(-1e4, (5.0, 0.0)) == run(1e4, (0.0, 5.0), observe=Sum()) == jode.Status.stiff
    rough = jode.Adaptive(rtol=0.3, atol=1e-9, max_steps=10)
    grown = jode.solve(lambda t, y, a: -a * y, jnp.ones(2), (5.0, 0.0), 40.0, solver=rough)  # grows by e^200
    assert grown.status == jode.Status.max_steps


@pytest.mark.parametrize("field", ["oscillator", "quadrature", "growth"])
def test_what_is_not_stiff_is_not_called_so(field):
    fields = {
        "oscillator": lambda t, y, a: jnp.stack([y[1], -y[0]]),
        "quadrature": lambda t, y, a: 100 * jnp.cos(100 * t) * jnp.ones(2),
        "growth": lambda t, y, a: jnp.sin(50 * t) * y + y,
    }
    sol = jode.solve(fields[field], jnp.ones(2), (0.0, 300.0), solver=jode.Adaptive(max_steps=300))
    assert sol.status == jode.Status.max_steps


def hashed(y, s):
    """Numbers in (-1, 1) that no neighbouring y has."""
    x = 43758.5453 * jnp.sin(1e9 * y + s)
    return 2 * (x - jnp.floor(x)) - 1


NOISE = {
    "each": lambda t, y, s: -y + hashed(y, s),
    "all": lambda t, y, s: -y + 1e-3 * jnp.sin(1e12 * jnp.sum(y) + s),
    "by time": lambda t, y, s: -y + hashed(t, s),
    "single": lambda t, y, s: (jnp.sin(y.astype(jnp.float32) * (1 + s.astype(jnp.float32)))).astype(y.dtype) - y,
}


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("n", [1, pytest.param(5, marks=pytest.mark.sweep)])
def test_noise_is_not_called_stiff(name, n):
    """Differences of noise have the sign of an eigenvalue that is negative in half of all cases, and agree in one of a hundred. The
    remedy names it.
    """
    solver = jode.Adaptive(jode.tsit5, 1e-7, 1e-7, max_steps=100)
    sol = jax.jit(jax.vmap(lambda s: jode.solve(NOISE[name], 1.1 * jnp.ones(n), (0.0, 50.0), s, solver=solver)))(jnp.arange(300.0))
    assert np.mean(sol.status == jode.Status.stiff) <= 0.01
    assert np.mean(sol.status == jode.Status.max_steps) > 0.9
    with pytest.raises(jode.SolveError, match=r"max_steps.*Noise in f \(random numbers, a part of it in float32\)"):
        jode.check(sol)


def test_what_is_stiff_is_called_so_beside_noise_that_is_smaller():
    f = lambda t, y, a: -a * (y - jnp.cos(t)) + 1e-7 * hashed(y, a)
    sol = jode.solve(f, jnp.ones(3), (0.0, 5.0), 1e4, solver=jode.Adaptive(max_steps=200))
    assert sol.status == jode.Status.stiff


def test_a_batch_of_which_some_are_a_thousand_times_stiffer():
    """Each row is that of a solve alone, and one that cannot be solved is contained."""
    rates = RATES[None] * (jnp.where(jnp.arange(40) % 10 == 3, 1e3, 1.0) * jnp.linspace(0.9, 1.1, 40))[:, None]
    starts = jnp.zeros((40, 3)).at[:, 0].set(1.0).at[7].set(jnp.nan)
    solver = jode.Adaptive(jode.rodas5p, 1e-6, 1e-10)
    run = jax.jit(lambda y, k: jode.solve(robertson, y, (0.0, 40.0), k, solver=solver))
    sol = jax.jit(jax.vmap(run))(starts, rates)
    np.testing.assert_array_equal(sol.status != 0, jnp.arange(40) == 7)
    for i in (0, 3, 39):
        alone = run(starts[i], rates[i])
        np.testing.assert_allclose(sol.ys[i], alone.ys, rtol=1e-9)
        assert sol.stats.steps[i] == alone.stats.steps


# --- wrong use


def test_wrong_use_is_refused_in_words():
    with pytest.raises(ValueError, match="give one"):
        jode.Rosenbrock(jode.rodas5p.tableau, bands=(1, 1), krylov=lx.GMRES(rtol=1e-3, atol=1e-3))
    with pytest.raises(ValueError, match="two ints"):
        replace(jode.rodas5p, bands=(1,))
    with pytest.raises(ValueError, match="two ints"):
        replace(jode.rodas5p, bands=1)
    with pytest.raises(ValueError, match=r"Backsolve.*no bands"):
        jode.solve(wavy, Y0, TS, A, solver=jode.Adaptive(replace(jode.rodas5p, bands=(1, 1))), adjoint=jode.Backsolve())
    with pytest.raises(ValueError, match=r"has none: use jode.Backprop"):
        jode.solve(wavy, Y0, TS, A, solver=jode.Adaptive(jode.rodas5p), adjoint=jode.MemoryFree())
    with pytest.raises(TypeError, match=r"∂f/∂y as jax.jacfwd"):
        jode.solve(wavy, Y0, TS, A, solver=jode.Adaptive(replace(jode.rodas5p, jac=lambda t, y, a: y)))
    with pytest.raises(ValueError, match=r"bands.*one real dtype"):
        jode.solve(lambda t, y, a: -y, Y0.astype(complex), TS, A, solver=jode.Adaptive(replace(jode.rodas5p, bands=(1, 1))))
