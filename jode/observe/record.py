"""The record that gradients need: the steps taken, and states that some of them start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.observe.base import Seen, Watch
from jode.tree import put, stack_full, stack_zeros, store
from jode.window import Problem


class Recorded(NamedTuple):
    """The accepted steps of the last chapter, in slots common to all rows: how many, the time each ends at, and the state that
    every so many start from; and what the loop carried where each chapter starts. nodes: as those of a `Grid`.
    """

    slots: Any
    times: Any
    states: Any
    chapters: Any
    nodes: Any = ()


@dataclass(frozen=True)
class Record(Watch):
    """With `keep` the states that steps 0, keep, 2 keep … start from are kept; none where it is 0. Times are where steps are found.

    The tables have `slots` of them. With `chapters`, when the loop has run so often it starts a new one, at most so many: what
    it carries is kept, and the slots are used again. The steps of a chapter but the last are found again from there, so that
    tables cost what steps take, and not what `max_steps` allows.
    """

    keep: int
    slots: int
    chapters: int = 0

    @classmethod
    def of(cls, kept: Any) -> Record:
        """The record that was kept, a `Kept`, as its shapes tell: the way back takes what there is."""
        length = lambda table: next((x.shape[0] for x in jax.tree.leaves(table)), 0)
        return cls(min(length(kept.states), 1), length(kept.grid.times), max(length(kept.chapters) - 1, 0))

    @property
    def waits(self) -> bool:
        return self.chapters > 0

    def init(self, march: Any, problem: Problem, c: Any) -> Recorded:
        if march.solver.lands:
            return Recorded((), (), stack_zeros(-(-self.slots // self.keep), c.s) if self.keep else (), ())
        # Entries never written are never read. Filled with the width, the tables are made after it: more than eight kernels
        # that could run at once make XLA's CPU runtime call in other threads, which costs more than a small solve.
        t, h = c.control.t, c.control.h
        states = stack_full(-(-self.slots // self.keep), c.s, h) if self.keep else ()
        chapters = put(stack_full(self.chapters + 1, chapter_start(c), h), 0, chapter_start(c)) if self.chapters else ()
        nodes = stack_zeros(self.slots, node_of(c.control))
        return Recorded(jnp.zeros((), jnp.int32), stack_full(self.slots, t, h), states, chapters, nodes)

    def step(self, march: Any, problem: Problem, carry: Recorded, seen: Seen) -> Recorded:
        slot = carry.slots if seen.slot is None else seen.slot
        states = store(carry.states, march.solver.entry(march, problem, slot), self.keep, seen.s) if self.keep else ()
        if seen.slot is not None:
            return carry._replace(states=states)
        moved: Array = jnp.any(seen.accept).astype(jnp.int32)
        write = lambda table, x: table.at[slot].set(x)
        nodes = jax.tree.map(write, carry.nodes, seen.node)
        return Recorded(slot + moved, write(carry.times, seen.t), states, carry.chapters, nodes)

    def due(self, march: Any, problem: Problem, carry: Recorded, c: Any) -> Callable[[Any], Array]:
        next_ = (c.control.loops // self.slots + 1) * self.slots
        return lambda control: control.loops >= next_

    def serve(self, march: Any, problem: Problem, carry: Recorded, due: Array, c: Any) -> Recorded:
        index = jnp.where(due, c.control.loops // self.slots, self.chapters)  # the last entry takes what is not wanted
        chapters = put(carry.chapters, index, chapter_start(c))
        return carry._replace(slots=jnp.where(due, 0, carry.slots), chapters=chapters)


def node_of(control: Any) -> Any:
    """Which of ts each row stands at, where the control says so."""
    return getattr(control, "node", ())


def chapter_start(c: Any) -> tuple:
    """What the loop carries at the start of a chapter. How often it has run follows from the chapter; states before resets are kept
    by marches without chapters alone.
    """
    if not hasattr(c.control, "loops"):
        return c.s, c.slope, ()
    return c.s, c.slope, c.control._replace(**{name: () for name in ("loops", "loose", "before") if hasattr(c.control, name)})
