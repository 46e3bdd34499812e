"""Coefficients of methods: one literal each, properties derived and checked."""

from jode.tableau.rosenbrock import RODAS5P, ROSENBROCK23, RosenbrockTableau
from jode.tableau.runge_kutta import (
    BOSH3,
    DOPRI5,
    DOPRI8,
    EULER,
    HEUN,
    MIDPOINT,
    RALSTON,
    RK4,
    TSIT5,
    Row,
    Tableau,
)

__all__ = [
    "BOSH3",
    "DOPRI5",
    "DOPRI8",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "RODAS5P",
    "ROSENBROCK23",
    "TSIT5",
    "RosenbrockTableau",
    "Row",
    "Tableau",
]
