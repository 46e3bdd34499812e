"""What a user may say of the steps of a solver: how wide they may be, how errors are weighed, which weights are a layer's own."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import Status
from tests.problems import lotka_volterra

ADJOINTS = [jode.Backprop(), jode.Backprop(2), jode.MemoryFree(), jode.Backsolve()]


@dataclass(frozen=True)
class Widest(jode.Observer):
    """The widest step, and the time it started at."""

    def init(self, t, y, args):
        return {"t": t, "h": jnp.zeros_like(t)}

    def step(self, kept, t, y, args):
        h = jnp.abs(t - kept["t"])
        return {"t": t, "h": jnp.where(h > kept["h"], h, kept["h"])}


# The widest step.

pulse = lambda t, y, a: a * jnp.exp(-((t - 100) ** 2))


@pytest.mark.parametrize("ts", [(0.0, 200.0), (200.0, 0.0), (0.0, 3.0, 99.0, 200.0)], ids=str)
@pytest.mark.parametrize("method", [jode.tsit5, jode.dopri8, jode.bosh3], ids=str)
def test_a_pulse_after_a_long_rest_is_not_stepped_over(method, ts):
    solve = lambda **more: jode.solve(pulse, 0.0, ts, 1.0, solver=jode.Adaptive(method, 1e-6, 1e-6, **more), observe=Widest())
    assert abs(solve().ys[-1]) < 1e-3  # without a bound it is
    for first_step in (None, 50.0):
        sol = jode.check(solve(max_step=1.0, first_step=first_step))
        np.testing.assert_allclose(sol.ys[-1], np.sqrt(np.pi) * np.sign(ts[-1] - ts[0]), rtol=1e-5)
        assert sol.observed["h"] <= 1 + 1e-13  # the end of a step is rounded
        assert sol.stats.accepted >= 200


def test_a_bound_wider_than_all_steps_changes_nothing():
    y0, ts = jnp.array([1.0, 2.0]), np.linspace(0.0, 5.0, 4)
    free = jode.solve(lotka_volterra, y0, ts)
    for most in (100.0, np.inf):
        assert np.array_equal(jode.odeint(lotka_volterra, y0, ts, solver=jode.Adaptive(max_step=most)), free.ys)


def test_each_row_has_its_own_bound():
    solve = lambda most, a: jode.solve(pulse, 0.0, (0.0, 200.0), a, solver=jode.Adaptive(max_step=most))
    most, a = jnp.array([0.5, 1.0, 0.0, 1e9]), jnp.arange(1.0, 5.0)
    sol = jax.jit(jax.vmap(solve))(most, a)
    assert list(sol.status) == [Status.success, Status.success, Status.invalid_input, Status.success]
    np.testing.assert_allclose(sol.ys[:2, -1], np.sqrt(np.pi) * np.array([1.0, 2.0]), rtol=1e-6)
    assert np.isnan(sol.ys[2]).all()
    alone = [solve(*x).stats.steps for x in zip(most[:2], a[:2], strict=True)]
    assert list(sol.stats.steps[:2]) == alone


@pytest.mark.parametrize("most", [0.0, -1.0, np.nan])
def test_a_traced_bound_out_of_range_is_a_status(most):
    run = jax.jit(lambda most: jode.solve(pulse, 0.0, (0.0, 200.0), 1.0, solver=jode.Adaptive(max_step=most)))
    sol = run(most)
    assert sol.status == Status.invalid_input
    with pytest.raises(jode.SolveError, match="max_step be above zero"):
        jode.check(sol)
    assert run(2.0).status == Status.success


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_gradient_through_a_pulse(adjoint):
    """y(200) = a √π and dy/da = √π: the way back must see the pulse too."""
    end = lambda a, most: jode.odeint(pulse, 0.0, (0.0, 200.0), a, solver=jode.Adaptive(max_step=most), adjoint=adjoint)[-1]
    np.testing.assert_allclose(jax.jit(jax.grad(end))(0.7, 1.0), np.sqrt(np.pi), rtol=1e-5)
    rows = jax.jit(jax.vmap(jax.grad(end)))(jnp.array([0.7, 1.4]), jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(rows, np.sqrt(np.pi), rtol=1e-5)


# A tolerance for each component.


def two(t, y, a):
    """A slow component, and a fast one that it does not depend on."""
    return jnp.stack([-a * y[0], 50 * jnp.cos(50 * t) + 0 * y[1]])


def tree(t, y, a):
    return {
        "a": -a * y["a"] * (1 + jnp.sum(y["b"] ** 2).astype(float)),
        "b": jnp.sin(y["b"]) * jnp.cos(t).astype(y["b"].dtype),
        "z": 1j * y["z"],
    }


TREE = {"a": jnp.array([[1.0, 2.0, 0.5]]), "b": jnp.ones((2,), jnp.float32), "z": jnp.array(1.0 + 0j)}


@pytest.mark.parametrize("method", [jode.tsit5, jode.dopri8], ids=str)
def test_a_component_of_loose_tolerance_is_not_controlled(method):
    """The error is then that of the other component, over √2: the same steps as without it."""
    sol = jode.solve(two, jnp.array([1.0, 0.0]), (0.0, 3.0), 1.0, solver=jode.Adaptive(method, 0.0, jnp.array([1e-8, 1e30])))
    alone = jode.solve(lambda t, y, a: -y, 1.0, (0.0, 3.0), solver=jode.Adaptive(method, 0.0, 1e-8 * 2**0.5))
    np.testing.assert_allclose(sol.ys[:, 0], alone.ys, rtol=1e-13)
    assert sol.stats == alone.stats
    both = jode.solve(two, jnp.array([1.0, 0.0]), (0.0, 3.0), 1.0, solver=jode.Adaptive(method, 0.0, 1e-8))
    assert both.stats.steps > 5 * sol.stats.steps


SAME = {
    "a prefix": {"a": 1e-5, "b": 1e-5, "z": 1e-5},
    "leaves that broadcast": {"a": jnp.full((3,), 1e-5), "b": np.full((1,), 1e-5), "z": np.float32(1e-5)},
    "all components": {"a": jnp.full((1, 3), 1e-5), "b": jnp.full((2,), 1e-5), "z": 1e-5},
}


@pytest.mark.parametrize(
    ("form", "adjoint"),
    [
        *((form, None) for form in SAME),
        *(("leaves that broadcast", a) for a in ADJOINTS[2:]),
        pytest.param("leaves that broadcast", ADJOINTS[1], marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_equal_tolerances_are_one_tolerance(form, adjoint):
    ts, a = (0.0, 1.0, 2.0), 0.7

    def run(atol):
        solver = jode.Adaptive(jode.tsit5, 1e-4, atol)
        if adjoint is None:
            sol = jax.jit(lambda y, atol: jode.solve(tree, y, ts, a, solver=jode.Adaptive(jode.tsit5, 1e-4, atol)))(TREE, atol)
            return sol.ys, sol.stats
        end = lambda y, a: jode.odeint(tree, y, ts, a, solver=solver, adjoint=adjoint)["a"].sum()
        return jax.grad(end, (0, 1))(TREE, a)

    for x, y in zip(jax.tree.leaves(run(SAME[form])), jax.tree.leaves(run(1e-5)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6 if x.dtype == jnp.float32 else 1e-9)


def wide(t, y, a):
    return -a * y * (1 + jnp.sin(3 * t) * jnp.linspace(0.0, 1.0, y.shape[0]))


@pytest.mark.parametrize(("shared", "size"), [("atol", 2), ("atol", 40), ("y0", 40), ("neither", 2)])
def test_rows_with_tolerances_for_each_component(shared, size):
    """Each row steps as it does alone, whether tolerances are its own or common, wherever rows lie."""
    rng = np.random.default_rng(0)
    y0, atol = rng.normal(size=(3, size)), 10.0 ** rng.uniform(-8, -3, (3, size))
    axes = (None if shared == "y0" else 0, None if shared == "atol" else 0)
    given = [jnp.asarray(x[0] if axis is None else x) for x, axis in zip((y0, atol), axes, strict=True)]

    def solve(y, atol, a):
        return jode.solve(wide, y, (0.0, 0.3, 2.0), a, solver=jode.Adaptive(jode.bosh3, 1e-6, atol))

    gradient = jax.jit(jax.grad(lambda y, atol, a: jnp.sum(solve(y, atol, a).ys[-1] ** 2), (0, 2)))
    a = jnp.array([1.0, 2.0, 3.0])
    sol, grads = jax.jit(jax.vmap(solve, (*axes, 0)))(*given, a), jax.jit(jax.vmap(gradient, (*axes, 0)))(*given, a)
    steps = set()
    for i in (0, 2):
        own = [x if axis is None else x[i] for x, axis in zip(given, axes, strict=True)]
        alone = solve(*own, a[i])
        steps.add(int(alone.stats.steps))
        assert alone.stats.steps == sol.stats.steps[i]
        np.testing.assert_allclose(sol.ys[i], alone.ys, rtol=1e-11, atol=1e-14)
        for x, y in zip(grads, gradient(*own, a[i]), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-10, atol=1e-14)
    assert len(steps) > 1


def test_many_rows_with_tolerances_of_their_own_finish_in_groups():
    rng = np.random.default_rng(1)
    atol = jnp.asarray(10.0 ** np.where(rng.uniform(size=(4100, 1)) < 0.02, -6, rng.uniform(-4, -2, (4100, 2))))
    y0 = jnp.asarray(rng.normal(size=(4100, 2)))
    solve = lambda y, atol: jode.solve(lotka_volterra, 1 + y**2, (0.0, 1.0), solver=jode.Adaptive(jode.bosh3, 0.0, atol))
    sol = jode.check(jax.vmap(solve)(y0, atol))
    few = np.argsort(sol.stats.steps)[jnp.array([0, 2000, 4098, 4099])]
    for i in few:
        np.testing.assert_allclose(sol.ys[i], solve(y0[i], atol[i]).ys, rtol=1e-11)


def test_traced_tolerances_of_components_out_of_range_are_a_status():
    solve = lambda rtol, atol: jode.solve(two, jnp.array([1.0, 0.0]), (0.0, 1.0), 1.0, solver=jode.Adaptive(rtol=rtol, atol=atol))
    atol = jnp.array([[1e-3, 1e-3], [1e-3, -1e-3], [1e-3, 0.0], [np.nan, 1e-3], [np.inf, 1e-3]])
    good = lambda rtol: [int(s) for s in jax.vmap(solve, (None, 0))(rtol, atol).status]
    bad = Status.invalid_input
    assert good(1e-3) == [Status.success, bad, Status.success, bad, bad]
    assert good(0.0) == [Status.success, bad, bad, bad, bad]


def test_observers_have_no_tolerance():
    """What they keep is of another dtype, in a vector of its own, and is not measured."""

    @dataclass(frozen=True)
    class Count(jode.Observer):
        def init(self, t, y, args):
            return jnp.zeros((), jnp.float16)

        def step(self, kept, t, y, args):
            return kept + 1

    atol = {"a": 1e-7, "b": 1e-2, "z": 1e-4}
    solve = lambda **more: jode.solve(tree, TREE, (0.0, 2.0), 0.7, solver=jode.Adaptive(rtol=1e-4, atol=atol), **more)
    seen, sol = solve(observe=Count()), solve()
    assert int(seen.observed) == int(sol.stats.accepted)
    assert seen.stats.steps == sol.stats.steps


@pytest.mark.parametrize("own", [False, True], ids=["the solve's", "its own"])
def test_the_way_back_weighs_the_adjoint_like_the_state(own):
    """A component that needs small steps is left alone on both ways where its tolerance is loose; the other's gradient is as good."""
    atol = {"slow": 1e-8, "fast": 1e30}
    f = lambda t, y, a: {"slow": -a * y["slow"], "fast": 0.05 * jnp.cos(50 * t) + 0 * y["fast"]}
    count = []

    def gradient(back):
        solver = jode.Adaptive(rtol=1e-8, atol=back if not own else 1e-9)
        adjoint = jode.Backsolve(jode.Adaptive(rtol=0.0, atol=back)) if own else jode.Backsolve()
        solver = solver if own else jode.Adaptive(rtol=0.0, atol=back)
        g = lambda t, y, a: (jax.debug.callback(count.append, t), f(t, y, a))[1]
        end = lambda a: jode.odeint(g, {"slow": 1.0, "fast": 0.0}, (0.0, 1.0), a, solver=solver, adjoint=adjoint)["slow"][-1]
        count.clear()
        found = jax.jit(jax.vmap(jax.grad(end)))(jnp.array([1.0, 2.0]))
        jax.effects_barrier()
        np.testing.assert_allclose(found, -np.exp(-np.array([1.0, 2.0])), rtol=1e-6)
        return len(count)

    assert gradient(atol) < gradient(1e-8)


