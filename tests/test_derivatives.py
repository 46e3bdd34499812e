"""Every derivative, in any nesting: equal to autodiff of a loop by hand over the same grid, through every input."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jode

A = jnp.array([0.9, 1.1, 0.4])
SHIFT = jnp.array([0.3, -0.2])  # closed over, with derivatives
X = {"y0": jnp.array([0.8, -0.5]), "a": A, "ts": jnp.array([0.1, 0.5, 1.0]), "shift": SHIFT}
FLAT, UNFLATTEN = ravel_pytree(X)
WEIGHTS = jnp.array([[0.3, -1.0], [1.0, 0.7], [-0.6, 1.3]])


def field(t, y, a):
    return jnp.stack([a[0] * y[1] + jnp.cos(a[2] * t), -a[1] * jnp.sin(y[0])])


def loss_of(solver, adjoint=jode.Backprop()):
    def loss(x):
        x = UNFLATTEN(x)
        f = lambda t, y, a: field(t, y + x["shift"], a)
        return jnp.sum(WEIGHTS * jnp.sin(jode.odeint(f, x["y0"], x["ts"], x["a"], solver=solver, adjoint=adjoint)))

    return loss


def by_hand(solver):
    """The same loss by Python loops: equal steps between save times, or the accepted grid with save times interpolated."""
    tableau = solver.method.tableau
    accepted = accepted_times(solver) if isinstance(solver, jode.Adaptive) else []

    def step(f, t, h, y, a):
        ks = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            ks.append(f(t + c * h, y + h * sum((w * k for w, k in zip(row, ks, strict=False)), jnp.zeros(2)), a))
        return y + h * sum(b * k for b, k in zip(tableau.b, ks, strict=True)), ks

    def equal(x):
        x = UNFLATTEN(x)
        f = lambda t, y, a: field(t, y + x["shift"], a)
        ys, n = [x["y0"]], int(solver.steps)
        for j in range(2):
            y, h = ys[-1], (x["ts"][j + 1] - x["ts"][j]) / n
            for k in range(n):
                y, _ = step(f, x["ts"][j] + k * h, h, y, x["a"])
            ys.append(y)
        return jnp.sum(WEIGHTS * jnp.sin(jnp.stack(ys)))

    def found(x):
        x = UNFLATTEN(x)
        f = lambda t, y, a: field(t, y + x["shift"], a)
        y, times, middle = x["y0"], [x["ts"][0], *accepted[1:-1], x["ts"][-1]], None
        ends = np.array(accepted)
        for t0, t1, holds in zip(times[:-1], times[1:], (ends[:-1] <= 0.5) & (ends[1:] > 0.5), strict=True):
            start, h = y, t1 - t0
            y, ks = step(f, t0, h, start, x["a"])
            if holds:
                theta = (x["ts"][1] - t0) / h
                weights = solver.method.dense_weights(theta)
                middle = start + h * sum(w * k for w, k in zip(weights, [*ks, f(t1, y, x["a"])], strict=True))
        return jnp.sum(WEIGHTS * jnp.sin(jnp.stack([x["y0"], middle, y])))

    return found if isinstance(solver, jode.Adaptive) else equal


@cache
def accepted_times(solver):
    """The times at which accepted steps end, of a solve that rejects none, read off the calls of f."""
    times = []

    def spied(t, y, a):
        jax.debug.callback(lambda t: times.append(float(t)), t, ordered=True)
        return field(t, y + SHIFT, a)

    sol = jode.solve(spied, X["y0"], (X["ts"][0], X["ts"][-1]), A, solver=solver)
    jax.effects_barrier()
    assert sol.stats.rejected == 0
    stages = solver.method.tableau.stages
    return [float(X["ts"][0]), *times[2:][stages - 1 :: stages]]


def by_columns(product):
    """A Hessian from products of it with vectors."""
    return lambda f: lambda x: jax.vmap(lambda v: product(f, x, v))(jnp.eye(x.size))


def transposed(f, x, v):
    _, product = jax.linearize(jax.grad(f), x)
    return jax.linear_transpose(product, x)(v)[0]


SECOND = {
    "jacfwd of grad": lambda f: jax.jacfwd(jax.grad(f)),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(f)),
    "jacfwd of jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "jacrev of jacfwd": lambda f: jax.jacrev(jax.jacfwd(f)),
    "grad of jvp": by_columns(lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x)),
    "jvp of grad": by_columns(lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1]),
    "grad of grad": by_columns(lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x)),
    "transpose of linearize": by_columns(transposed),
    "under checkpoint": lambda f: jax.jacrev(jax.grad(jax.checkpoint(f))),
    "jit inside": lambda f: jax.jacrev(jax.jit(jax.grad(jax.jit(f)))),
}
THIRD = {
    "reverse thrice": lambda f: jax.jacrev(jax.jacrev(jax.grad(f))),
    "forward of reverse of reverse": lambda f: jax.jacfwd(jax.jacrev(jax.grad(f))),
    "reverse of forward of reverse": lambda f: jax.jacrev(jax.jacfwd(jax.grad(f))),
    "reverse of reverse of forward": lambda f: jax.jacrev(jax.jacrev(jax.jacfwd(f))),
}
SOLVERS = {
    "fixed": jode.Fixed(jode.heun, 3),
    "traced": jode.Fixed(jode.heun, jnp.asarray(3), max_steps=4),
    "adaptive": jode.Adaptive(jode.bosh3, 1e-3, 1e-3, max_steps=32),
}
EXACT = [jode.Backprop(), jode.Backprop(None), jode.Backprop(2)]
HANDS = {"fixed": "fixed", "traced": "fixed", "adaptive": "adaptive"}


@cache
def truth(name, order):
    loss = by_hand(SOLVERS[name])
    for _ in range(order):
        loss = jax.jacfwd(loss)
    return jax.jit(loss)(FLAT)


def first_and_few(cells):
    """Four nestings of the default adjoint where steps are found are tests of every day, the rest a sweep."""
    four = ("jacfwd of grad", "jacrev of grad", "jacrev of jacfwd", "transpose of linearize")
    daily = lambda name, solver, adjoint: name in four and solver == "adaptive" and adjoint == jode.Backprop()
    return [
        pytest.param(n, s, a, id=f"{n}-{s}-{a.checkpoints}", marks=[] if daily(n, s, a) else [pytest.mark.sweep])
        for n, s, a in cells
    ]


def close(found, true, tol):
    np.testing.assert_allclose(found, true, rtol=tol, atol=tol * np.abs(true).max())


@pytest.mark.parametrize(("name", "solver", "adjoint"), first_and_few([(n, s, a) for n in SECOND for s in SOLVERS for a in EXACT]))
def test_second_derivatives_are_those_of_a_loop_by_hand(name, solver, adjoint):
    found = jax.jit(SECOND[name](loss_of(SOLVERS[solver], adjoint)))(FLAT)
    close(found, truth(HANDS[solver], 2), 1e-10)


@pytest.mark.sweep
@pytest.mark.parametrize("adjoint", EXACT, ids=lambda a: str(a.checkpoints))
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", THIRD)
def test_third_derivatives_are_those_of_a_loop_by_hand(name, solver, adjoint):
    found = jax.jit(THIRD[name](loss_of(SOLVERS[solver], adjoint)))(FLAT)
    close(found, truth(HANDS[solver], 3), 1e-8)


@pytest.mark.sweep
@pytest.mark.parametrize("order", ["vmap of hessian", "hessian of vmap", "vmap twice"])
@pytest.mark.parametrize("mode", ["jacrev of grad", "jacfwd of grad", "jacrev of jacfwd"])
def test_second_derivatives_of_a_batch(mode, order):
    """Shared and own parameters and states; rows that take different numbers of steps."""
    solver, second = jode.Adaptive(jode.heun, 1e-3, 1e-3, max_steps=64), SECOND[mode]
    y0s = jnp.stack([X["y0"], 3 * X["y0"], X["y0"][::-1]])

    def loss(x, y0):  # x: parameters, then an increment of the state
        ys = jode.odeint(field, y0 + x[3:], (0.1, 0.6, 1.0), x[:3], solver=solver)
        return jnp.sum(WEIGHTS * jnp.sin(ys))

    x = jnp.concatenate([A, jnp.zeros(2)])
    alone = jnp.stack([jax.jit(jax.jacfwd(jax.jacfwd(loss)))(x, y0) for y0 in y0s])
    if order == "vmap of hessian":
        close(jax.jit(jax.vmap(lambda y0: second(lambda x: loss(x, y0))(x)))(y0s), alone, 1e-10)
    elif order == "hessian of vmap":
        close(jax.jit(second(lambda x: jnp.sum(jax.vmap(loss, (None, 0))(x, y0s))))(x), alone.sum(0), 1e-10)
    else:
        total = lambda x, ys: jnp.sum(jax.vmap(loss, (None, 0))(x, ys))
        pairs = jnp.stack([y0s[:2], y0s[1:]])
        found = jax.jit(jax.vmap(lambda ys: second(lambda x: total(x, ys))(x)))(pairs)
        close(found, jnp.stack([alone[:2].sum(0), alone[1:].sum(0)]), 1e-10)


INEXACT = [  # adjoint, solver, relative error of second derivatives: rounding, the inverse step's, the tolerance's
    (jode.MemoryFree(), jode.Fixed(jode.reversible_heun, 8), 1e-9),
    (jode.MemoryFree(), jode.Adaptive(jode.Reversible(jode.heun), 1e-3, 1e-3), 1e-9),
    (jode.MemoryFree(), jode.Adaptive(jode.tsit5, 1e-6, 1e-6), 1e-4),
    (jode.Backsolve(), jode.Adaptive(jode.tsit5, 1e-7, 1e-7), 1e-4),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("adjoint", "solver", "tol"), INEXACT, ids=["reversible heun", "reversible", "tsit5", "backsolve"])
@pytest.mark.parametrize("mode", ["jacrev of grad", "jacfwd of grad", "jacrev of jacfwd"])
def test_second_derivatives_of_adjoints_that_recover_states(mode, adjoint, solver, tol):
    found, exact = (jax.jit(SECOND[mode](loss_of(solver, a)))(FLAT) for a in (adjoint, jode.Backprop()))
    close(found, exact, tol)


@pytest.mark.sweep
@pytest.mark.parametrize(("adjoint", "solver", "tol"), INEXACT, ids=["reversible heun", "reversible", "tsit5", "backsolve"])
def test_third_derivatives_of_adjoints_that_recover_states(adjoint, solver, tol):
    third = THIRD["reverse of forward of reverse"]
    found, exact = (jax.jit(third(loss_of(solver, a)))(FLAT) for a in (adjoint, jode.Backprop()))
    close(found, exact, 10 * tol)


NESTINGS = [("second", n) for n in SECOND] + [("third", n) for n in THIRD]
DAILY = "jacrev of grad", "jacrev of jacfwd"


@pytest.mark.parametrize("adjoint", [jode.Backprop(2), jode.Backprop(None), jode.Backprop()], ids=lambda a: str(a.checkpoints))
@pytest.mark.parametrize(
    ("order", "mode"), [pytest.param(o, n, id=n, marks=[] if n in DAILY else [pytest.mark.sweep]) for o, n in NESTINGS]
)
def test_higher_derivatives_of_a_residual_network(order, mode, adjoint):
    w = jnp.cos(jnp.arange(8.0))
    net = lambda w: jnp.sum(jode.resnet(lambda t, x, w: w * jnp.tanh(x), X["y0"], w.reshape(4, 2), adjoint=adjoint) ** 2)

    def loop(w):
        x = X["y0"]
        for n in range(4):
            x = x + w.reshape(4, 2)[n] * jnp.tanh(x)
        return jnp.sum(x**2)

    found = jax.jit((SECOND if order == "second" else THIRD)[mode](net))(w)
    close(found, jax.hessian(loop)(w) if order == "second" else jax.jacfwd(jax.hessian(loop))(w), 1e-12)


def test_cotangents_are_linear_and_their_transpose_is_the_tangent():
    """By a cotangent alone a pull is differentiated without marching again, and transposed it is the forward derivative."""
    calls = []

    def f(t, y, a):
        jax.debug.callback(lambda: calls.append(1))
        return field(t, y, a)

    solve = lambda a: jode.odeint(f, X["y0"], X["ts"], a, solver=SOLVERS["adaptive"])
    z, back = jax.vjp(solve, A)
    g = jnp.cos(jnp.arange(float(z.size))).reshape(z.shape)

    def count(derivative):
        calls.clear()
        out = jax.block_until_ready(jax.jit(derivative)(g))
        jax.effects_barrier()
        return out, len(calls)

    (_, along), twice = count(lambda g: jax.jvp(back, (g,), (2 * g,)))
    once, pulls = count(back)
    close(along[0], 2 * once[0], 1e-12)
    assert twice <= 2 * pulls
    direct = jax.jvp(solve, (A,), (A,))[1]
    close(jax.jit(lambda v: jax.linear_transpose(lambda g: back(g)[0], g)(v)[0])(A), direct, 1e-11)
    each = jax.vmap(lambda v: jax.linear_transpose(lambda g: back(g)[0], g)(v)[0])(jnp.stack([A, 2 * A]))
    close(each, jnp.stack([direct, 2 * direct]), 1e-11)


@pytest.mark.optimized
def test_second_derivatives_take_memory_of_the_order_of_first_ones():
    """4,096 steps from 16 checkpoints: a Hessian-vector product within three times the gradient."""
    f = lambda t, y, a: jnp.sin(a * jnp.roll(y, 1))
    solver, adjoint = jode.Fixed(jode.heun, 4096), jode.Backprop(16)
    loss = lambda a: jnp.sum(jode.odeint(f, jnp.linspace(0.1, 1.0, 256), (0.0, 1.0), a, solver=solver, adjoint=adjoint)[-1] ** 2)
    products = {
        "gradient": jax.grad(loss),
        "jvp of grad": lambda a: jax.jvp(jax.grad(loss), (a,), (a,))[1],
        "grad of grad": lambda a: jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), a))(a),
        "grad of jvp": lambda a: jax.grad(lambda x: jax.jvp(loss, (x,), (a,))[1])(a),
    }
    take = {k: jax.jit(g).lower(jnp.ones(256)).compile().memory_analysis().temp_size_in_bytes for k, g in products.items()}
    assert max(take["jvp of grad"], take["grad of jvp"]) <= 3 * take["gradient"], take
    assert take["grad of grad"] <= 4 * take["gradient"], take


@pytest.mark.parametrize("mode", ["jacrev of grad", "jvp of grad", "grad of jvp"])
def test_no_form_holds_tracers(mode):
    """Fields that close over tracers, under jit, grad and vmap."""

    def loss(x, shift):
        f = lambda t, y, a: -a * y + shift
        return jnp.sum(jode.odeint(f, jnp.ones(2), (0.0, 0.5), x[0], solver=jode.Adaptive(jode.heun, 1e-2, 1e-2)) * x[1])

    with jax.checking_leaks():
        second = lambda s: SECOND[mode](lambda x: loss(x, s))(jnp.array([0.7, 1.3]))
        jax.jit(jax.vmap(second))(jnp.ones(2))


@pytest.mark.parametrize(
    ("adjoint", "mode"),
    [
        (jode.Backprop(), "jacfwd of grad"),
        (jode.Backprop(), "jacrev of grad"),
        (jode.MemoryFree(), "jacfwd of grad"),
        (jode.Backsolve(), "jacrev of grad"),
        pytest.param(jode.MemoryFree(), "jacrev of grad", marks=pytest.mark.sweep),
        pytest.param(jode.Backsolve(), "jacfwd of grad", marks=pytest.mark.sweep),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_hessian_where_all_cotangents_are_zero(adjoint, mode):
    """At a perfect fit the Hessian of a sum of squares is JᵀJ: cotangents are zero there, and their tangents are not."""
    solver, ts = jode.Adaptive(jode.tsit5, 1e-6, 1e-6), jnp.array([0.0, 0.5, 1.0])
    solve = lambda a: jode.odeint(field, X["y0"], ts, a, solver=solver, adjoint=adjoint)
    data, jacobian = solve(A), jax.jit(jax.jacfwd(lambda a: solve(a).ravel()))(A)
    found = jax.jit(SECOND[mode](lambda a: jnp.sum((solve(a) - data) ** 2) / 2))(A)
    close(found, jacobian.T @ jacobian, 1e-4)


@pytest.mark.parametrize("ts", [(0.3, 0.3, 1.0), (0.3, 0.3), (0.3, 0.3, 0.3)], ids=str)
def test_a_save_time_at_the_start_moves_along_the_slope_in_both_modes(ts):
    """y0 + (t - t0) f, also in second derivatives."""
    f = lambda t, y, a: -a * y * jnp.cos(t)
    loss = lambda ts, a, y: jnp.arange(1.0, 1 + ts.shape[0]) @ jode.odeint(f, y, ts, a)
    at = (jnp.array(ts), jnp.asarray(1.3), jnp.asarray(0.7))
    slope = f(0.3, 0.7, 1.3)
    forwards, reverse = (d(loss, (0, 1, 2))(*at) for d in (jax.jacfwd, jax.jacrev))
    for a, b in zip(forwards, reverse, strict=True):
        close(a, b, 1e-12)
    close(forwards[0][1], 2 * slope, 1e-12) if len(ts) == 3 else close(forwards[0], jnp.array([-2.0, 2.0]) * slope, 1e-12)
    nested = [jax.tree.leaves(d(loss, (0, 1, 2))(*at)) for d in (jax.hessian, lambda g, n: jax.jacfwd(jax.jacfwd(g, n), n))]
    for a, b in zip(*nested, strict=True):
        close(a, b, 1e-10)
