"""A solve inside of JAX's control flow, mapped over rows: the program of each row, whatever is staged before and what after the map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import jode

SOLVES = {
    "adaptive": (jode.Adaptive(jode.tsit5, 1e-6, 1e-6), jode.Backprop()),
    "few states": (jode.Adaptive(jode.bosh3, 1e-4, 1e-4), jode.Backprop(2)),
    "fixed": (jode.Fixed(jode.rk4, 5), jode.Backprop()),
    "memory free": (jode.Fixed(jode.leapfrog, 5), jode.MemoryFree()),
    "continuous": (jode.Fixed(jode.rk4, 20), jode.Backsolve()),
}


def end(name):
    solver, adjoint = SOLVES[name]
    field = lambda t, y, a: -a * y * jnp.cos(t * y[::-1])
    return lambda y, a: jode.odeint(field, y, (0.0, 1.0), a, solver=solver, adjoint=adjoint)[-1]


def newton(solve, y, a):
    """Three fixed-point iterations, each with a linear map that is compiled by itself."""

    def iterate(_, y):
        residual, tangent = jax.linearize(lambda y: solve(y, a), y)
        return y - 0.1 * jax.jit(tangent)(residual)

    return jax.lax.fori_loop(0, 3, iterate, y)


def march_in_turns(solve, y, a):
    """A loop of unknown length whose turns ask for a forward derivative, by a literal, of a solve that closes over the state."""

    def turn(c):
        i, y = c
        out, dot = jax.jvp(lambda s: solve(s * y, a), (1.0,), (1.0,))
        return i + 1, out + 0.1 * dot

    return jax.lax.while_loop(lambda c: c[0] < 2, turn, (0, y))[1]


PROGRAMS = {
    "cond": lambda solve, y, a: jax.lax.cond(a > 0.5, lambda y: solve(y, a), lambda y: 2 * solve(y, a), y),
    "shared cond": lambda solve, y, a: jax.lax.cond(jnp.sum(jnp.ones(2)) > 0, lambda y: solve(y, a), lambda y: y, y),
    "switch": lambda solve, y, a: jax.lax.switch(1, [lambda y: y, lambda y: solve(y, a)], y),
    "scan": lambda solve, y, a: jax.lax.scan(lambda y, _: (solve(y, a), None), y, None, length=2)[0],
    "map": lambda solve, y, a: jnp.sum(jax.lax.map(lambda k: solve(k * y, a), jnp.array([1.0, 2.0])), 0),
    "jit": lambda solve, y, a: jax.jit(solve)(y, a),
    "checkpoint": lambda solve, y, a: jax.checkpoint(solve)(y, a),
}
LOOPS = {"newton": newton, "turns": march_in_turns}  # of unknown length, which have no reverse mode


def rows_of(n):
    y = jnp.asarray(np.random.default_rng(0).uniform(0.2, 1.0, (n, 2)))
    return y, jnp.linspace(0.2, 1.0, n)


def mapped_is_looped(f, n):
    y, a = rows_of(n)
    mapped = jax.jit(jax.vmap(f))(y, a)
    for i in (0, n - 1):
        alone = jax.jit(f)(y[i], a[i])
        jax.tree.map(lambda m, x: np.testing.assert_allclose(m[i], x, rtol=1e-11, atol=1e-12), mapped, alone)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", SOLVES)
def test_gradients_of_solves_inside_control_flow_are_those_of_each_row(name, program):
    """What is recorded of a row has the same shapes in every batch: JAX stages a program and its transpose, and maps both later."""
    solve = end(name)
    mapped_is_looped(jax.grad(lambda y, a: jnp.sum(jnp.sin(PROGRAMS[program](solve, y, a))), (0, 1)), 12)


@pytest.mark.parametrize("program", LOOPS)
@pytest.mark.parametrize("name", SOLVES)
def test_derivatives_inside_loops_are_those_of_each_row(name, program):
    solve = end(name)
    mapped_is_looped(lambda y, a: LOOPS[program](solve, y, a), 12)


@pytest.mark.parametrize("program", ["cond", "scan", "newton"])
@pytest.mark.parametrize("rows", [1, 3, 33, 1000])
def test_control_flow_of_any_number_of_rows(rows, program):
    solve, of = end("adaptive"), (PROGRAMS | LOOPS)[program]
    value = lambda y, a: jnp.sum(of(solve, y, a))
    mapped_is_looped(value if program in LOOPS else jax.grad(value), rows)


@pytest.mark.parametrize(
    "gradient", [lambda f: jax.vmap(jax.grad(f, 1)), lambda f: jax.grad(lambda y, a: jnp.sum(jax.vmap(f)(y, a)), 1)]
)
def test_tables_are_those_of_the_batch_where_it_is_known(gradient):
    """4,096 steps of one row fit a small table, those of a thousand rows do not."""
    value = lambda y, a: jnp.sum(end("adaptive")(y, a))
    assert "4096" not in jax.jit(gradient(value)).lower(*rows_of(1000)).as_text().replace("dense<4096>", "")


def test_second_derivatives_inside_control_flow():
    solve = end("few states")
    value = lambda y, a: jnp.sum(PROGRAMS["scan"](solve, y, a) ** 2)
    mapped_is_looped(lambda y, a: jax.jvp(lambda a: jax.grad(value, 1)(y, a), (a,), (jnp.ones_like(a),)), 12)


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 5), jode.Adaptive(jode.tsit5)], ids=["fixed", "adaptive"])
def test_a_sparse_matrix_by_row(solver):
    """The rules of sparse matrices know of rows that lead, where those of small states lie last."""
    dense = jnp.stack([jnp.diag(jnp.array([1.0, 2.0, 3.0])) * k for k in (1.0, 2.0, 4.0)])
    matrices = sparse.BCOO.fromdense(dense, n_batch=1)
    solve = lambda m, y: jode.odeint(lambda t, y, m: -(m @ y), y, (0.0, 1.0), m, solver=solver)[-1]
    alike = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    y = jnp.ones(3)
    alike(jax.vmap(solve, (0, None))(matrices, y), jax.vmap(solve, (0, None))(dense, y))
    bar = jax.vmap(jax.grad(lambda y, m: jnp.sum(solve(m, y)), 0), (None, 0))
    alike(bar(y, matrices), bar(y, dense))


def double(solver, **given):
    """A solve in float64 inside a program of float32."""

    def g(a):
        with jax.enable_x64(True):
            y = jnp.asarray([1.0, 2.0], jnp.float64)
            f = lambda t, y, a: -a * y * jnp.cos(t)
            sol = jode.solve(f, y, np.array([0.0, 0.5, 1.0]), a.astype(jnp.float64), solver=solver, **given)
            assert sol.ys.dtype == jnp.float64
            return jnp.sum(sol.ys[-1]).astype(jnp.float32)

    return g


@pytest.mark.skipif(not hasattr(jax, "enable_x64"), reason="a context of newer versions of jax")
@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 10), jode.Adaptive(jode.tsit5), jode.Adaptive(jode.rodas5p)], ids=repr)
def test_a_solve_keeps_the_precision_of_the_context_that_it_was_written_in(solver):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        g, a = double(solver), jnp.float32(1.3)
        exact = 3 * np.exp(-1.3 * np.sin(1.0))
        first, second = -np.sin(1.0) * exact, np.sin(1.0) ** 2 * exact
        alike = lambda x, exact: np.testing.assert_allclose(x, exact, rtol=2e-5)
        alike(g(a), exact)
        alike(jax.jit(g)(a), exact)
        alike(jax.jvp(g, (a,), (jnp.ones_like(a),))[1], first)
        alike(jax.grad(g)(a), first)
        alike(jax.jit(jax.vmap(jax.grad(g)))(jnp.stack([a, a])), first)
        alike(jax.jit(jax.hessian(g))(a), second)
        assert not jax.config.jax_enable_x64


def test_settings_of_another_context_do_not_reach_a_trace():
    """Written under loose rules of promotion, lowered under strict ones."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        f = lambda t, y, a: -a * y * jnp.ones((1, 1))[0] * jnp.int32(1)
        loss = lambda a: jnp.sum(jode.odeint(f, jnp.ones(2), (0.0, 1.0), a))
        traced = jax.jit(jax.grad(loss)).trace(1.0)
    np.testing.assert_allclose(traced.lower().compile()(1.0), -2 * np.exp(-1.0), rtol=1e-5)


