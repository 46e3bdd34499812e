"""Each kind of value can be written outside the package, with public names alone, and works in every mode."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode.control import Equal
from jode.march import March
from jode.observe import Table

A, Y0, TS = 0.8, jnp.array([1.0, 0.4]), (0.0, 0.7, 2.0)


def oscillator(t, y, a):
    return jnp.stack([y[1], -a * y[0] * jnp.cos(t) - y[0] ** 3])


# --- an explicit method: a tableau literal

kutta3 = jode.RungeKutta(jode.Tableau("kutta3", 3, c=(0, 0.5, 1), a=((), (0.5,), (-1.0, 2.0)), b=(1 / 6, 2 / 3, 1 / 6)))


# --- an implicit method: a Jacobian for each row, three Newton iterations, and steps that fail are rejected


@dataclass(frozen=True)
class ImplicitEuler(jode.Method):
    """y1 = y + h f(t + h, y1); the error is estimated by the trapezium rule."""

    order = 1
    embedded_order = 1
    evaluations = trials = 5
    error = ((-0.5, 0.5),)

    def step(self, window, s, slope=()):
        first = slope or window(0.0, s)
        y, jacobian = s, window.jacobian(1.0, s)
        for _ in range(3):
            residual = jax.tree.map(lambda y, s, k: s + window.h * k - y, y, s, window(1.0, y))
            move = window.solve_shifted(jacobian, window.h, residual)
            y = jax.tree.map(jnp.add, y, move)
        small = [window.rows.all(jnp.abs(d) < 1e-2 + 1e-2 * jnp.abs(x)) for d, x in zip(move, y, strict=True)]
        return jode.Step(y, [first, window(1.0, y)], small[0])

    def reused(self, slope):
        return slope


# --- a control: steps that grow by a ratio within each interval


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Growing(Equal):
    """`steps` steps between save times, each `ratio` times as wide as the one before."""

    method: jode.Method = field(metadata={"static": True})
    steps: int = field(metadata={"static": True})
    ratio: float = field(default=1.1, metadata={"static": True})
    runner: jode.Runner = field(default=jode.Compiled(), metadata={"static": True})

    def steps_between(self, intervals, layers):
        return self.steps

    def most_steps(self, intervals, steps):
        return intervals * self.steps

    def span(self, march, problem, a, b, k):
        first = (b - a) * (self.ratio - 1) / (self.ratio**self.steps - 1)
        power = self.ratio ** k.astype(a.dtype)
        return a + first * (power - 1) / (self.ratio - 1), first * power


# --- an observer: the running maximum of |y|


@dataclass(frozen=True)
class Largest(jode.Observer):
    """By `where`: the derivative of `maximum` asks which number equals the largest, and XLA may round the same number in two ways."""

    def init(self, t, y, args):
        return self.step(jnp.zeros_like(y[0]), t, y, args)

    def step(self, kept, t, y, args):
        for size in jnp.abs(y):
            kept = jnp.where(size > kept, size, kept)
        return kept


# --- a table: what each step says of itself


@dataclass(frozen=True)
class Action(Table):
    """Σ |Δy|² / |h| over the steps taken, from a table of their ends, widths and moves."""

    def shapes(self, plan):
        return (jax.ShapeDtypeStruct((1,), plan.time), jax.ShapeDtypeStruct((2,), plan.layout.packed[0].dtype))

    def entry(self, march, t, h, end, s, s1, ks):
        rows, (before,), (after,) = march.rows, march.method.read(s), march.method.read(s1)
        return rows.as_vector(end), rows.joined([rows.as_vector(h), rows.as_vector(rows.sum((after - before) ** 2))])

    def result(self, entries, reached, unflatten):
        ends, (width, move) = entries[0][:, 0], entries[1].T
        taken = ~jnp.isnan(ends)
        return jnp.sum(jnp.where(taken, move, 0) / jnp.where(taken, jnp.abs(width), 1))


# --- an adjoint: plain automatic differentiation of a loop of static length


@dataclass(frozen=True)
class Plain(jode.Adjoint):
    def solve(self, plan, problem):
        return March.of(plan, None, None).run(problem)


# --- a runner: loops in Python


@dataclass(frozen=True)
class InPython(jode.Runner):
    def repeat(self, n, body, carry):
        outs = []
        for k in range(int(n)):
            carry, out = body(jnp.asarray(k, jnp.int32), carry)
            outs.append(out)
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outs) if outs else None

    def until(self, done, body, carry):
        while not done(carry):
            carry = body(carry)
        return carry


SOLVES = {
    "explicit method": {"solver": jode.Fixed(kutta3, 12)},
    "implicit method, fixed": {"solver": jode.Fixed(ImplicitEuler(), 12)},
    "implicit method, adaptive": {"solver": jode.Adaptive(ImplicitEuler(), 1e-4, 1e-4)},
    "control": {"solver": Growing(jode.rk4, 12)},
    "control, recomputed": {"solver": Growing(jode.rk4, 12), "adjoint": jode.Backprop(4)},
    "adjoint": {"solver": jode.Fixed(jode.rk4, 12), "adjoint": Plain()},
    "runner, fixed": {"solver": jode.Fixed(jode.heun, 3, runner=InPython())},
    "runner, adaptive": {"solver": jode.Adaptive(jode.heun, 1e-1, 1e-1, runner=InPython())},
    "observer, fixed": {"solver": jode.Fixed(jode.rk4, 12), "observe": Largest()},
    "observer, adaptive": {"solver": jode.Adaptive(jode.bosh3, 1e-4, 1e-4), "observe": [Largest()]},
    "observer, recomputed": {"solver": jode.Fixed(jode.heun, 12), "observe": Largest(), "adjoint": jode.Backprop(3)},
    "observer, network": {"solver": jode.Layers(jode.euler), "observe": Largest()},
    "table, fixed": {"solver": jode.Fixed(jode.rk4, 12), "observe": Action()},
    "table, adaptive": {"solver": jode.Adaptive(jode.bosh3, 1e-4, 1e-4), "observe": {"action": Action(64)}},
    "table, recomputed": {"solver": jode.Fixed(jode.heun, 12), "observe": Action(), "adjoint": jode.Backprop(3)},
    "table, inverse steps": {"solver": jode.Fixed(jode.leapfrog, 12), "observe": Action(), "adjoint": jode.MemoryFree()},
    "table, network": {"solver": jode.Layers(jode.euler), "observe": [Action(), Largest()]},
}


def measured(name):
    """A number that depends on states at every save time, and on what is observed."""
    options = SOLVES[name]

    def value(y0, a, ts):
        args = a * jnp.linspace(0.5, 1.5, 24) if "network" in name else a
        sol = jode.solve(oscillator, y0, ts, args, **options)
        return jnp.sum(jnp.sin(sol.ys)) + sum(3 * x for x in jax.tree.leaves(sol.observed))

    return value


@pytest.mark.parametrize("name", SOLVES)
def test_each_works_in_every_mode(name):
    """Gradients match central differences; jvp, vmap and jit agree with them."""
    value, ts, a = measured(name), jnp.array(TS), jnp.asarray(A)
    with jax.disable_jit("runner" in name):
        by_hand = jax.jit(jax.grad(value, (0, 1, 2)))(Y0, a, ts)
        w = (jnp.array([0.3, -0.2]), jnp.asarray(0.7), jnp.array([0.1, 0.2, -0.3]))
        along = jax.jit(lambda *x: jax.jvp(value, x, w)[1])(Y0, a, ts)
        np.testing.assert_allclose(along, sum(jnp.sum(x * z) for x, z in zip(by_hand, w, strict=True)), rtol=1e-9, atol=1e-11)
        e = 1e-6
        if "adaptive" not in name:  # where steps change with the data, differences see them change
            ahead, back = (value(Y0 + s * e * w[0], a + s * e * w[1], ts + s * e * w[2]) for s in (1, -1))
            np.testing.assert_allclose(along, (ahead - back) / (2 * e), rtol=1e-6)
        np.testing.assert_allclose(jax.jit(value)(Y0, a, ts), value(Y0, a, ts), rtol=1e-12)
        rows = jnp.stack([Y0, -0.5 * Y0, 2 * Y0])
        together = jax.jit(jax.vmap(value, (0, None, None)))(rows, a, ts)
        np.testing.assert_allclose(together, [value(y, a, ts) for y in rows], rtol=1e-10)
        each = jax.jit(jax.vmap(jax.grad(value, 1), (0, None, None)))(rows, a, ts)
        np.testing.assert_allclose(each[0], by_hand[1], rtol=1e-9, atol=1e-11)
        total = jax.jit(jax.grad(lambda a: jnp.sum(jax.vmap(value, (0, None, None))(rows, a, ts))))(a)
        np.testing.assert_allclose(total, jnp.sum(each), rtol=1e-9)


def test_the_implicit_method_is_stable_where_explicit_ones_are_not_and_rejects_failed_steps():
    stiff = lambda t, y, a: a * (jnp.cos(t) - y)
    sol = jode.solve(stiff, jnp.zeros(1), (0.0, 3.0), 1e4, solver=jode.Adaptive(ImplicitEuler(), 1e-3, 1e-3))
    explicit = jode.solve(stiff, jnp.zeros(1), (0.0, 3.0), 1e4, solver=jode.Adaptive(jode.heun, 1e-3, 1e-3, max_steps=10**5))
    np.testing.assert_allclose(sol.ys[-1], explicit.ys[-1], atol=1e-2)
    assert 20 * sol.stats.steps < explicit.stats.steps
    newton = jode.solve(
        lambda t, y, a: -(y**3), jnp.array([50.0]), (0.0, 1.0), solver=jode.Adaptive(ImplicitEuler(), 1.0, 1.0, first_step=1.0)
    )
    assert newton.status == jode.Status.success
    wide = jode.solve(lambda t, y, a: -(y**3), jnp.array([50.0]), (0.0, 1.0), solver=jode.Fixed(ImplicitEuler(), 1))
    assert wide.status == jode.Status.nonfinite_state
    assert newton.stats.rejected > 0


@dataclass(frozen=True)
class Counted(jode.Observer):
    def init(self, t, y, args):
        return jnp.zeros(())

    def step(self, kept, t, y, args):
        return kept + 1


@pytest.mark.parametrize(
    "method", [jode.rk4, jode.Reversible(jode.bosh3), jode.leapfrog, jode.reversible_heun, jode.Momentum(0.5)], ids=str
)
def test_an_observer_sees_every_step_once(method):
    """Also with methods that carry, and mix, several copies of the state."""
    rows = jnp.stack([Y0, -0.5 * Y0])
    solvers = [jode.Fixed(method, 7), *([jode.Adaptive(method, 1e-3, 1e-3)] if method.embedded_order else [])]
    for solver in solvers:
        run = lambda y, solver=solver: jode.solve(oscillator, y, TS, A, solver=solver, observe=Counted())
        for sol in (run(Y0), jax.vmap(run)(rows)):
            np.testing.assert_array_equal(sol.observed, sol.stats.accepted)


def test_a_table_has_an_entry_for_every_step():
    """Of a straight line at unit speed the action is the time it takes, whichever way time runs, and a full table says so."""
    line = lambda t, y, a: jnp.array([0.6, 0.8]) + 0 * a
    for ts in (TS, TS[::-1]):
        for solver in (jode.Fixed(jode.rk4, 12), jode.Adaptive(jode.bosh3, 1e-4, 1e-4)):
            sol = jode.check(jode.solve(line, Y0, ts, A, solver=solver, observe=Action()))
            np.testing.assert_allclose(sol.observed, 2.0, rtol=1e-14)
    assert jode.solve(line, Y0, TS, A, solver=jode.Fixed(jode.rk4, 12), observe=Action(23)).status == jode.Status.capacity


def test_an_observer_changes_nothing_and_sees_every_step():
    for solver in (jode.Fixed(jode.rk4, 12), jode.Adaptive(jode.tsit5, 1e-6, 1e-6), jode.Adaptive(jode.leapfrog, 1e-4, 1e-4)):
        plain = jode.solve(oscillator, Y0, TS, A, solver=solver)
        seen = jode.solve(oscillator, Y0, TS, A, solver=solver, observe={"largest": Largest()})
        for a, b in zip(jax.tree.leaves((plain.ys, plain.stats)), jax.tree.leaves((seen.ys, seen.stats)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-14)
        assert seen.observed["largest"] >= jnp.max(jnp.abs(plain.ys)) - 1e-12
    with pytest.raises(TypeError, match=r"observe must be a jode.Observer"):
        jode.solve(oscillator, Y0, TS, A, observe=lambda t, y: y)
    with pytest.raises(ValueError, match="observers see steps"):
        jode.solve(oscillator, Y0, TS, A, observe=Largest(), adjoint=jode.Backsolve())
    with pytest.raises(NotImplementedError, match=r"use jode.Backprop"):
        jax.grad(
            lambda y: (
                jode.solve(
                    oscillator, y, TS, A, solver=jode.Fixed(jode.rk4, 3), observe=Largest(), adjoint=jode.MemoryFree()
                ).observed
            )
        )(Y0)
