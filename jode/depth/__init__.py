"""Residual networks and their ODEs: from one to the other, and how far apart they are.

A residual network of N layers is x_{n+1} = x_n + h f(t_n, x_n, θ_n) with t_n = n h and h = span / N: Euler's method for
dx/dt = f(t, x, θ(t / span)), where θ(n / N) = θ_n. Weights are stacked: a pytree, such as an Equinox module or a dict, whose
arrays lead with depth. With `degree=1` the N slices are weights at the nodes of N - 1 steps, and θ(n / (N - 1)) = θ_n.

Every function of a network takes f, x and weights in this order, and `method`, `degree` and `span` with the meaning and the
defaults of `resnet`: by default all speak of the network that `resnet(f, x, weights)` runs, h = 1. `span=1.0` is the scaling
1/N.
"""

from jode.depth.network import Bound, distance, distance_bound, reconstruction_error, resnet
from jode.depth.weights import (
    cosine,
    expand,
    field,
    interpolate,
    legendre,
    project,
    refine,
    roughness,
    smooth_init,
    smoothness,
    sobolev,
    stack,
    unstack,
    untie,
)

__all__ = [
    "Bound",
    "cosine",
    "distance",
    "distance_bound",
    "expand",
    "field",
    "interpolate",
    "legendre",
    "project",
    "reconstruction_error",
    "refine",
    "resnet",
    "roughness",
    "smooth_init",
    "smoothness",
    "sobolev",
    "stack",
    "unstack",
    "untie",
]