# Another norm of the errors.


def largest(e):
    return jnp.max(jnp.stack([jnp.max(x).astype(float) for x in jax.tree.leaves(e)]))


def root_mean_square(e):
    total = sum(jnp.sum(x.astype(float) ** 2) for x in jax.tree.leaves(e))
    return jnp.sqrt(total / sum(x.size for x in jax.tree.leaves(e)))


@pytest.mark.parametrize("adjoint", [None, *ADJOINTS[1:]], ids=str)
def test_the_default_norm_is_the_root_mean_square(adjoint):
    """Written by hand it takes the same steps, on both ways."""

    def run(norm):
        solver = jode.Adaptive(jode.tsit5, 1e-4, {"a": 1e-6, "b": 1e-4, "z": 1e-5}, norm=norm)
        if adjoint is None:
            return jode.solve(tree, TREE, (0.0, 1.0, 2.0), 0.7, solver=solver)
        end = lambda y, a: jode.odeint(tree, y, (0.0, 1.0, 2.0), a, solver=solver, adjoint=adjoint)["a"].sum()
        return jax.grad(end, (0, 1))(TREE, 0.7)

    for x, y in zip(*(jax.tree.leaves(run(n)) for n in (root_mean_square, None)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6 if x.dtype == jnp.float32 else 1e-9)


@pytest.mark.parametrize("size", [2, 40])
def test_rows_under_the_largest_error(size):
    y0 = jnp.asarray(np.random.default_rng(0).normal(size=(3, size)))
    solver = jode.Adaptive(jode.bosh3, 1e-6, 1e-6, norm=largest)
    solve = lambda y, a: jode.solve(wide, y, (0.0, 2.0), a, solver=solver)
    gradient = jax.jit(jax.grad(lambda y, a: jnp.sum(solve(y, a).ys[-1] ** 2), (0, 1)))
    a = jnp.array([1.0, 2.0, 3.0])
    sol, grads = jax.jit(jax.vmap(solve))(y0, a), jax.jit(jax.vmap(gradient))(y0, a)
    default = jax.vmap(lambda y, a: jode.solve(wide, y, (0.0, 2.0), a, solver=jode.Adaptive(jode.bosh3, 1e-6, 1e-6)))(y0, a)
    assert (sol.stats.accepted > default.stats.accepted).all()
    for i in (0, 2):
        assert sol.stats.steps[i] == solve(y0[i], a[i]).stats.steps
        for x, y in zip(grads, gradient(y0[i], a[i]), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-10, atol=1e-14)


def test_what_a_norm_leaves_out_takes_no_steps_and_hides_no_failure():
    solver = jode.Adaptive(jode.tsit5, 0.0, 1e-8, norm=lambda e: e[0])
    sol = jode.solve(two, jnp.array([1.0, 0.0]), (0.0, 3.0), 1.0, solver=solver, observe=Widest())
    alone = jode.solve(lambda t, y, a: -y, 1.0, (0.0, 3.0), solver=jode.Adaptive(jode.tsit5, 0.0, 1e-8))
    np.testing.assert_allclose(sol.ys[:, 0], alone.ys, rtol=1e-13)
    assert sol.stats == alone.stats
    lost = jode.solve(lambda t, y, a: jnp.stack([-y[0], jnp.where(t > 0.5, jnp.nan, 0.0)]), jnp.ones(2), (0.0, 1.0), solver=solver)
    assert lost.status != Status.success
    assert np.isnan(lost.ys[-1]).all()


# Steps of a width.

decay = lambda t, y, a: -a * y


@pytest.mark.parametrize(
    ("ts", "width", "steps"),
    [
        ((0.0, 1.0), 0.1, 10),
        ((1.0, 0.0), 0.3, 4),
        ((0.0, 1.0), 5.0, 1),
        ((0.0, 0.1, 0.45), 0.1, 4),
        ((0.3, 0.3), 0.1, 1),
        (np.linspace(0, 1, 11), 0.1, 1),
        (np.linspace(0, 1.1, 2), 0.1, 11),
        (np.linspace(100, 101, 11, dtype=np.float32), 0.1, 1),
        (np.linspace(0, 1, 11), 0.0999, 2),
        ((0.0, 1.0), np.inf, 1),
    ],
    ids=str,
)
def test_a_width_is_as_many_steps_as_the_longest_interval_needs(ts, width, steps):
    """The same numbers as with that count, whether it is found before the program is traced or by it."""
    y0 = jnp.array([1.0, 2.0])
    want = jode.solve(decay, y0, ts, 0.7, solver=jode.Fixed(jode.heun, steps))
    sol = jode.solve(decay, y0, ts, 0.7, solver=jode.Fixed(jode.heun, width=width))
    traced = jax.jit(lambda w: jode.solve(decay, y0, ts, 0.7, solver=jode.Fixed(jode.heun, width=w, max_steps=16)))(width)
    moved = jax.jit(lambda ts: jode.solve(decay, y0, ts, 0.7, solver=jode.Fixed(jode.heun, width=width)))(jnp.asarray(ts))
    assert np.array_equal(sol.ys, want.ys)
    for found in (sol, traced, moved):
        assert found.stats.steps == (len(ts) - 1) * steps
        np.testing.assert_allclose(found.ys, want.ys, rtol=1e-12)


def test_a_known_width_is_a_scan_and_a_traced_one_changes_without_compiling():
    traces = []
    f = lambda t, y, a: (traces.append(1), -a * y)[1]
    solve = lambda **steps: jode.odeint(f, 1.0, (0.0, 1.0), 0.7, solver=jode.Fixed(jode.rk4, **steps))[-1]
    known, counted = (jax.jit(lambda n=n: solve(**n)).lower().as_text() for n in ({"width": 0.125}, {"steps": 8}))
    assert known == counted
    run = jax.jit(lambda width: solve(width=width))
    first, before = abs(run(0.25) - np.exp(-0.7)), len(traces)
    assert 14 < first / abs(run(0.125) - np.exp(-0.7)) < 18  # fourth order
    assert len(traces) == before


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_rows_have_widths_and_gradients(adjoint):
    def end(a, width, t1):
        ts = jnp.stack([jnp.zeros_like(t1), t1 / 3, t1])
        return jode.odeint(decay, 1.0, ts, a, solver=jode.Fixed(jode.rk4, width=width, max_steps=64), adjoint=adjoint)[-1]

    a, width, t1 = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.1, 0.07, 0.05]), jnp.array([1.0, -1.0, 2.0])
    gradient = jax.jit(jax.vmap(jax.grad(end, (0, 2))))(a, width, t1)
    exact = -t1 * np.exp(-a * t1), -a * np.exp(-a * t1)
    for found, want in zip(gradient, exact, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-4)