@pytest.mark.parametrize("adjoint", [jode.Backprop(), jode.MemoryFree(), jode.Backsolve()], ids=repr)
def test_a_traced_python_number_stays_weak_inside_f(adjoint):
    """float32 states stay float32 where a float64 program hands over Python numbers, under strict promotion too."""
    seen = []

    def f(t, y, args):
        slope = -args["k"] * y
        seen.append(slope.dtype)
        return slope

    y0, ts = jnp.ones(2, jnp.float32), jnp.array([0.0, 1.0], jnp.float32)
    solver = jode.Fixed(jode.rk4, 10)
    loss = lambda k: jnp.sum(jode.odeint(f, y0, ts, {"k": k}, solver=solver, adjoint=adjoint)[-1])
    for of in (loss, jax.grad(loss), jax.vmap(loss, axis_size=2, in_axes=None)):
        np.testing.assert_allclose(jax.jit(of)(2.0), of(2.0), rtol=1e-6)
    assert set(seen) == {jnp.dtype(jnp.float32)}


OBSERVERS = {
    "dense": jode.Dense(),
    "steps": jode.Steps(),
    "at": jode.At(jnp.array([0.3]), lambda t, y, a: y[0]),
    "an event that never happens": jode.Event(lambda t, y, a: y[0] - 5.0),
}


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 5), jode.Adaptive()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_who_looks_for_nans_finds_none_where_nothing_is_wrong(name, solver):
    """Nor infinities, but where tables hold nothing. What was recorded for a gradient leaves a program too."""
    solve = lambda a: jode.solve(lambda t, y, a: -a * y, jnp.ones(2), (0.0, 0.5, 1.0), a, solver=solver, observe=OBSERVERS[name])
    loss = lambda a: jnp.sum(solve(a).ys)
    for context in (jax.debug_nans, jax.debug_infs):
        with context(True):
            sol = solve(1.0)
            np.testing.assert_allclose(jax.grad(loss)(1.0), -2 * (0.5 * np.exp(-0.5) + np.exp(-1.0)), rtol=1e-4)
            if name == "dense":
                np.testing.assert_allclose(sol.observed(0.7), np.exp(-0.7), rtol=1e-4)
                assert np.isfinite(jax.tree.leaves(sol.observed)[0]).all()
            if name.startswith("an event"):
                assert sol.observed.count == 0
                assert not np.isfinite(sol.observed.t)


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 2), jode.Adaptive()], ids=["fixed", "adaptive"])
def test_who_looks_for_nans_is_told_the_operation(solver):
    """That of f where it is one by one, the loop it is in elsewhere."""
    f = lambda t, y, a: -a * jnp.log(y - 1.5)
    for of in (
        lambda a: jode.odeint(f, 1.0, (0.0, 1.0), a, solver=solver),
        jax.jit(lambda a: jode.odeint(f, 1.0, (0.0, 1.0), a, solver=solver)),
    ):
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"encountered in (log|scan|while)"):
            of(1.0)


