"""Constants that exist because of a platform's compiler, each with the measurement behind it.

Choices between forms of a program are made when it is lowered for the platform that runs it: `rows.native` hands the
platform's name to the form it stages. Times are of two cores of an AMD EPYC with jax 0.10.2.
"""

from __future__ import annotations

from typing import Any

import jax

import jode.config

# Components up to which a state is small. For small states the rows of a batch lie last: Lotka-Volterra, 10,000 rows, Tsit5 takes
# 1.7 µs a trajectory so, and 4.6 µs with rows first. For large ones each row is whole, as matrix products and convolutions want it.
SMALL = 32

# Components up to which a sum over them is written out: XLA on a CPU fuses additions into the loop's one kernel, a reduction not.
# Also those up to which matrices with the rows last are inverted by elimination written out: a factorisation and eight solves of
# 1,000 matrices 3 x 3 take 53 µs so and 290 µs by LAPACK; 8 x 8 4.1 ms and 1.1 ms, for XLA computes what it fuses again and again.
WRITTEN_OUT = 4

# Components up to which matrices with the rows last are inverted by elimination in a loop, BLOCK numbers of them at a time, and a
# solve is a product. 1,000 inverses take 0.21 ms so for 8 components and 2.2 ms for 20, by LAPACK 1.1 and 5.9 ms, whose factors
# alone take 0.4 and 1.9 ms, and eight solves with them more than that; for 32 components 25, 17 and 5.4 ms. One inverse and eight
# products take 1.1 µs for 8 components and 6.1 for 20, by LAPACK 1.5 and 7.0. In blocks of half the size, or twice, the 2.2 ms are
# 3.9 and 3.7: smaller ones take more turns, larger ones XLA hands to several threads, each turn anew.
INVERTED, BLOCK = 24, 25_600

# Rows of a batch that finish late go on in groups of GROUP where at least MANY rows ran together and at most one in FEW_LEFT is
# left: on a CPU the stages of a group fit its cache. An accelerator runs all rows at once and has nothing to gain.
GROUP = 512
MANY = 8 * GROUP
FEW_LEFT = 8

# Bytes of states that the default adjoint keeps, and the most checkpoints it places: 1,000 reverse half a million steps with two
# repetitions of each.
BUDGET = 2**26
PLENTY = 1000

# Tables have static shapes and are filled when they are made: with a slot for each of max_steps = 4096 steps the gradient of 1,000
# rows of Lorenz' equations took 29 ms, and with 256 slots 2.4 ms. So the default adjoint records the steps of a found grid in
# chapters of RECORD steps, or of as many as there are chapters. Tables of at most LITTLE bytes are filled in
# less than that costs: where a march is not one function, a loop inside a loop made 22 µs of one trajectory 100 µs.
LITTLE, RECORD = 2**18, 256

# Equations of a traced field from which its program is long, of which each product takes some away: see `long`.
LONG = 60
PRODUCT, PRODUCTS = 10, {"dot_general", "conv_general_dilated"}

# What only moves numbers.
MOVES = {"broadcast_in_dim", "concatenate", "convert_element_type", "pad", "reshape", "rev", "slice", "squeeze", "transpose"}

# Versions of JAX, of which XLA's source was read or whose programs were tried at random (`python -m benchmarks.fuzz`).
TRIED = {(0, 7), (0, 8), (0, 9), (0, 10), (0, 11), (0, 12)}

# Reversible methods and MemoryFree: over n / SEGMENTS steps backwards a rounding error grows at most by GROWTH.
SEGMENTS, GROWTH = 16, 100.0


def one_function(platform: str | None, state: int, times: int, backwards: bool) -> bool:
    """Whether XLA may compile a march as one function; times: in how many rows and directions the state is there.

    On a CPU it runs a program kernel by kernel, 0.1 to 0.2 µs for each, or as one function if told to, with loops that are
    vectorised less well. The gradient of Lorenz' equations takes 22 µs so and 66 µs otherwise, for 10 rows 130 and 520, for 100
    480 and 920, for 400 2,390 and 2,260; a Hessian-vector product of one 62 and 296; of Lorenz' 96 model with 40 components 100 and
    364, with 512 895 and 1,500. A solve alone of that model with 40 components takes 49 and 65, with 128 108 and 95, with 512 364
    and 255; of Lorenz' equations and 1,000 rows 990 and 1,090. Traced and compiled it is in two thirds of the time. These are the
    sizes at which it pays; what is safe (`most` in native/whole.py) may be less: 100 rows of Lorenz' equations by tsit5 are not
    shown to be. With a version of JAX that was not tried (TRIED) the program stays as it was, and where the user said so
    (`jode.config.one_function`).
    """
    most = 512 if backwards else 4096 if times > 1 and state <= SMALL else 128
    tried = jax.__version_info__[:2] in TRIED and jode.config.one_function == "auto"
    return platform == "cpu" and tried and state * times <= most


def rolled(platform: str | None, state: int, weights: int, batched: bool) -> bool:
    """Whether the stages of a small step are differentiated in a loop.

    XLA on a CPU fuses the unrolled stages of a derivative and computes them again and again: 0.39 ms against 0.14 ms rolled for the
    gradient of Lotka-Volterra, 104 ms against 14 ms for 1,000 rows, and 0.7 to 1.3 s against 0.13 s to compile. Not known elsewhere
    (platform None: inside a derivative of the derivative) the loop is taken too: it compiles sooner.
    """
    return platform in (None, "cpu") and state <= SMALL and (not batched or weights <= SMALL)


def long(equations: int, state: int) -> bool:
    """Whether a traced field is so long that a step holds it once, its stages in a loop.

    XLA compiles the field's program at each place where it stands, and on a CPU fuses stages that are written out and computes them
    again. A training step of ODE-Net (163 equations, 4 of them products; processor time) compiles in 7.7 s, not 16.9, and runs in
    0.81 of the time; ten elementwise layers in 3.0 s, not 8.7, and 0.2 of the time. With 8 to 47 equations it compiles no sooner
    and runs in 0.4 to 1.6 of the time; with 20 products and 80 others too, in 1.4: so each product takes PRODUCT equations away.
    Not measured elsewhere, where programs are compiled as often.
    """
    return equations >= LONG and state > SMALL


def kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether the derivative of a stage in a loop keeps what a primitive computed; what only moves numbers is moved again.

    The loop writes what it keeps to a table, and reads it there. Without the copies of an image that a convolution multiplies a
    training step of RK-Net takes 0.98 of the time without a loop, with them 1.05, and 57 MiB instead of 74.
    """
    return primitive.name not in MOVES


def grouped(platform: str | None, rows: int | None, last: bool) -> bool:
    """Whether the rows that finish late go on in groups."""
    return platform == "cpu" and rows is not None and last and rows >= MANY