PLACES = {
    "no time": ([0.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.5, 1.0]),
    "start": ([0.0, 0.0, 0.5, 1.0], [0.0, 0.2, 0.5, 0.6]),
    "middle": ([0.0, 0.4, 0.4, 1.0], [0.0, 0.1, 0.2, 2.0]),
    "end": ([0.0, 0.5, 1.0, 1.0], [0.0, 0.2, 0.3, 0.4]),
    "other lengths": ([0.0, 0.4, 1.0, 1.2], [0.0, 1.0, 1.5, 2.0]),
}


@pytest.mark.parametrize(
    ("solver", "adjoint", "nodes"),
    [
        (jode.Fixed(jode.rk4, width=0.1), jode.Backprop(), None),
        (jode.Fixed(jode.rk4, width=0.1), jode.Backprop(3), "jumps"),
        (jode.Fixed(jode.leapfrog, width=0.1), jode.Backprop(), "stops"),
        (jode.Fixed(jode.reversible_heun, width=0.1, max_steps=64), jode.MemoryFree(), None),
        (jode.Adaptive(jode.dopri5, 1e-9, 1e-9), jode.Backprop(), "jumps"),
        (jode.Adaptive(jode.leapfrog, 1e-5, 1e-5), jode.Backprop(), "stops"),
        (jode.Adaptive(jode.reversible_heun, 1e-5, 1e-5), jode.MemoryFree(), None),
    ],
    ids=str,
)
def test_rows_of_other_lengths_or_none_have_all_derivatives(solver, adjoint, nodes):
    """Both ways through time, forward and reverse derivatives by times and arguments agree, and are those of the rows alone."""

    def one(ts, a, at):
        given = {"stops": {"stops": at}, "jumps": {"jumps": (at, lambda t, y, a: y + 0.3 * t * a)}, None: {}}[nodes]
        f = lambda t, y, a: -a * y * (1 + 0.3 * jnp.sin(t))
        return jode.odeint(f, jnp.array([1.0, 2.0]), ts, a, solver=solver, adjoint=adjoint, **given)

    rows = lambda ts, a, at: jax.vmap(one, (0, None, None))(ts, a, at)

    @jax.jit
    def both(ts, at, moved, weights):
        dots, pull = jax.jvp(lambda *x: rows(*x, at), (ts, 0.7), moved)[1], jax.vjp(lambda *x: rows(*x, at), ts, 0.7)[1]
        return dots, pull(weights)

    alone = jax.jit(lambda ts, at, dts, da: jax.jvp(lambda *x: one(*x, at), (ts, 0.7), (dts, da))[1])
    for place, sign in itertools.product(PLACES, (1.0, -1.0)):
        ts, at = sign * jnp.array(PLACES[place]), sign * jnp.array([0.3, 0.4, 0.4])
        moved = jnp.cos(jnp.arange(8.0)).reshape(2, 4), 0.7
        weights = jnp.sin(1 + jnp.arange(16.0)).reshape(2, 4, 2)
        dots, (tbar, abar) = both(ts, at, moved, weights)
        there, back = jnp.sum(weights * dots), jnp.sum(tbar * moved[0]) + abar * moved[1]
        np.testing.assert_allclose(there, back, rtol=1e-12, atol=1e-12, err_msg=f"{place}, {sign}")
        want = [alone(ts[i], at, moved[0][i], moved[1]) for i in (0, 1)]
        np.testing.assert_allclose(dots, want, rtol=1e-7, atol=1e-7, err_msg=f"{place}, {sign}")


