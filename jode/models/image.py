"""The image classifiers of Chen et al. 2018, Table 1: one stem, one head, and between them layers or an ODE.

Everything is a pure function of one image (height, width, channels); batches are `jax.vmap`'s. Weights are dicts of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jode
import jode.depth

Weights = dict[str, Any]

# Kind, depth or solver, and adjoint.
MODELS = {
    "1-layer MLP": ("mlp", None, None),
    "no block": ("none", None, None),
    "1-block ResNet": ("resnet", 1, jode.Backprop()),
    "ResNet-6": ("resnet", 6, jode.Backprop()),
    "RK-Net": ("ode", jode.Fixed(jode.rk4, 2), jode.Backprop(checkpoints=None)),
    "ODE-Net": ("ode", jode.Adaptive(jode.dopri5, 1e-3, 1e-3, max_steps=64), jode.Backprop(checkpoints=None)),
    "ODE-Net, continuous adjoint": ("ode", jode.Adaptive(jode.dopri5, 1e-3, 1e-3, max_steps=64), jode.Backsolve()),
    "ODE-Net, reversible": ("ode", jode.Fixed(jode.reversible_heun, 8), jode.MemoryFree()),
}


@dataclass(frozen=True)
class Classifier:
    """init(key) -> weights; apply(weights, image) -> (logits, evaluations of the vector field, forward and backward)."""

    name: str
    init: Callable[[Array], Weights]
    apply: Callable[[Weights, Array], tuple[Array, tuple[Any, Any]]]


def classifier(name: str, shape: tuple[int, int, int], width: int = 64, classes: int = 10, solver: Any = None) -> Classifier:
    """A model of `MODELS` for images of this shape; `width` channels inside; an ODE may be given another solver than its own."""
    kind, what, adjoint = MODELS[name]
    if solver is not None:
        what = solver
    if kind == "mlp":
        return Classifier(name, partial(_init_mlp, shape=shape, classes=classes), _apply_mlp)
    inits = {
        "none": None,
        "resnet": partial(_init_layers, depth=what, width=width),
        "ode": partial(_init_vector_field, width=width),
    }
    init = partial(_init_net, block=inits[kind], shape=shape, width=width, classes=classes)
    if kind == "none":
        return Classifier(name, init, partial(_apply_net, block=None))
    if kind == "resnet":
        return Classifier(
            name, init, partial(_apply_net, block=residual, span=float(what), solver=jode.Layers(jode.euler), adjoint=adjoint)
        )
    return Classifier(name, init, partial(_apply_net, block=vector_field, span=1.0, solver=what, adjoint=adjoint))


def deep(
    shape: tuple[int, int, int],
    depth: int,
    *,
    width: int = 16,
    solver: jode.Layers = jode.Layers(jode.euler),
    span: float = 1.0,
    adjoint: Any = jode.Backprop(),
    turn: float | None = 0.0,
    classes: int = 10,
) -> Classifier:
    """A residual network of any depth between the same stem and head, each of its steps span / N wide.

    `turn` is that of `jode.depth.smooth_init`: 0 starts with tied layers; None draws them independently.
    """
    one = partial(_init_residual, width=width)
    if turn is None:
        block = partial(_init_layers, depth=depth, width=width)
    else:
        block = lambda key: jode.depth.smooth_init(key, one, depth, turn)
    init = partial(_init_net, block=block, shape=shape, width=width, classes=classes)
    apply = partial(_apply_net, block=residual, span=span, solver=solver, adjoint=adjoint)
    return Classifier(f"{depth} layers", init, apply)


def features(weights: Weights, image: Array) -> Array:
    """The stem's output: the initial state of the layers or of the ODE."""
    return _stem(weights["stem"], image)


# One residual block, as a layer x + f(n, x, w) and as a vector field f(t, x, w).


def residual(t: Array, x: Array, w: Weights) -> Array:
    """GN-ReLU-conv-GN-ReLU-conv: what one layer of the residual net adds to x; it does not depend on t."""
    del t
    x = _conv(w["conv1"], jax.nn.relu(_norm(w["norm1"], x)))
    return _conv(w["conv2"], jax.nn.relu(_norm(w["norm2"], x)))


def vector_field(t: Array, x: Array, w: Weights) -> Array:
    """The same with the depth t as one more channel of each convolution, and a last normalisation."""
    x = _conv(w["conv1"], jax.nn.relu(_norm(w["norm1"], x)), t)
    x = _conv(w["conv2"], jax.nn.relu(_norm(w["norm2"], x)), t)
    return _norm(w["norm3"], x)


def _apply_net(
    weights: Weights, image: Array, *, block: Callable | None, span: float = 1.0, solver: Any = None, adjoint: Any = None
) -> tuple[Array, tuple[Any, Any]]:
    x = features(weights, image)
    if block is None:
        return logits(weights["head"], x), (0, 0)
    sol = jode.solve(block, x, (0.0, span), weights["block"], solver=solver, adjoint=adjoint)
    return logits(weights["head"], sol.ys[-1]), (sol.stats.nfe, sol.stats.nfe_backward)


def _init_net(
    key: Array, *, block: Callable[[Array], Weights] | None, shape: tuple[int, int, int], width: int, classes: int
) -> Weights:
    stem, inside, head = jax.random.split(key, 3)
    weights: Weights = {"stem": _init_stem(stem, shape[-1], width, shape[0] > 12), "head": _init_head(head, width, classes)}
    if block is not None:
        weights["block"] = block(inside)
    return weights


