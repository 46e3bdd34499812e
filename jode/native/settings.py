"""JAX's settings where a march was made: its forms are traced later, perhaps outside of the context that the user made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

import jax


class Settings(NamedTuple):
    """What of JAX's configuration the trace of a function depends on: the width of numbers, the precision of products, how dtypes
    and ranks are promoted, and whether JAX looks for NaNs.
    """

    x64: bool
    matmul: Any
    dtypes: str
    ranks: str
    nans: bool

    @classmethod
    def now(cls) -> Settings:
        c: Any = jax.config
        return cls(
            c.jax_enable_x64,
            c.jax_default_matmul_precision,
            c.jax_numpy_dtype_promotion,
            c.jax_numpy_rank_promotion,
            c.jax_debug_nans,
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context with these settings."""
        managers: tuple[Any, ...] = (
            _enable_x64,
            jax.default_matmul_precision,
            jax.numpy_dtype_promotion,
            jax.numpy_rank_promotion,
            jax.debug_nans,
        )
        with ExitStack() as stack:
            for manager, then, now in zip(managers, self, Settings.now(), strict=True):
                if then != now:
                    stack.enter_context(manager(then))
            yield


def in_settings_of_its_march(rule: Callable) -> Callable:
    """A rule of a primitive, applied with the settings of the march that it is given."""

    @wraps(rule)
    def restored(*args: Any, march: Any, **params: Any) -> Any:
        with march.settings.restored():
            return rule(*args, march=march, **params)

    return restored


def _enable_x64(value: bool) -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(value)
    from jax.experimental import enable_x64  # pyright: ignore  before jax 0.8

    return enable_x64(value)
