"""Strict everywhere: float64, no implicit dtype or rank promotion, warnings are errors (pyproject.toml).

Compiled programs are dropped after each file: thousands of them in one process take gigabytes, and more memory maps than Linux allows.
On a CPU programs are compiled without XLA's costlier optimisations, which is much faster and means the same; tests of memory ask for
them with the mark `optimized`. On a GPU XLA without them crashed, or gave wrong numbers (jax 0.11.2, H200), where with them all was exact.
"""

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _compilation(request):
    fast = jax.default_backend() == "cpu" and "optimized" not in request.keywords
    jax.config.update("jax_disable_most_optimizations", fast)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def _programs():
    yield
    jax.clear_caches()