BRANCHES = {
    "adaptive": lambda n: {"solver": jode.Adaptive(jode.tsit5, 1e-8, 1e-8)},
    "chapters": lambda n: {"solver": jode.Adaptive(jode.bosh3, 1e-10, 1e-10)},
    "jumps": lambda n: {
        "solver": jode.Adaptive(jode.tsit5, 1e-8, 1e-8),
        "jumps": (jnp.array([0.3, 0.9]), lambda t, y, k: y * y + k),
    },
    "fixed": lambda n: {"solver": jode.Fixed(jode.rk4, n, max_steps=8)},
    "fixed jumps": lambda n: {
        "solver": jode.Fixed(jode.rk4, n, max_steps=8),
        "jumps": (jnp.array([0.3]), lambda t, y, k: k * y * y),
    },
}


@pytest.mark.parametrize(
    "adjoint", [jode.Backprop(), jode.Backprop(checkpoints=None), jode.Backprop(checkpoints=3), jode.MemoryFree()], ids=str
)
@pytest.mark.parametrize("case", BRANCHES)
def test_rows_of_different_branches_have_records_of_different_length(case, adjoint):
    """A `cond` whose predicate differs by row: each row has what its own branch recorded. In the field log(y) has no other side."""

    def branch(start, n):
        f = lambda t, y, k: -k * y * jnp.log(1 + y)
        solve = lambda k: jode.odeint(f, start, (0.0, 0.6, 1.5), k, adjoint=adjoint, **BRANCHES[case](n))
        return lambda k: jnp.sum(solve(k) * jnp.arange(1.0, 4.0))

    short, long = jnp.asarray(5), jnp.asarray(8)
    loss = lambda k, p: jax.lax.cond(p, branch(1.0, short), branch(3.0, long), k)
    picks = jnp.array([True, False, True])
    both = {p: jax.grad(branch(*x))(0.4) for p, x in ((True, (1.0, short)), (False, (3.0, long)))}
    np.testing.assert_allclose(jax.vmap(jax.grad(loss), (None, 0))(0.4, picks), [both[bool(p)] for p in picks], rtol=1e-7)
