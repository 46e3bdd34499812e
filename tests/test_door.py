"""Wrong use fails when traced, names the argument, and says what to do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jode

Y0, TS = jnp.array([1.0, 2.0]), (0.0, 1.0)
f = lambda t, y, args: -y

WRONG = {
    "f second": (lambda: jode.solve(Y0, f, TS), TypeError, "y0 comes second"),
    "integer y0": (lambda: jode.solve(f, 1, TS), TypeError, "write 1.0 for 1"),
    "integer leaf": (lambda: jode.solve(f, {"a": jnp.arange(3)}, TS), TypeError, r"y0\['a'\]"),
    "string y0": (lambda: jode.solve(f, "abc", TS), TypeError, "y0 must be"),
    "scalar ts": (lambda: jode.solve(f, Y0, 1.0), ValueError, "at least two save times"),
    "one time": (lambda: jode.solve(f, Y0, (0.0,)), ValueError, "at least two save times"),
    "unsorted ts": (lambda: jode.solve(f, Y0, (0.0, 2.0, 1.0)), ValueError, "sort it"),
    "NaN time": (lambda: jode.solve(f, Y0, (0.0, np.nan)), ValueError, "ts must be finite"),
    "infinite time": (lambda: jode.solve(f, Y0, (0.0, np.inf)), ValueError, "ts must be finite"),
    "complex time": (lambda: jode.solve(f, Y0, (0.0, 1j)), TypeError, "ts must be real"),
    "a method for a solver": (lambda: jode.solve(f, Y0, TS, solver=jode.rk4), TypeError, r"write Fixed\(jode.rk4, steps\)"),
    "an adaptive method for a solver": (
        lambda: jode.solve(f, Y0, TS, solver=jode.tsit5),
        TypeError,
        r"write Adaptive\(jode.tsit5\)",
    ),
    "no embedded method": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(jode.rk4)), ValueError, "no embedded method"),
    "no steps": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, 0)), ValueError, "at least 1"),
    "steps and width": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, 1, width=0.1)), ValueError, "not both"),
    "no width of Fixed": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, width=0.0)), ValueError, "must be above zero"),
    "widths": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, width=Y0)), ValueError, "width must be a scalar"),
    "too many steps": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, width=0.1, max_steps=9)),
        ValueError,
        "makes 10 steps of an interval, more than 9",
    ),
    "steps 2.5": (lambda: jode.solve(f, Y0, TS, solver=jode.Fixed(jode.rk4, 2.5)), TypeError, "steps must be an int"),
    "zero tolerances": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(rtol=0.0, atol=0.0)), ValueError, "both zero"),
    "negative rtol": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(rtol=-1.0)), ValueError, "rtol must be"),
    "atol of another shape": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(atol=jnp.ones(3))),
        ValueError,
        r"atol has shape \(3,\) and must broadcast",
    ),
    "atol of more axes": (lambda: jode.solve(f, 1.0, TS, solver=jode.Adaptive(atol=jnp.ones(1))), ValueError, "must broadcast"),
    "atol of another structure": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(atol=[1e-6, 1e-3])),
        ValueError,
        "atol must be a number, or have the structure of y0",
    ),
    "negative leaf of atol": (
        lambda: jode.solve(f, {"a": 1.0, "b": Y0}, TS, solver=jode.Adaptive(atol={"a": 1e-6, "b": -Y0})),
        ValueError,
        r"atol\['b'\] must be finite and not negative",
    ),
    "a zero tolerance": (
        lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(rtol=0.0, atol=np.array([1e-6, 0.0]))),
        ValueError,
        "both zero",
    ),
    "norm 2": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(norm=2)), TypeError, "norm must be a function"),
    "norm of each": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(norm=lambda e: e)), TypeError, "must return a floating"),
    "no width": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(max_step=0.0)), ValueError, "max_step must be a width above"),
    "vector width": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(max_step=jnp.ones(2))), ValueError, "must be a scalar"),
    "no steps allowed": (lambda: jode.solve(f, Y0, TS, solver=jode.Adaptive(max_steps=0)), ValueError, "max_steps"),
    "adjoint class": (lambda: jode.solve(f, Y0, TS, adjoint=jode.Backprop), TypeError, "adjoint must be a value"),
    "no checkpoints": (lambda: jode.Backprop(0), ValueError, "positive int"),
    "None from f": (lambda: jode.solve(lambda t, y, a: None, Y0, TS), TypeError, "structure of y0"),
    "scalar from f": (lambda: jode.solve(lambda t, y, a: y[0], Y0, TS), TypeError, r"shape of y0, \(2,\); it has \(\)"),
    "wrong shape": (lambda: jode.solve(lambda t, y, a: y[None], Y0, TS), TypeError, r"\(1, 2\)"),
    "list from f": (lambda: jode.solve(lambda t, y, a: [y], Y0, TS), TypeError, "structure of y0"),
    "leaf of wrong shape": (
        lambda: jode.solve(lambda t, y, a: {"u": y["u"], "v": y["u"]}, {"u": Y0, "v": 1.0}, TS),
        TypeError,
        r"\['v'\]",
    ),
    "complex slope": (lambda: jode.solve(lambda t, y, a: y.astype(complex), Y0, TS), TypeError, "make y0 complex"),
    "unbounded store": (
        lambda: jax.grad(
            lambda y: jode.odeint(f, y, TS, solver=jode.Fixed(jode.rk4, jnp.asarray(3)), adjoint=jode.Backprop(None)).sum()
        )(Y0),
        ValueError,
        "max_steps=bound",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_refused_with_the_remedy(name):
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()


def test_errors_of_the_vector_field_pass_through():
    class MineError(Exception):
        pass

    def bad(t, y, args):
        raise MineError("here")

    with pytest.raises(MineError, match="here"):
        jode.solve(bad, Y0, TS)


def test_a_wider_slope_is_cast_with_a_warning():
    with pytest.warns(UserWarning, match="cast to the dtype of y0"):
        sol = jode.solve(lambda t, y, a: -y.astype(float), jnp.ones(2, jnp.float32), TS)
    assert sol.ys.dtype == jnp.float32


def test_tolerances_below_the_dtype_are_raised_with_a_warning():
    with pytest.warns(UserWarning, match="below the resolution"):
        sol = jode.solve(f, jnp.ones(2, jnp.float32), TS, solver=jode.Adaptive(rtol=1e-12, atol=1e-12))
    assert sol.status == jode.Status.success


def test_integer_slopes_and_integer_times_are_right():
    y = jode.odeint(lambda t, y, a: jnp.array([2, 3]), Y0, (0, 2))
    np.testing.assert_allclose(y[-1], [5.0, 8.0], rtol=1e-12)


@pytest.mark.parametrize("solver", [jode.Fixed(jode.rk4, 4), jode.Adaptive()], ids=["fixed", "adaptive"])
def test_a_solution_has_the_dtypes_and_shapes_of_its_annotations(solver):
    fall = lambda t, y, args: jax.tree.map(lambda x: -x, y)
    sol = jode.solve(fall, {"a": Y0, "b": jnp.array(1j)}, jnp.array([0.0, 1.0, 3.0]), solver=solver)
    names = {**vars(jaxtyping), "PyTree": jaxtyping.PyTree, "Array": jax.Array, "Stats": jode.Stats, "Any": object}
    with jaxtyping.jaxtyped("context"):  # `saves` is one number
        for value in (sol, sol.stats):
            for name, note in type(value).__annotations__.items():
                assert isinstance(getattr(value, name), eval(getattr(note, "__forward_arg__", note), names)), name


class Rate:
    """A field that is an object."""

    k = 1.0
    __slots__ = ("__dict__", "slot")

    def f(self, t, y, args):
        return -self.k * y

    def by_slot(self, t, y, args):
        return -self.slot * y

    def __call__(self, t, y, args):
        return self.f(t, y, args)


RATE, TABLE, ARRAY = 1.0, {"k": [1.0]}, np.ones(1)


def by_global(t, y, args):
    return -RATE * y


def by_default(t, y, args, k=1.0):
    return -k * y


def changes():
    """Fields of rate 1, each with what makes its rate 2."""
    rate, other, owner, sloted = Rate(), Rate(), Rate(), Rate()
    sloted.slot = 1.0
    k = 1.0

    def closed(t, y, args):
        return -k * y

    def bind():
        nonlocal k
        k = 2.0

    yield "method", rate.f, lambda: setattr(rate, "k", 2.0)
    yield "callable object", other, lambda: setattr(other, "k", 2.0)
    yield "slot", sloted.by_slot, lambda: setattr(sloted, "slot", 2.0)
    yield "method of a class", owner, lambda: setattr(owner, "f", lambda t, y, args: -2.0 * y)
    yield "closure", closed, bind
    yield "global", by_global, lambda: globals().update(RATE=2.0)
    yield "contents", lambda t, y, args: -TABLE["k"][0] * y, lambda: TABLE["k"].__setitem__(0, 2.0)
    yield "default", by_default, lambda: setattr(by_default, "__defaults__", (2.0,))
    yield "array of NumPy", lambda t, y, args: -ARRAY[0] * y, lambda: ARRAY.fill(2.0)
    yield "partial", functools.partial(lambda table, t, y, args: -table["k"] * y, table := {"k": 1.0}), lambda: table.update(k=2.0)


def test_a_field_that_changed_is_not_solved_as_it_was():
    solver = jode.Fixed(jode.rk4, 8)
    at = lambda f: float(jode.odeint(f, 1.0, TS, solver=solver)[-1])
    for name, f, change in changes():
        assert at(f) == pytest.approx(np.exp(-1.0), abs=1e-4), name
        change()
        assert at(f) == pytest.approx(np.exp(-2.0), abs=2e-3), name


def test_a_function_of_an_event_that_changed_too():
    level = 0.5

    def g(t, y, args):
        return y - level

    when = lambda: float(jode.solve(lambda t, y, args: -y, 1.0, TS, observe=jode.Event(g)).observed.t)
    assert when() == pytest.approx(np.log(2.0), abs=1e-5)
    level = 0.8
    assert when() == pytest.approx(-np.log(0.8), abs=1e-5)


def dataclass_like(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@dataclass_like
class Half(jode.Fixed):
    """Steps of half the width."""

    def span(self, march, problem, a, b, k):
        t, h = super().span(march, problem, a, b, k)
        return t, h / 2


@dataclass_like
class Decay:
    k: float

    def rate(self):
        return self.k


@dataclass_like
class Twice(Decay):
    def rate(self):
        return 2 * self.k


def test_values_of_two_types_with_the_same_fields_are_two_values():
    """JAX takes treedefs of two registered dataclasses with the same fields for equal."""
    at = lambda of, solver=jode.Fixed(jode.rk4, 8): float(
        jode.odeint(lambda t, y, args: -args.rate() * y, 1.0, TS, of, solver=solver)[-1]
    )
    for _ in range(2):
        assert at(Decay(1.0)) == pytest.approx(np.exp(-1.0), abs=1e-4)
        assert at(Twice(1.0)) == pytest.approx(np.exp(-2.0), abs=2e-3)
        assert at(Decay(1.0), Half(jode.rk4, 8)) == pytest.approx(np.exp(-0.5), abs=1e-4)
    state = lambda of: jode.odeint(
        lambda t, y, args: jax.tree.map(lambda x: -y.rate() * x, y), of, TS, solver=jode.Fixed(jode.rk4, 8)
    ).k[-1]
    first, second = state(Decay(jnp.array(1.0))), state(Twice(jnp.array(1.0)))
    assert first == pytest.approx(1 / 2, abs=1e-4)
    assert second == pytest.approx(1 / 3, abs=1e-3)
