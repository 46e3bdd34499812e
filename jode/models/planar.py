"""Ott et al.'s classifier of points: no layers before the ODE, an autonomous vector field, one linear layer behind."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import jode


class Field(eqx.Module):
    """Three convolutions (of sizes 1, 3, 1) over the two coordinates of x, one channel, with ReLU between."""

    weights: tuple[Array, Array, Array]
    biases: tuple[Array, Array, Array]

    def prepared(self) -> Field:
        """For a solve: the middle convolution, on two positions with zeros around them, as one matrix."""
        first, (before, here, after), last = self.weights
        return Field((first, jnp.block([[here, before], [after, here]]), last), self.biases)


def vector_field(t: Array, x: Array, w: Field) -> Array:
    """dx/dt at a point x (2,), of a `prepared` field."""
    (first, middle, last), (a, b, c) = w.weights, w.biases
    h = jax.nn.relu(x[:, None] * first[None] + a[None])
    return jax.nn.relu((h.reshape(-1) @ middle).reshape(2, -1) + b[None]) @ last + c


class Planar(eqx.Module):
    """Kaiming-normal weights (variance 2 / fan-in), no biases at first: 3,207 numbers with the default width.

    Args:
        width: channels inside.
        classes: how many.
        key: a PRNG key.
    """

    field: Field
    weight: Array
    bias: Array

    def __init__(self, width: int = 32, classes: int = 2, *, key: Array):
        draws = (1, (width,)), (3 * width, (3, width, width)), (width, (width,)), (2, (2, classes))
        keys = jax.random.split(key, 4)
        *inner, self.weight = (jax.random.normal(k, s) * (2 / fan_in) ** 0.5 for k, (fan_in, s) in zip(keys, draws, strict=True))
        self.field = Field(tuple(inner), (jnp.zeros(width), jnp.zeros(width), jnp.zeros(())))
        self.bias = jnp.zeros(classes)

    def ends(self, x: Array, solver: Any, adjoint: Any = jode.Backprop(None)) -> Array:
        """Where the flow takes points x (B, 2)."""
        field = self.field.prepared()
        return jax.vmap(lambda x: jode.odeint(vector_field, x, (0.0, 1.0), field, solver=solver, adjoint=adjoint)[-1])(x)

    def logits(self, x: Array, solver: Any, adjoint: Any = jode.Backprop(None)) -> Array:
        """Class scores (B, classes) of points x (B, 2)."""
        return self.ends(x, solver, adjoint) @ self.weight + self.bias[None]
