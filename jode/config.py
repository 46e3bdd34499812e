"""Settings of the whole process: `jode.config.one_function = "never"`.

`one_function` says whether small marches on a CPU are compiled as one function each ("auto", the default, where that is known to be
safe and to pay) or never. The environment variable JODE_ONE_FUNCTION, read when jode is imported, says what it is at first.
Setting it drops what JAX has compiled (`jax.clear_caches`), so that it holds for every solve from then on.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import jax

CHOICES = ("auto", "never")


def checked(value: str, name: str) -> str:
    if value not in CHOICES:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES))}, got {value!r}")
    return value


class _Settings(ModuleType):
    """A module whose settings are checked when they are set."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "one_function" and checked(str(value), "jode.config.one_function") != self.one_function:
            jax.clear_caches()
        super().__setattr__(name, value)


one_function: str = checked(os.environ.get("JODE_ONE_FUNCTION", "auto"), "the environment variable JODE_ONE_FUNCTION")
sys.modules[__name__].__class__ = _Settings
