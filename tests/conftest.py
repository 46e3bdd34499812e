"""Strict everywhere: float64, no implicit dtype or rank promotion, warnings are errors (pyproject.toml).

Compiled programs are dropped after each file: thousands of them in one process take gigabytes, and more memory maps than Linux allows.
On a CPU programs are compiled without XLA's costlier optimisations, which is much faster and means the same; tests of memory ask for
them with the mark `optimized`. On a GPU XLA without them crashed, or gave wrong numbers (jax 0.11.2, H200), where with them all was exact.
Up to jax 0.10 XLA has two ways to write a CPU's fused loops, and the older one compiles the tests in less than half the time. Tests of
bits ask for the other one, which users get, by `tests.problems.users_jit`.
"""

import os

import jax
import pytest

if jax.__version_info__ < (0, 11):  # an unknown flag would end the process
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"

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