def test_the_way_back_may_have_a_width():
    adjoint = jode.Backsolve(jode.Fixed(jode.rk4, width=0.05))
    end = lambda a, t1: jode.odeint(decay, 1.0, jnp.stack([0.0, 0.1, t1]), a, solver=jode.Fixed(jode.rk4, 20), adjoint=adjoint)[-1]
    found = jax.vmap(jax.grad(end))(jnp.array([0.7, 0.7]), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found, -np.array([1.0, 2.0]) * np.exp(-0.7 * np.array([1.0, 2.0])), rtol=1e-6)


@pytest.mark.parametrize("width", [0.0, -0.1, np.nan, 0.01, 1e-12])
def test_a_traced_width_out_of_range_is_a_status(width):
    solve = lambda w: jode.solve(decay, 1.0, (0.0, 1.0), 0.7, solver=jode.Fixed(jode.rk4, width=w, max_steps=16))
    sol = jax.vmap(solve)(jnp.array([0.1, width]))
    assert list(sol.status) == [Status.success, Status.invalid_input]


def test_validity_knows_widths():
    assert jode.validity.error_scale(jode.Fixed(jode.rk4, width=0.1)) == pytest.approx(1e-4)
    assert jode.validity.error_scale(jode.Fixed(jode.rk4)) == 1.0


