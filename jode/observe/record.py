"""The record that gradients need: the steps taken, and states that some of them start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jode.observe.base import Seen, Watch
from jode.tree import State, stack_full, stack_zeros, store

if TYPE_CHECKING:
    from jode.march import March, Problem


class Recorded(NamedTuple):
    """The accepted steps, common to all rows: how many, the time each ends at, and the state that every so many start from."""

    slots: Any
    times: Any
    states: Any


@dataclass(frozen=True)
class Record(Watch):
    """With `keep` the states that steps 0, keep, 2 keep … start from are kept; none where it is 0. Times are where steps are found."""

    keep: int

    def init(self, march: March, problem: Problem, s: State, control: Any) -> Recorded:
        most = march.plan.most
        if march.solver.lands:
            return Recorded((), (), stack_zeros(-(-most // self.keep), s) if self.keep else ())
        # Entries never written are never read. Filled with the width, the tables are made after it: more than eight kernels that could
        # run at once make XLA's CPU runtime call in other threads, which costs more than a small solve.
        states = stack_full(-(-most // self.keep), s, control.h) if self.keep else ()
        return Recorded(jnp.zeros((), jnp.int32), stack_full(most, control.t, control.h), states)

    def step(self, march: March, problem: Problem, carry: Recorded, seen: Seen) -> Recorded:
        slot = carry.slots if seen.slot is None else seen.slot
        states = store(carry.states, slot, self.keep, seen.s) if self.keep else ()
        if seen.slot is not None:
            return carry._replace(states=states)
        moved: Array = jnp.any(seen.accept).astype(jnp.int32)
        return Recorded(slot + moved, carry.times.at[slot].set(seen.t), states)
