"""Densities: continuous normalizing flows, planar flows, and flow matching. Models are Equinox modules; functions take one example.

A flow moves x(t₀) ~ base to x(t₁) ~ data by dx/dt = f(t, x), and d log p(x(t)) / dt = -tr ∂f/∂x (Chen, Rubanova, Bettencourt &
Duvenaud 2018). Batches are `jax.vmap`'s: each row then has its own steps, status and error, and one that fails is NaN and
harms no other.
"""

from jode.models.density.flow import CNF, Augmented, Density, Field, Grid, Normal, log_likelihood, on_grid, push, sample
from jode.models.density.matching import coupling, matching_loss, path, path_energy, squared_w2
from jode.models.density.planar import NF, PlanarField, PlanarMap
from jode.models.density.trace import Exact, Formula, Hutchinson, HutchPlusPlus

__all__ = [
    "CNF",
    "NF",
    "Augmented",
    "Density",
    "Exact",
    "Field",
    "Formula",
    "Grid",
    "HutchPlusPlus",
    "Hutchinson",
    "Normal",
    "PlanarField",
    "PlanarMap",
    "coupling",
    "log_likelihood",
    "matching_loss",
    "on_grid",
    "path",
    "path_energy",
    "push",
    "sample",
    "squared_w2",
]
