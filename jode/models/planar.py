"""Ott et al.'s classifier of points: no layers before the ODE, an autonomous vector field, one linear layer behind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jode

Weights = dict[str, Any]


def init(key: Array, width: int = 32, classes: int = 2) -> Weights:
    """Kaiming-normal weights (variance 2 / fan-in), no biases: 3,207 numbers with the default width."""
    keys = jax.random.split(key, 4)

    def draw(key: Array, fan_in: int, *shape: int) -> Array:
        return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5

    return {
        "in": {"weight": draw(keys[0], 1, width), "bias": jnp.zeros(width)},
        "mid": {"weight": draw(keys[1], 3 * width, 3, width, width), "bias": jnp.zeros(width)},
        "out": {"weight": draw(keys[2], width, width), "bias": jnp.zeros(())},
        "head": {"weight": draw(keys[3], 2, 2, classes), "bias": jnp.zeros(classes)},
    }


def vector_field(t: Array, x: Array, w: Weights) -> Array:
    """Three convolutions (of sizes 1, 3, 1) over the two coordinates of x, one channel, with ReLU between; `prepared` weights."""
    h = jax.nn.relu(x[:, None] * w["in"]["weight"][None] + w["in"]["bias"][None])
    h = jax.nn.relu((h.reshape(-1) @ w["mid"]["weight"]).reshape(2, -1) + w["mid"]["bias"][None])
    return h @ w["out"]["weight"] + w["out"]["bias"]


def prepared(w: Weights) -> Weights:
    """The vector field's weights, the middle convolution, on two positions with zeros around them, as one matrix."""
    before, here, after = w["mid"]["weight"]
    return {"in": w["in"], "mid": {**w["mid"], "weight": jnp.block([[here, before], [after, here]])}, "out": w["out"]}


def ends(w: Weights, x: Array, solver: Any, adjoint: Any = jode.Backprop(None)) -> Array:
    """Where the flow takes points (B, 2)."""
    blocks = prepared(w)
    return jax.vmap(lambda x: jode.odeint(vector_field, x, (0.0, 1.0), blocks, solver=solver, adjoint=adjoint)[-1])(x)


def logits(w: Weights, x: Array, solver: Any, adjoint: Any = jode.Backprop(None)) -> Array:
    """Class scores of points (B, 2)."""
    return ends(w, x, solver, adjoint) @ w["head"]["weight"] + w["head"]["bias"][None]
