"""Small marches as one function each on a CPU: which are, and that what XLA's emitter does not know stays outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jode
from tests.problems import users_jit

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 13), reason="a way of XLA on a CPU"),
    pytest.mark.optimized,
]
A = np.random.default_rng(0).normal(size=(3, 3)) / 3
TABLE = np.int32(1000 * np.sin(np.linspace(0.0, 7.0, 20_000)))  # 80 kB: large constants are stored apart
KNOWN = {
    "stack": lambda t, y, a: jnp.stack([a * y[1], -y[0], y[2] * y[0]]),
    "without args": lambda t, y, a: -y * jnp.cos(t),
    "product": lambda t, y, a: jnp.tanh(A @ y) * a,
    "roll": lambda t, y, a: (jnp.roll(y, -1) - jnp.roll(y, 2)) * jnp.roll(y, 1) - a * y,
    "table": lambda t, y, a: -a * y + jnp.asarray(TABLE)[jnp.int32(2000 * t)].astype(float) / 1000,
    "at": lambda t, y, a: jnp.zeros(3).at[0].set(a * y[1]).at[1].add(-y[0]),
    "reductions": lambda t, y, a: -a * y * jnp.sum(y**2) + jnp.max(y) - jnp.mean(y),
    "branches": lambda t, y, a: jax.lax.cond(y[0] > 0, lambda y: -a * y, lambda y: a * jnp.sin(y), y),
    "loop": lambda t, y, a: jax.lax.fori_loop(0, 3, lambda i, z: z - 0.1 * a * z * y[i], y),
    "special": lambda t, y, a: -a * jax.nn.softplus(y) + jax.scipy.special.erf(y) + (1 + y**2) ** 1.5 - jnp.log1p(y**2),
    "complex": lambda t, y, a: a * jnp.real(jnp.exp(jax.lax.complex(jnp.zeros(3), a * y))),
}
UNKNOWN = {
    "solve": lambda t, y, a: -a * jnp.linalg.solve(jnp.eye(3) + A, y),
    "sort": lambda t, y, a: -a * jnp.sort(y),
    "matrices": lambda t, y, a: -a * (jnp.outer(y, y) @ jnp.outer(y, y) @ y),
    "random": lambda t, y, a: -a * y + 0.01 * jax.random.normal(jax.random.key(0), (3,)),
    "reductions of many": lambda t, y, a: -a * y * jnp.sum(jnp.sin(jnp.arange(5000.0) * y[0])),
    "arrays of many": lambda t, y, a: -a * y * jnp.sin(jnp.arange(50_000.0) * y[0])[7],
    "print": lambda t, y, a: (jax.debug.callback(lambda t: None, t), -a * y)[1],
    "callback": lambda t, y, a: -a * jax.pure_callback(lambda y: np.asarray(y), jax.ShapeDtypeStruct((3,), y.dtype), y),
}
SOLVERS = {"adaptive": jode.Adaptive(jode.tsit5, 1e-6, 1e-6), "fixed": jode.Fixed(jode.rk4, 5)}
Y0 = np.array([0.9, -0.3, 0.2])


def loss(f, solver, saves=2):
    return lambda a: jnp.sum(jnp.sin(jode.odeint(f, Y0, np.linspace(0.0, 1.0, saves), a, solver=solver)))


def whole(f, *args):
    return "xla_cpu_small_call" in jax.jit(f).lower(*args).as_text()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", KNOWN)
def test_small_marches_are_one_function_with_the_same_derivatives(name, solver):
    """Constants as operands, operands that f does not read, and large constants would stop the process if handed to XLA as they are."""
    f, a = loss(KNOWN[name], solver, 4), 0.7
    forms = {"solve": f, "gradient": jax.grad(f), "Hessian-vector": lambda a: jax.jvp(jax.grad(f), (a,), (1.0,))[1]}
    for form in forms.values():
        assert whole(form, a)
    value, first, second = (users_jit(form)(a) for form in forms.values())
    np.testing.assert_allclose(first, users_jit(lambda a: jax.jvp(f, (a,), (1.0,))[1])(a), rtol=1e-9)
    if isinstance(solver, jode.Fixed):  # a found grid moves where a does
        h = 1e-4
        before, after = (users_jit(f)(a + s) for s in (-h, h))
        np.testing.assert_allclose(first, (after - before) / (2 * h), rtol=1e-6)
        np.testing.assert_allclose(second, (after - 2 * value + before) / h**2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNKNOWN)
def test_marches_of_other_operations_are_left_as_they_are(name):
    f = loss(UNKNOWN[name], SOLVERS["fixed"])
    assert not whole(f, 0.7)
    assert np.isfinite(users_jit(f)(0.7))


def test_a_march_inside_of_loops_branches_and_other_transformations():
    f = loss(KNOWN["stack"], SOLVERS["adaptive"])
    value, slope = f(0.7), jax.grad(f)(0.7)
    found = {
        "scan": (lambda a: jax.lax.scan(lambda c, _: (c, f(a * c)), 1.0, None, length=3)[1][-1]),
        "while": (lambda a: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(a)), (0, 0.0))[1]),
        "cond": (lambda a: jax.lax.cond(a > 0, f, lambda a: 0.0, a)),
        "map": (lambda a: jax.lax.map(f, jnp.stack([a, a]))[1]),
        "twice": (lambda a: 0.5 * (f(a) + f(a))),
    }
    for name, g in found.items():
        np.testing.assert_allclose(users_jit(g)(0.7), value, rtol=1e-12, err_msg=name)
        if name != "while":
            np.testing.assert_allclose(users_jit(jax.grad(g))(0.7), slope, rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(users_jit(lambda: jax.grad(f)(0.7))(), slope, rtol=1e-12)  # no operand but constants
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(f)))(0.7), slope, rtol=1e-12)


def test_many_devices_and_exported_programs_have_no_such_function():
    """A partitioner may place collectives inside a march."""
    f = lambda a: loss(KNOWN["product"], SOLVERS["fixed"])(a[0])
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharded = jax.device_put(jnp.full(len(jax.devices()), 0.7), NamedSharding(mesh, PartitionSpec("x")))
    assert whole(f, sharded) == (len(jax.devices()) == 1)
    np.testing.assert_allclose(jax.jit(f)(sharded), f(jnp.array([0.7])), rtol=1e-12)
    from jax import export

    assert "xla_cpu_small_call" not in export.export(jax.jit(f))(jax.ShapeDtypeStruct((1,), float)).mlir_module()


@pytest.mark.parametrize(
    ("n", "rows", "forwards", "backwards"), [(3, None, 1, 1), (40, None, 1, 1), (600, None, 0, 0), (3, 10, 1, 1), (3, 1000, 0, 0)]
)
def test_large_marches_are_left_as_they_are(n, rows, forwards, backwards):
    y0 = jnp.ones(n) if rows is None else jnp.ones((rows, n))
    solve = lambda y, a: jnp.sum(jode.odeint(lambda t, y, a: -a * y, y, (0.0, 1.0), a)[-1])
    f = lambda a: jnp.sum(solve(y0, a) if rows is None else jax.vmap(solve, (0, None))(y0, a))
    assert whole(f, 0.7) == bool(forwards)
    assert whole(jax.grad(f), 0.7) == bool(backwards)


def test_rows_of_a_batch_are_those_of_solves_alone():
    f, a = KNOWN["reductions"], jnp.linspace(0.3, 0.9, 7)
    one = lambda a: jnp.sum(jode.odeint(f, Y0, (0.0, 1.0), a, solver=SOLVERS["adaptive"])[-1] ** 2)
    for form in (one, jax.grad(one), jax.grad(jax.grad(one))):
        np.testing.assert_allclose(users_jit(jax.vmap(form))(a), [users_jit(form)(x) for x in a], rtol=1e-10)
