"""What is data does not recompile; what is small stays small."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode


def counted():
    traces = []

    def f(t, y, args):
        traces.append(1)
        return -args * y

    return f, traces


@pytest.mark.parametrize(
    "make", [lambda: jode.Adaptive(jode.tsit5, 1e-5, 1e-6), lambda: jode.Fixed(jode.rk4, 10)], ids=["adaptive", "fixed"]
)
def test_three_calls_with_equal_but_fresh_solvers_trace_once(make):
    f, traces = counted()
    for value in (1.0, 2.0, 3.0):
        jode.solve(f, jnp.array([value]), (0.0, value), value, solver=make(), adjoint=jode.Backprop())
    assert len(traces) == 1


def test_new_tolerances_times_states_and_arguments_do_not_retrace():
    f, traces = counted()
    for i in range(1, 5):
        solver = jode.Adaptive(jode.dopri5, 10.0**-i, 10.0**-i)
        jode.solve(f, jnp.array([float(i)]), np.linspace(0, i, 3), float(i), solver=solver)
    assert len(traces) == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_a_changing_step_count_does_not_recompile(gradient):
    f, traces = counted()
    value = lambda y, n: jode.odeint(f, y, (0.0, 1.0), 1.0, solver=jode.Fixed(jode.euler, n))[-1, 0]
    run = jax.jit(jax.grad(value) if gradient else value)
    for n in (3, 8, 40, 1):
        np.testing.assert_allclose(run(jnp.ones(1), n), (1 - 1 / n) ** n, rtol=1e-12)
    assert len(traces) == 1
    assert run._cache_size() == 1


def test_solvers_are_pytrees_of_their_numbers():
    f, traces = counted()
    run = jax.jit(lambda solver: jode.odeint(f, jnp.ones(1), (0.0, 1.0), 1.0, solver=solver)[-1, 0])
    for tol in (1e-3, 1e-9):
        assert abs(run(jode.Adaptive(jode.tsit5, tol, tol)) - np.exp(-1)) < tol
    for n in (4, 9):
        run(jode.Fixed(jode.euler, n))
    assert len(traces) == 2
    assert jax.tree.leaves(jode.Fixed(jode.rk4, 7)) == [7]
    assert hash(jode.Adaptive()) == hash(jode.Adaptive())


def test_changed_closures_are_new_functions():
    make = lambda k: lambda t, y, a: k * y
    for k in (1.0, 2.0):
        y = jode.odeint(make(k), jnp.ones(1), (0.0, 1.0), solver=jode.Adaptive(jode.tsit5, 1e-9, 1e-9))
        np.testing.assert_allclose(y[-1, 0], np.exp(k), rtol=1e-7)


def test_static_leaves_of_args_may_change():
    f = lambda t, y, a: -y * a["power"] if a["on"] else 0 * y
    for power, on in ((1, True), (2, True), (2, False)):
        y = jode.odeint(f, jnp.ones(1), (0.0, 1.0), {"power": power, "on": on}, solver=jode.Adaptive(jode.tsit5, 1e-9, 1e-9))
        np.testing.assert_allclose(y[-1, 0], np.exp(-power * on), rtol=1e-7)


def test_repeated_calls_are_bitwise_equal_and_keep_nothing():
    f = lambda t, y, a: jnp.sin(y)
    first = jode.odeint(f, jnp.ones(3), (0.0, 1.0))
    before = len(jax.live_arrays())
    for _ in range(50):
        assert np.array_equal(jode.odeint(f, jnp.ones(3), (0.0, 1.0)), first)
    assert len(jax.live_arrays()) <= before + 1


def test_the_program_of_a_fixed_step_solve_is_small():
    """Lines of StableHLO of ten Heun steps of a small perceptron: a hand-written scan takes 39, diffrax 1,047; 12 of jode's say that
    all operands of one function are used.
    """
    w = (jnp.ones((4, 16)), jnp.ones((16, 4)))
    solve = lambda y: jode.odeint(lambda t, y, w: jnp.tanh(y @ w[0]) @ w[1], y, (0.0, 1.0), w, solver=jode.Fixed(jode.heun, 10))[-1]
    assert len(jax.jit(solve).lower(jnp.ones(4)).as_text().splitlines()) < 160 + 12


def test_the_programs_of_an_adaptive_solve_are_small():
    """Lines of StableHLO of Tsit5 on two components: diffrax takes 1,064 and for the gradient 2,359, a plain loop 451 and 1,178. 100
    of jode's tell whether a solve that ran out of steps is stiff, or its f noisy, 60 what the narrowest step may err by, and 52 of
    the gradient's that all operands of its functions are used.
    """
    f = lambda t, y, a: jnp.stack([a[0] * y[0] - a[1] * y[0] * y[1], -a[2] * y[1] + a[3] * y[0] * y[1]])
    loss = lambda y, a: jnp.sum(jode.odeint(f, y, (0.0, 1.0), a, solver=jode.Adaptive(jode.tsit5, 1e-6, 1e-6))[-1] ** 2)
    lines = [len(jax.jit(g).lower(jnp.ones(2), jnp.ones(4)).as_text().splitlines()) for g in (loss, jax.grad(loss, 1))]
    assert lines[0] < 650 + 160
    assert lines[1] < 1450 + 112


@pytest.mark.parametrize("mode", ["disable_jit", "checking_leaks"])
def test_other_modes_of_jax(mode):
    with jax.disable_jit() if mode == "disable_jit" else jax.checking_leaks():
        g = jax.grad(
            lambda a: jode.odeint(lambda t, y, a: -a * y, jnp.ones(1), (0.0, 1.0), a, solver=jode.Fixed(jode.heun, 4))[-1, 0]
        )(1.0)
    h = 0.25
    np.testing.assert_allclose(g, 4 * (1 - h + h * h / 2) ** 3 * (-h + h * h), rtol=1e-12)


def test_importing_jode_loads_jax_alone_and_rooms_where_they_are_used():
    code = (
        "import sys, jode; heavy = {'diffrax', 'equinox', 'optax', 'optimistix', 'matplotlib'}; "
        "assert not heavy & set(sys.modules), 'at the door'; "
        "jode.validity.swap, jode.audit.gradient, jode.depth.distance, jode.regularize.kinetic; "
        "assert not {'diffrax', 'equinox', 'optax'} & set(sys.modules), 'in the rooms'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = jode.nonsense  # pyright: ignore


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 20), jode.Adaptive(jode.rodas5p, 1e-6, 1e-6)], ids=["rk4", "rodas5p"])
def test_components_however_often_they_are_written_are_taken_once(solver):
    """Their derivatives are those of a field that writes none; what goes back to them is one concatenation, not padded vectors."""
    M = jnp.array([[-1.0, 0.5, 0.0], [0.2, -2.0, 0.3], [0.0, 1.0, -0.5]])
    whole = lambda t, y, k: k * (M @ y) + jnp.flip(y) * y[:2].sum()
    y0, k = jnp.array([1.0, -0.5, 0.3]), jnp.array([1.0, 2.0, 0.5])

    def written(t, y, k):
        both = y[0] + y[:2][1]
        first = k[0] * (M[0, 0] * y[0] + M[0, 1] * y[1]) + y[2] * both
        second = k[1] * (M[1, 0] * y[-3] + M[1, 1] * y[1] + M[1, 2] * y[2]) + y[1] * both
        return jnp.stack([first, second, k[2] * (M[2, 1] * y[1] + M[2, 2] * y[::2][1]) + y[0] * both])

    loss = lambda f: lambda y, k: jnp.sum(jode.odeint(f, y, (0.0, 1.0), k, solver=solver)[-1] ** 3)
    both = lambda f: (jax.jit(jax.value_and_grad(loss(f), (0, 1)))(y0, k), jax.jacfwd(jax.grad(loss(f)))(y0, k))
    for a, b in zip(*map(jax.tree.leaves, map(both, (written, whole))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    rows = jax.vmap(jax.grad(loss(written), (0, 1)), (0, None))(jnp.stack([2 * y0, y0]), k)
    np.testing.assert_allclose(rows[1][1], jax.grad(loss(whole), 1)(y0, k), rtol=1e-9)


def test_the_way_back_of_components_has_no_padded_vectors():
    f = lambda t, y, k: jnp.stack([k[0] * y[0] * y[1], y[0] + k[1] * y[1] * y[0]])
    loss = lambda k: jode.odeint(f, jnp.ones(2), (0.0, 1.0), k, solver=jode.Fixed(jode.euler, 3))[-1, 0]
    lines = jax.jit(jax.grad(loss)).lower(jnp.ones(5)).as_text().splitlines()
    assert not [x for x in lines if "stablehlo.pad" in x and x.endswith("-> tensor<5xf64>")]
    assert [x for x in lines if "stablehlo.concatenate" in x and x.endswith("-> tensor<5xf64>")]
