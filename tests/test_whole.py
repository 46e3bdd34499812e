"""Small marches as one function each on a CPU: which are, and that what XLA's emitter does not know stays outside."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jode
from jode.native import whole as rule
from jode.tuning import TRIED, one_function
from tests.problems import users_jit

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "cpu" or jax.__version_info__[:2] not in TRIED, reason="a way of XLA on a CPU"),
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


W = np.random.default_rng(1).uniform(0.1, 0.9, 20_000)
LARGE = {  # f(n) has something of n numbers
    "inner product": lambda n: lambda t, y, a: -y * a * jnp.dot(W[:n], W[:n] * a) / n,
    "row by vector": lambda n: lambda t, y, a: -y * (jnp.asarray(W[:n])[None] @ (W[:n] * a))[0] / n,
    "einsum": lambda n: lambda t, y, a: -y * jnp.einsum("i,i->", W[:n], W[:n] * a) / n,
    "sum": lambda n: lambda t, y, a: -y * jnp.sum(a * W[:n]) / n,
    "argmax": lambda n: lambda t, y, a: -a * y + 0.01 * jnp.argmax(a * W[:n]).astype(float) / n,
    "outer product": lambda n: lambda t, y, a: -y * jnp.sum(jnp.outer(a * W[: n // 8], W[:8])[1]),
    "power": lambda n: lambda t, y, a: -y * jax.lax.while_loop(lambda z: z[0] < 1, lambda z: (z + 0.3) ** a + 1, W[:n])[7],
    "sinh": lambda n: lambda t, y, a: -y * jax.lax.while_loop(lambda z: z[0] < 0.9, jnp.sinh, a * (W[:n] + 0.5))[7],
    "arcsin": lambda n: lambda t, y, a: -y * jax.jit(jnp.arcsin, inline=False)(W[:n] * a)[7],
    "logarithm of the gamma function": lambda n: lambda t, y, a: -y * jax.jit(jax.lax.lgamma, inline=False)(W[:n] * a)[7],
    "branch": lambda n: lambda t, y, a: -y * jax.lax.cond(y[0] > 0, jnp.arccosh, jnp.sin, a + W[:n] + 1)[7],
    "one turn": lambda n: lambda t, y, a: -y * jax.lax.fori_loop(0, 1, lambda _, z: jnp.sin(z) * z, a * W[:n])[7],
    "table": lambda n: lambda t, y, a: -a * y * jnp.asarray(np.tile(W, 8)[: 8 * n])[jnp.int32(50 * t)],
}


@pytest.mark.parametrize("n", [32, rule.MANY - 8, rule.MANY, 4 * rule.MANY])
@pytest.mark.parametrize("name", LARGE)
def test_fields_on_both_sides_of_every_threshold_are_solved(name, n):
    """Some of each failed to compile, or ended the process, as one function: from 4,096 numbers on, or where shared out to threads."""
    f = loss(LARGE[name](n), jode.Fixed(jode.euler, 2))
    value = users_jit(f)(0.7)
    with jax.disable_jit():
        np.testing.assert_allclose(value, f(0.7), rtol=1e-11)
    if n == 32:
        assert whole(f, 0.7)


UNARY = "abs acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1 floor is_finite lgamma log"
UNARY += " log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh conj real imag"
BINARY = "add atan2 div max min mul nextafter pow rem sub eq ge lt ne"
KINDS = ["float32", "float64", "bfloat16", "complex64", "int32"]


@pytest.mark.parametrize("dtype", KINDS)
def test_xla_makes_no_more_operations_of_one_than_are_counted(dtype):
    """What XLA itself counts for each primitive as it compiles it, on this version of JAX."""
    n = 300
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.uniform(low, low + 0.8, n) * (100 if dtype == "int32" else 1)).astype(dtype) for low in (0.1, 1.1))
    programs = {name: (getattr(jax.lax, name), (y,) if name == "acosh" else (x,)) for name in UNARY.split()}
    programs |= {name: (getattr(jax.lax, name), (x, y)) for name in BINARY.split()}
    programs |= {"slope of tanh": (jax.grad(lambda x: jnp.sum(jnp.tanh(x))), (x,)), "log2": (jnp.log2, (x,))}
    programs |= {f"power {n}": (lambda x, n=n: jax.lax.integer_pow(x, n), (x,)) for n in (2, 3, -5, 31, 1023)}
    programs |= {"sum": (lambda x: jnp.sum(x), (x,)), "argmax": (lambda x: jax.lax.argmax(x, 0, jnp.int32), (x,))}
    programs |= {"where": (lambda x, y: jnp.where(x == y, x, y), (x, y)), "gather": (lambda x: x[jnp.arange(0, n, 3)], (x,))}
    asked = 0
    for name, (f, xs) in programs.items():
        try:
            program, lowered = jax.make_jaxpr(f)(*xs), jax.jit(f).lower(*xs)
        except (TypeError, NotImplementedError):
            continue  # not for this kind of numbers
        count = lowered.compile().cost_analysis()
        count = count[0] if isinstance(count, list) else count
        assert count.get("flops", 0) + 2 / 11 * count.get("transcendentals", 0) <= rule.most(program).flops + 60, name
        asked += 1
    assert asked > 10


def test_loops_of_one_turn_count_and_loops_of_more_are_apart():
    x = jnp.ones(1000)
    flops = lambda f: rule.most(jax.make_jaxpr(f)(x)).flops
    body = lambda z: jnp.sin(z) * z
    while_loop = lambda limit: lambda x: jax.lax.while_loop(lambda c: c[0] < limit(x), lambda c: (c[0] + 1, body(c[1])), (0.0, x))
    assert flops(lambda x: jax.lax.fori_loop(0, 1, lambda _, z: body(z), x)) >= 2000
    assert flops(lambda x: jax.lax.fori_loop(0, 3, lambda _, z: body(z), x)) < 2000
    assert flops(while_loop(lambda x: 1.0)) >= 2000
    assert flops(while_loop(lambda x: x[0])) < 2000
    assert flops(lambda x: jax.lax.cond(x[0] > 0, body, jnp.sin, x)) >= 2000
    assert (
        flops(
            lambda x: jax.lax.while_loop(
                lambda c: c[0] < 1.0, lambda c: (c[0] + 1, body(jax.lax.fori_loop(0, 40, lambda _, z: body(z), c[1]))), (0.0, x)
            )[1]
        )
        < rule.FLOPS
    )


def test_what_moves_counts_and_tables_are_below_their_size():
    tables = lambda k: lambda *xs: sum(jax.lax.slice(jax.lax.rev(x, (0,)), (0,), (1,)) for x in xs[:k])
    xs = [jnp.ones(rule.TABLE // 32) for _ in range(16)]
    assert rule.most(jax.make_jaxpr(tables(2))(*xs)).safe
    assert not rule.most(jax.make_jaxpr(tables(16))(*xs)).safe
    assert rule.most(jax.make_jaxpr(lambda *xs: [jax.lax.rev(x, (0,)) for x in xs])(*xs)).safe  # each by itself
    assert not np.isfinite(rule.most(jax.make_jaxpr(lambda x: jax.lax.rev(x, (0,)))(jnp.ones(rule.TABLE // 8))).flops)
    assert np.isfinite(rule.most(jax.make_jaxpr(lambda x: jax.lax.rev(x, (0,)))(jnp.ones(rule.TABLE // 8 - 1))).flops)


MLP = jax.tree.map(
    jnp.asarray, [np.random.default_rng(i).normal(size=s) / 4 for i, s in enumerate([(32, 2), (32,), (32, 32), (2, 32)])]
)


def network(t, y, w):
    return w[3] @ jnp.tanh(w[2] @ jnp.tanh(w[0] @ y + w[1]))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_small_network_is_one_function_with_its_gradient(solver):
    f = lambda w: jnp.sum(jode.odeint(network, jnp.array([0.5, -0.3]), (0.0, 1.0), w, solver=solver)[-1] ** 2)
    gradient, direction = jax.grad(f), jax.tree.map(jnp.cos, MLP)
    assert jax.jit(gradient).lower(MLP).as_text().count("xla_cpu_small_call") >= 2
    found = sum(jnp.sum(g * d) for g, d in zip(users_jit(gradient)(MLP), direction, strict=True))
    np.testing.assert_allclose(found, users_jit(lambda w: jax.jvp(f, (w,), (direction,))[1])(MLP), rtol=1e-9)


@pytest.fixture
def settings():
    yield jode.config
    jode.config.one_function = "auto"


def test_the_switch_holds_for_solves_made_before(settings):
    f = jax.jit(loss(KNOWN["stack"], SOLVERS["fixed"]))
    value = f(0.7)
    assert "xla_cpu_small_call" in f.lower(0.7).as_text()
    settings.one_function = "never"
    assert "xla_cpu_small_call" not in f.lower(0.7).as_text()
    np.testing.assert_allclose(f(0.7), value, rtol=1e-13)
    settings.one_function = "auto"
    assert "xla_cpu_small_call" in f.lower(0.7).as_text()
    with pytest.raises(ValueError, match=r"jode.config.one_function must be one of 'auto', 'never', got 'always'"):
        settings.one_function = "always"
    assert settings.one_function == "auto"


@pytest.mark.parametrize(("said", "ends"), [("never", 0), ("always", 1)])
def test_the_environment_says_what_the_switch_is_at_first(said, ends):
    code = "import jode.config; assert jode.config.one_function == 'never'"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "JODE_ONE_FUNCTION": said}, capture_output=True, text=True, check=False
    )
    assert done.returncode == ends
    assert not ends or "JODE_ONE_FUNCTION must be one of 'auto', 'never', got 'always'" in done.stderr


@pytest.mark.parametrize("version", [(0, 6, 2), (0, 13, 0), (0, 20, 0), (1, 0, 0)])
def test_versions_that_were_not_tried_do_not_take_the_path(monkeypatch, version):
    assert one_function("cpu", 3, 1, False)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert not one_function("cpu", 3, 1, False)
