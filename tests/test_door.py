"""Wrong use fails when traced, names the argument, and says what to do."""

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
