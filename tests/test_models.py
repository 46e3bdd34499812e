"""The image classifiers: fast layers equal the plain ones, a batch is its images, networks keep their depth."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jode
from jode import train
from jode.models import MODELS, Classifier, Residual, layers, vector_field
from jode.models.image import Conv, Halve, Norm

KEYS = jax.random.split(jax.random.key(0), 4)
IMAGES = jax.random.normal(KEYS[0], (3, 14, 14, 2))


def drawn(module, key=KEYS[1]):
    """The module with numbers of which none is at its initial value."""
    leaves, tree = jax.tree.flatten(module)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def plain(x, weight, stride, padding):
    pads = [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x[None], weight, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


def test_the_convolutions_are_convolutions():
    x = IMAGES[0]
    same, halve = drawn(Conv(3, 2, 5, key=KEYS[2])), drawn(Halve(Conv(4, 2, 5, key=KEYS[2])))
    np.testing.assert_allclose(same(x), plain(x, same.weight, 1, 1) + same.bias[None, None], rtol=1e-12, atol=1e-13)
    for image in (x, x[:13, :12]):
        np.testing.assert_allclose(
            halve(image), plain(image, halve.conv.weight, 2, 1) + halve.conv.bias[None, None], rtol=1e-12, atol=1e-13
        )
    timed = drawn(Conv(3, 3, 5, bias=False, padding=0, key=KEYS[2]))
    with_t = jnp.concatenate([jnp.full((14, 14, 1), 0.7), x], -1)
    np.testing.assert_allclose(timed(x, jnp.asarray(0.7)), plain(with_t, timed.weight, 1, 0), rtol=1e-12, atol=1e-13)


def test_the_normalisation_is_that_of_equinox():
    x = jax.random.normal(KEYS[0], (5, 4, 12))
    ours, theirs = drawn(Norm(12)), eqx.nn.GroupNorm(6, 12)
    theirs = eqx.tree_at(lambda n: (n.weight, n.bias), theirs, (ours.weight, ours.bias))
    with jax.numpy_rank_promotion("allow"):
        expected = jnp.moveaxis(theirs(jnp.moveaxis(x, -1, 0)), 0, -1)
    np.testing.assert_allclose(ours(x), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_of_the_table_counts_its_evaluations(name):
    make, solver, adjoint = MODELS[name]
    scores, (nfe, _) = jax.jit(lambda model, image: model(image, solver, adjoint))(
        make((6, 6, 2), 4, key=KEYS[3]), IMAGES[0, :6, :6]
    )
    assert scores.shape == (10,)
    expected = {"1-layer MLP": 0, "no block": 0, "1-block ResNet": 1, "ResNet-6": 6, "RK-Net": 8, "ODE-Net, reversible": 9}
    assert nfe == expected[name] if name in expected else nfe > 8


def test_the_objective_is_the_cross_entropy_and_each_array_has_a_gradient():
    make, solver, adjoint = MODELS["1-block ResNet"]
    model, labels = drawn(make(IMAGES.shape[1:], 4, key=KEYS[3])), jnp.array([1, 2, 3])
    loss = jax.jit(jax.value_and_grad(train.objective(solver, adjoint), has_aux=True))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        (value, metrics), gradient = loss(model, IMAGES, labels)
    scores = jax.vmap(lambda image: model(image, solver)[0])(IMAGES)
    np.testing.assert_allclose(value, -np.mean(jax.nn.log_softmax(scores)[jnp.arange(3), labels]), rtol=1e-10)
    assert (metrics.loss, metrics.nfe, metrics.nfe_backward) == (value, 1, 1)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("turn", [None, 0.0, 1.0])
def test_stacked_layers_are_blocks_one_after_another(turn):
    x, depth = jax.random.normal(KEYS[0], (6, 6, 4)), 5
    stacked = layers(4, depth, turn, key=KEYS[1])
    assert (jode.depth.smoothness(stacked) == 0) == (turn == 0.0)
    expected = x
    for block in jode.depth.unstack(stacked):
        assert isinstance(block, Residual)
        expected = expected + block(jnp.zeros(()), expected)
    np.testing.assert_allclose(jode.resnet(vector_field, x, stacked), expected, rtol=1e-12)


def test_the_adjoints_agree_on_a_module():
    model = drawn(Classifier((6, 6, 2), 4, span=0.5, key=KEYS[3]))

    def gradient(adjoint):
        solver = jode.Fixed(jode.reversible_heun, 6)
        return jax.jit(jax.grad(lambda m: jnp.sum(m(IMAGES[0, :6, :6], solver, adjoint)[0] ** 2)))(model)

    for a, b in zip(*(jax.tree.leaves(gradient(adjoint)) for adjoint in (jode.Backprop(), jode.MemoryFree())), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