# Weights that all layers share.

RNG = np.random.default_rng(3)
NET = {"own": {"a": jnp.asarray(RNG.normal(size=(6, 3, 3)))}, "all": [jnp.asarray(RNG.normal(size=3)), jnp.asarray(2), "tanh"]}
REPEATED = {"own": NET["own"], "all": [jnp.tile(NET["all"][0], (6, 1)), jnp.full(6, 2), "tanh"]}
AXES = {"own": 0, "all": None}
X = jnp.array([0.3, -0.2, 0.9])


def block(t, x, w):
    b, n, name = w["all"]
    assert name == "tanh"
    return jnp.tanh(w["own"]["a"] @ x * n.astype(float) + b + t)


@pytest.mark.parametrize(
    ("method", "degree", "adjoint"),
    [
        (jode.euler, 0, jode.Backprop()),
        (jode.euler, 0, jode.MemoryFree()),
        (jode.heun, 1, jode.Backprop(2)),
        pytest.param(jode.euler, 0, jode.Backprop(2), marks=pytest.mark.sweep),
        pytest.param(jode.heun, 1, jode.Backprop(), marks=pytest.mark.sweep),
        pytest.param(jode.heun, 1, jode.MemoryFree(), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_shared_weights_get_the_sum_of_the_gradients_of_their_copies(method, degree, adjoint):
    steps = 6 - degree

    def loss(a, b, w, axes, x):
        w = {"own": {"a": a}, "all": [b, *w["all"][1:]]}
        ts = (0.0, 0.2, 1.0) if steps % 2 == 0 else (0.0, 1.0)
        return jnp.sum(jode.odeint(block, x, ts, w, solver=jode.Layers(method, degree, axes), adjoint=adjoint)[1:] ** 2)

    for batch in (False, True):
        x = jnp.stack([X, 2 * X]) if batch else X
        total = lambda a, b, w, axes, x, batch=batch: (
            jnp.sum(jax.vmap(lambda x: loss(a, b, w, axes, x))(x)) if batch else loss(a, b, w, axes, x)
        )
        grad = lambda w, axes, b, x, total=total: jax.jit(jax.value_and_grad(lambda a, b, x: total(a, b, w, axes, x), (0, 1, 2)))(
            NET["own"]["a"], b, x
        )
        value, (a, b, xbar) = grad(NET, AXES, NET["all"][0], x)
        want, (a_, b_, xbar_) = grad(REPEATED, 0, REPEATED["all"][0], x)
        for found, expected in ((value, want), (a, a_), (b, jnp.sum(b_, axis=0)), (xbar, xbar_)):
            np.testing.assert_allclose(found, expected, rtol=1e-11)
    slope = jax.grad(lambda b: loss(NET["own"]["a"], b, NET, AXES, X))
    each, alone = jax.jit(lambda b: (jax.vmap(slope)(jnp.stack([b, jnp.ones(3)])), slope(b)))(NET["all"][0])
    np.testing.assert_allclose(each[0], alone, rtol=1e-11)


def test_resnet_and_observers_with_shared_weights():
    """x + block_n(x), by hand; the observer sees the first layer's slice at the start and each layer's after."""

    @dataclass(frozen=True)
    class Sums(jode.Observer):
        def init(self, t, y, args):
            return jnp.sum(args["own"]["a"]) + jnp.sum(args["all"][0])

        def step(self, kept, t, y, args):
            return kept + jnp.sum(args["own"]["a"]) + jnp.sum(args["all"][0])

    x = X
    for n in range(6):
        x = x + block(float(n), x, {"own": {"a": NET["own"]["a"][n]}, "all": NET["all"]})
    np.testing.assert_allclose(jode.resnet(block, X, NET, depth_axes=AXES), x, rtol=1e-13)
    solver = jode.Layers(jode.euler, depth_axes=AXES)
    sol = jax.jit(lambda w: jode.solve(block, X, (0.0, 6.0), {**NET, "own": w}, solver=solver, observe=Sums()))(NET["own"])
    np.testing.assert_allclose(sol.ys[-1], x, rtol=1e-13)
    sums = jnp.sum(NET["own"]["a"], axis=(1, 2)) + jnp.sum(NET["all"][0])
    np.testing.assert_allclose(sol.observed, sums[0] + jnp.sum(sums), rtol=1e-12)


def test_depth_axes_are_a_value():
    """Equal ones compile once, and a network is an argument of a jitted function like any other."""
    traces = []
    f = lambda t, x, w: (traces.append(1), block(t, x, w))[1]
    for _ in range(2):
        jode.odeint(f, X, (0.0, 1.0), NET, solver=jode.Layers(jode.euler, depth_axes={"own": 0, "all": None}))
    assert len(traces) == 1
    assert jode.Layers(jode.euler, depth_axes=AXES) == jode.Layers(jode.euler, depth_axes=dict(AXES))
    run = jax.jit(lambda solver: jode.odeint(block, X, (0.0, 1.0), NET, solver=solver)[-1])
    assert np.isfinite(run(jode.Layers(jode.euler, depth_axes=AXES))).all()


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ({"own": 0}, "depth_axes must have the structure of args"),
        ({"own": 0, "all": 1}, "must hold 0 .* and None"),
        (None, "same depth"),
        (0, "same depth"),
        ({"own": 0, "all": [None, 0, None]}, "same depth"),
    ],
)
def test_impossible_depth_axes_are_refused(axes, match):
    for call in (
        lambda: jode.odeint(block, X, (0.0, 1.0), NET, solver=jode.Layers(jode.euler, depth_axes=axes)),
        lambda: jode.resnet(block, X, NET, depth_axes=axes, span=1.0),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# Beside stops and jumps.


@pytest.mark.parametrize("solver", ["adaptive", "fixed"])
def test_stops_keep_the_widest_step_and_the_tolerances(solver):
    """A kick at t = 50 in the middle of rest, and a pulse at t = 100."""
    jumps = (jnp.array([50.0]), lambda t, y, a: {"u": y["u"] + 2, "v": y["v"] - 1})
    f = lambda t, y, a: {"u": pulse(t, y, a), "v": -0.1 * y["v"]}

    def solve(a, atol):
        adaptive = jode.Adaptive(rtol=1e-6, atol={"u": atol, "v": 1e-8}, max_step=1.0)
        control = adaptive if solver == "adaptive" else jode.Fixed(jode.rk4, width=0.5)
        return jode.solve(f, {"u": 0.0, "v": 0.0}, (0.0, 200.0), a, solver=control, jumps=jumps, observe=Widest())

    sol = jax.jit(jax.vmap(solve))(jnp.array([1.0, 2.0]), jnp.array([1e-8, 1e-3]))
    np.testing.assert_allclose(sol.ys["u"][:, -1], 2 + np.sqrt(np.pi) * np.array([1.0, 2.0]), rtol=1e-5)
    assert (sol.observed["h"] <= 1 + 1e-13).all()
    slope = jax.jit(jax.grad(lambda a: solve(a, 1e-7).ys["u"][-1]))(1.0)
    np.testing.assert_allclose(slope, np.sqrt(np.pi), rtol=1e-5)
