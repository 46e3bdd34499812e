"""A residual network is a march whose step n reads slice n of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode


def f(t, x, w):
    return jnp.tanh(w["a"] @ x + w["b"] + t)


def weights(n, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return {"a": jnp.asarray(rng.normal(size=(n, d, d))), "b": jnp.asarray(rng.normal(size=(n, d)))}


def loop(x, w, span):
    n = len(w["b"])
    h = span / n
    for i in range(n):
        x = x + h * f(i * h, x, {"a": w["a"][i], "b": w["b"][i]})
    return x


X = jnp.array([0.3, -0.2, 0.9])


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("step", ["1", "1/N"])
def test_layers_equal_a_python_loop(n, step):
    w, span = weights(n), float(n) if step == "1" else 1.0
    y = jode.odeint(f, X, (0.0, span), w, solver=jode.Layers(jode.euler))[-1]
    np.testing.assert_allclose(y, loop(X, w, span), rtol=0, atol=5e-15 * n)


@pytest.mark.parametrize("adjoint", [jode.Backprop(None), jode.Backprop(3), jode.Backprop()], ids=str)
def test_gradients_equal_autodiff_of_a_python_loop(adjoint):
    w = weights(12)
    ours = jax.jit(
        jax.grad(
            lambda x, w: jnp.sum(jode.odeint(f, x, (0.0, 1.0), w, solver=jode.Layers(jode.euler), adjoint=adjoint)[-1] ** 2), (0, 1)
        )
    )
    theirs = jax.grad(lambda x, w: jnp.sum(loop(x, w, 1.0) ** 2), (0, 1))
    for a, b in zip(jax.tree.leaves(ours(X, w)), jax.tree.leaves(theirs(X, w)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_tied_layers_equal_fixed_steps_bitwise():
    w = jax.tree.map(lambda x: jnp.repeat(x[:1], 16, axis=0), weights(1))
    tied = jode.odeint(f, X, (0.0, 1.0), w, solver=jode.Layers(jode.heun))
    fixed = jode.odeint(f, X, (0.0, 1.0), jax.tree.map(lambda x: x[0], w), solver=jode.Fixed(jode.heun, 16))
    assert np.array_equal(tied, fixed)


def test_every_layer_can_be_saved():
    w = weights(6)
    ys = jode.odeint(f, X, jnp.linspace(0.0, 6.0, 7), w, solver=jode.Layers(jode.euler))
    np.testing.assert_allclose(ys[-1], loop(X, w, 6.0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(ys[1], X + f(0.0, X, jax.tree.map(lambda x: x[0], w)), rtol=0, atol=1e-15)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_program_has_the_same_size_at_every_depth(gradient, monkeypatch):
    """But for what makes one function of a small march."""
    monkeypatch.setattr(jode.config, "one_function", "never")

    def value(x, w):
        return jnp.sum(jode.odeint(f, x, (0.0, 1.0), w, solver=jode.Layers(jode.euler))[-1])

    program = jax.grad(value, (0, 1)) if gradient else value
    lines = [len(jax.jit(program).lower(X, weights(n)).as_text().splitlines()) for n in (2, 16, 512)]
    assert lines[0] == lines[1] == lines[2]


def test_vmap_keeps_the_weights_shared():
    w, xs = weights(5), jnp.stack([X, 2 * X, X - 1])
    net = lambda x, w: jode.odeint(f, x, (0.0, 1.0), w, solver=jode.Layers(jode.euler))[-1]
    loss = lambda w: jnp.sum(jax.vmap(net, (0, None))(xs, w) ** 2)
    apart = lambda w: sum(jnp.sum(net(x, w) ** 2) for x in xs)
    for a, b in zip(*(jax.tree.leaves(jax.jit(jax.grad(g))(w)) for g in (loss, apart)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_integer_key_and_static_leaves_pass_through():
    w = {"a": weights(4)["a"], "n": jnp.arange(4), "key": jax.random.split(jax.random.key(0), 4), "tag": "relu"}

    def g(t, x, w):
        assert w["tag"] == "relu"
        return jnp.tanh(w["a"] @ x) * w["n"].astype(float) + jax.random.normal(w["key"], (3,))

    grads = jax.grad(lambda a: jnp.sum(jode.odeint(g, X, (0.0, 1.0), {**w, "a": a}, solver=jode.Layers(jode.euler))[-1]))(w["a"])
    x = X

    def by_hand(a):
        x = X
        for i in range(4):
            x = x + 0.25 * g(0.0, x, {"a": a[i], "n": w["n"][i], "key": w["key"][i], "tag": "relu"})
        return jnp.sum(x)

    del x
    np.testing.assert_allclose(grads, jax.grad(by_hand)(w["a"]), rtol=1e-12)


@pytest.mark.parametrize(
    ("args", "ts", "match"),
    [
        ({"a": jnp.zeros((3, 3, 3)), "b": jnp.zeros((4, 3))}, (0.0, 1.0), "same depth"),
        ({"a": jnp.zeros((3, 3, 3)), "b": jnp.zeros((3, 3))}, (0.0, 0.5, 1.0), "do not divide"),
        (None, (0.0, 1.0), "same depth"),
    ],
)
def test_impossible_layers_are_refused(args, ts, match):
    with pytest.raises(ValueError, match=match):
        jode.solve(f, X, ts, args, solver=jode.Layers(jode.euler))