def _init_layers(key: Array, depth: int, width: int) -> Weights:
    return jax.vmap(partial(_init_residual, width=width))(jax.random.split(key, depth))


def _init_residual(key: Array, width: int) -> Weights:
    a, b = jax.random.split(key)
    return {
        "norm1": _init_norm(width),
        "conv1": _init_conv(a, 3, width, width, bias=False),
        "norm2": _init_norm(width),
        "conv2": _init_conv(b, 3, width, width, bias=False),
    }


def _init_vector_field(key: Array, width: int) -> Weights:
    a, b = jax.random.split(key)
    return {
        "norm1": _init_norm(width),
        "conv1": _init_conv(a, 3, width + 1, width),
        "norm2": _init_norm(width),
        "conv2": _init_conv(b, 3, width + 1, width),
        "norm3": _init_norm(width),
    }


# The stem (a convolution, and for large images two that halve them), the head, the one-layer perceptron.


def _init_stem(key: Array, channels: int, width: int, shrink: bool) -> list[Weights]:
    keys = jax.random.split(key, 3)
    stem = [{"conv": _init_conv(keys[0], 3, channels, width)}]
    if shrink:
        stem += [{"norm": _init_norm(width), "conv": _init_conv(k, 4, width, width)} for k in keys[1:]]
    return stem


def _stem(stem: list[Weights], image: Array) -> Array:
    x = _conv(stem[0]["conv"], image, padding=0)
    for w in stem[1:]:
        x = _halve(w["conv"], jax.nn.relu(_norm(w["norm"], x)))
    return x


def _init_head(key: Array, width: int, classes: int) -> Weights:
    return {"norm": _init_norm(width), "linear": _init_linear(key, width, classes)}


def logits(w: Weights, x: Array) -> Array:
    """The head: class scores of the state that the layers or the ODE end in."""
    return _linear(w["linear"], jnp.mean(jax.nn.relu(_norm(w["norm"], x)), axis=(0, 1)))


def _init_mlp(key: Array, shape: tuple[int, int, int], classes: int, hidden: int = 300) -> Weights:
    a, b = jax.random.split(key)
    return {"in": _init_linear(a, shape[0] * shape[1] * shape[2], hidden), "out": _init_linear(b, hidden, classes)}


def _apply_mlp(weights: Weights, image: Array) -> tuple[Array, tuple[Any, Any]]:
    return _linear(weights["out"], jax.nn.relu(_linear(weights["in"], image.reshape(-1)))), (0, 0)


def _init_linear(key: Array, n: int, m: int) -> Weights:
    return {"weight": jax.random.normal(key, (n, m)) * jnp.sqrt(1 / n), "bias": jnp.zeros(m)}


def _linear(w: Weights, x: Array) -> Array:
    return x @ w["weight"] + w["bias"]


def _init_conv(key: Array, size: int, n: int, m: int, bias: bool = True) -> Weights:
    weight = jax.random.normal(key, (size, size, n, m)) * jnp.sqrt(1 / (size * size * n))
    return {"weight": weight, "bias": jnp.zeros(m)} if bias else {"weight": weight}


def _conv(w: Weights, x: Array, t: Array | None = None, padding: int = 1) -> Array:
    """A convolution of x (height, width, channels), with t as one more constant channel where it is given.

    That channel is convolved apart: it is t times an image that all examples share.
    """
    if t is None:
        y = _convolve(x, w["weight"], padding)
    else:
        ones = jnp.ones((*x.shape[:2], 1), x.dtype)
        y = _convolve(x, w["weight"][:, :, 1:], padding) + t * _convolve(ones, w["weight"][:, :, :1], padding)
    return y + w["bias"] if "bias" in w else y


def _convolve(x: Array, weight: Array, padding: int) -> Array:
    """A convolution of stride one, as one matrix product of shifted copies of x.

    XLA's own is as fast forwards, but on a CPU its derivative by the weight is ten times slower inside a loop.
    """
    size, _, n, m = weight.shape
    x = jnp.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    height, width = (k - size + 1 for k in x.shape[:2])
    shifts = [x[i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ weight.reshape(size * size * n, m)


def _halve(w: Weights, x: Array) -> Array:
    """A 4x4 convolution of stride two and padding one, as a 2x2 one over blocks of 2x2 pixels: no slow dilations in reverse."""
    n, m = w["weight"].shape[2:]
    height, width = (2 * (k // 2) + 2 for k in x.shape[:2])
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))[:height, :width]
    x = x.reshape(height // 2, 2, width // 2, 2, n).transpose(0, 2, 1, 3, 4).reshape(height // 2, width // 2, 4 * n)
    weight = w["weight"].reshape(2, 2, 2, 2, n, m).transpose(0, 2, 1, 3, 4, 5).reshape(2, 2, 4 * n, m)
    return _convolve(x, weight, 0) + w["bias"]


def _init_norm(width: int) -> Weights:
    return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}


def _norm(w: Weights, x: Array, groups: int = 32) -> Array:
    """Group normalisation: each example by itself, so that a block has no state and a batch no say."""
    channels = x.shape[-1]
    groups = min(groups, channels // 2)

    def group_mean(z: Array) -> Array:
        return jnp.repeat(jnp.mean(jnp.mean(z, axis=(0, 1)).reshape(groups, -1), axis=1), channels // groups)

    mean = group_mean(x)
    variance = jnp.maximum(group_mean(x * x) - mean * mean, 0.0)
    scale = w["scale"] * jax.lax.rsqrt(variance + 1e-5)
    return x * scale + (w["shift"] - mean * scale)
