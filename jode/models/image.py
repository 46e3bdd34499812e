"""The image classifiers of Chen et al. 2018, Table 1: one stem, one head, and between them layers or an ODE.

Everything is for one image (height, width, channels); batches are `jax.vmap`'s. Modules are Equinox's, and each of their leaves is
an array with a gradient. Solvers and adjoints are handed in at the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import jode
import jode.depth


class Conv(eqx.Module):
    """A convolution of stride one, as one matrix product of shifted copies of x.

    XLA's own is as fast forwards, but on a CPU its derivative by the weight is ten times slower inside a loop.
    """

    bias: Any  # None where there is none
    weight: Array
    padding: int = eqx.field(static=True)

    def __init__(self, size: int, n: int, m: int, *, bias: bool = True, padding: int = 1, key: Array):
        self.weight = jax.random.normal(key, (size, size, n, m)) * jnp.sqrt(1 / (size * size * n))
        self.bias = jnp.zeros(m) if bias else None
        self.padding = padding

    def __call__(self, x: Array, t: Array | None = None) -> Array:
        """Of x (H, W, n), and of t, one more constant channel: convolved apart, as t times an image that all examples share."""
        if t is None:
            y = _convolve(x, self.weight, self.padding)
        else:
            ones = jnp.ones((*x.shape[:2], 1), x.dtype)
            y = _convolve(x, self.weight[:, :, 1:], self.padding) + t * _convolve(ones, self.weight[:, :, :1], self.padding)
        return y if self.bias is None else y + self.bias[None, None]


class Halve(eqx.Module):
    """A 4x4 convolution of stride two and padding one, as a 2x2 one over blocks of 2x2 pixels: no slow dilations in reverse."""

    conv: Conv

    def __call__(self, x: Array) -> Array:
        n, m = self.conv.weight.shape[2:]
        height, width = (2 * (k // 2) + 2 for k in x.shape[:2])
        x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))[:height, :width]
        x = x.reshape(height // 2, 2, width // 2, 2, n).transpose(0, 2, 1, 3, 4).reshape(height // 2, width // 2, 4 * n)
        weight = self.conv.weight.reshape(2, 2, 2, 2, n, m).transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * n, m)
        return _convolve(x, weight, 0) + self.conv.bias[None, None]


def _convolve(x: Array, weight: Array, padding: int) -> Array:
    size, _, n, m = weight.shape
    x = jnp.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    height, width = (k - size + 1 for k in x.shape[:2])
    shifts = [x[i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ weight.reshape(size * size * n, m)


class Norm(eqx.Module):
    """Group normalisation: each example by itself, so that a block has no state and a batch no say.

    Channels are last. `equinox.nn.GroupNorm` wants them first: with it a training step of ResNet-6 takes 20 % longer on a CPU.
    """

    weight: Array
    bias: Array

    def __init__(self, channels: int):
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)

    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        groups = min(32, channels // 2)

        def group_mean(z: Array) -> Array:
            return jnp.repeat(jnp.mean(jnp.mean(z, axis=(0, 1)).reshape(groups, -1), axis=1), channels // groups)

        mean = group_mean(x)
        variance = jnp.maximum(group_mean(x * x) - mean * mean, 0.0)
        scale = self.weight * jax.lax.rsqrt(variance + 1e-5)
        return x * scale[None, None] + (self.bias - mean * scale)[None, None]


class Layer(eqx.Module):
    """conv(ReLU(norm(x))), with t for the convolution where it is given."""

    norm: Norm
    conv: Conv | Halve

    def __call__(self, x: Array, *t: Array) -> Array:
        return self.conv(jax.nn.relu(self.norm(x)), *t)


class Residual(eqx.Module):
    """GN-ReLU-conv-GN-ReLU-conv: what one layer of the residual net adds to x; it does not depend on t."""

    first: Layer
    second: Layer

    def __init__(self, width: int, *, key: Array):
        self.first, self.second = (Layer(Norm(width), Conv(3, width, width, bias=False, key=k)) for k in jax.random.split(key))

    def __call__(self, t: Array, x: Array) -> Array:
        del t
        return self.second(self.first(x))


class VectorField(eqx.Module):
    """The same with the depth t as one more channel of each convolution, and a last normalisation."""

    first: Layer
    second: Layer
    norm: Norm

    def __init__(self, width: int, *, key: Array):
        self.first, self.second = (Layer(Norm(width), Conv(3, width + 1, width, key=k)) for k in jax.random.split(key))
        self.norm = Norm(width)

    def __call__(self, t: Array, x: Array) -> Array:
        return self.norm(self.second(self.first(x, t), t))


def layers(width: int, depth: int, turn: float | None = None, *, key: Array) -> Residual:
    """A stack of residual blocks, for `jode.Layers`.

    Args:
        width: channels.
        depth: N, the number of blocks; each array of the stack leads with it.
        turn: that of `jode.depth.smooth_init`: 0 starts with tied blocks; None draws them independently.
        key: a PRNG key.
    """
    one = lambda key: Residual(width, key=key)
    if turn is None:
        return eqx.filter_vmap(one)(jax.random.split(key, depth))
    return jode.depth.smooth_init(key, one, depth, turn)


def vector_field(t: Array, x: Array, w: Callable) -> Array:
    """f(t, x, w) = w(t, x): a module as the vector field of `jode.solve`, whose arguments are its weights."""
    return w(t, x)


class Classifier(eqx.Module):
    """A stem makes x(0); dx/dt = block(t, x), or x_{n+1} = x_n + (span / N) block_n(t_n, x_n); a head reads the scores off x(span).

    The stem is a convolution, and for images of more than 12 rows two more that halve them. The head is a linear layer after the
    mean over pixels of ReLU(norm(x)).

    Args:
        shape: (height, width, channels) of an image.
        width: channels inside.
        classes: how many.
        block: (width, key=) -> a module (t, x) -> dx/dt: `VectorField`, `Residual`, or `layers` of a depth; None leaves it out.
        span: the depth of the ODE, or of all layers.
        key: a PRNG key.
    """

    stem: list[Callable[[Array], Array]]
    block: Any
    norm: Norm
    linear: eqx.nn.Linear
    span: float = eqx.field(static=True)

    def __init__(
        self, shape: tuple[int, ...], width: int = 64, classes: int = 10, *, block: Any = VectorField, span: float = 1.0, key: Array
    ):
        stem, inside, head = jax.random.split(key, 3)
        first, *others = jax.random.split(stem, 3)
        self.stem = [Conv(3, shape[-1], width, padding=0, key=first)]
        if shape[0] > 12:
            self.stem += [Layer(Norm(width), Halve(Conv(4, width, width, key=k))) for k in others]
        self.block = None if block is None else block(width, key=inside)
        self.norm, self.linear = Norm(width), _linear(width, classes, head)
        self.span = span

    def features(self, image: Array) -> Array:
        """x(0): the initial state of the layers or of the ODE."""
        for layer in self.stem:
            image = layer(image)
        return image

    def logits(self, x: Array) -> Array:
        """The head: class scores (classes,) of the state that the layers or the ODE end in."""
        return self.linear(jnp.mean(jax.nn.relu(self.norm(x)), axis=(0, 1)))

    def __call__(self, image: Array, solver: Any = None, adjoint: Any = jode.Backprop()) -> tuple[Array, tuple[Any, Any]]:
        """Class scores (classes,), and the evaluations of the vector field, forward and backward."""
        x = self.features(image)
        if self.block is None:
            return self.logits(x), (0, 0)
        sol = jode.solve(vector_field, x, (0.0, self.span), self.block, solver=solver, adjoint=adjoint)
        return self.logits(sol.ys[-1]), (sol.stats.nfe, sol.stats.nfe_backward)


class Perceptron(eqx.Module):
    """One hidden layer of 300 units between the pixels and the class scores; `width`, solver and adjoint do not matter."""

    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, shape: tuple[int, ...], width: int = 64, classes: int = 10, *, key: Array):
        del width
        a, b = jax.random.split(key)
        self.hidden, self.out = _linear(shape[0] * shape[1] * shape[2], 300, a), _linear(300, classes, b)

    def __call__(self, image: Array, solver: Any = None, adjoint: Any = None) -> tuple[Array, tuple[int, int]]:
        """Class scores (classes,), and no evaluations."""
        del solver, adjoint
        return self.out(jax.nn.relu(self.hidden(image.reshape(-1)))), (0, 0)


def _linear(n: int, m: int, key: Array) -> eqx.nn.Linear:
    """With weights of variance 1 / n and no bias at first, as in the convolutions."""
    start = jax.random.normal(key, (n, m)).T * jnp.sqrt(1 / n), jnp.zeros(m)
    return eqx.tree_at(lambda linear: (linear.weight, linear.bias), eqx.nn.Linear(n, m, key=key), start)


class Row(NamedTuple):
    """A row of Table 1: model = make(shape, width, classes, key=key), and then model(image, solver, adjoint)."""

    make: Callable
    solver: Any = None
    adjoint: Any = jode.Backprop()


def _resnet(depth: int) -> Row:
    return Row(partial(Classifier, block=partial(layers, depth=depth), span=float(depth)), jode.Layers(jode.euler))


MODELS = {
    "1-layer MLP": Row(Perceptron),
    "no block": Row(partial(Classifier, block=None)),
    "1-block ResNet": _resnet(1),
    "ResNet-6": _resnet(6),
    "RK-Net": Row(Classifier, jode.Fixed(jode.rk4, 2), jode.Backprop(checkpoints=None)),
    "ODE-Net": Row(Classifier, jode.Adaptive(jode.dopri5, 1e-3, 1e-3, max_steps=64), jode.Backprop(checkpoints=None)),
    "ODE-Net, continuous adjoint": Row(Classifier, jode.Adaptive(jode.dopri5, 1e-3, 1e-3, max_steps=64), jode.Backsolve()),
    "ODE-Net, reversible": Row(Classifier, jode.Fixed(jode.reversible_heun, 8), jode.MemoryFree()),
}
