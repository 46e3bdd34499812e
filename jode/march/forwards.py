"""The one loop over windows: every step of a march, and each step of its grid again, on or back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Grid, Solver, Stats, Status
from jode.control.adaptive import direction
from jode.march import resets
from jode.march.values import Carry, Kept, Outcome, Plan, Problem, problem_of
from jode.method import Method
from jode.native import Batch
from jode.observe import Interpolated, Record, Recorded, Seen, Watch
from jode.observe.base import rounding
from jode.observe.record import chapter_start, node_of
from jode.observe.saves import moving_at_start
from jode.rows import Rows
from jode.runner import Runner
from jode.tree import State, nan_unless, stack_zeros, take, where
from jode.tuning import FEW_LEFT, GROUP, grouped, long, rolled
from jode.turns import in_groups
from jode.window import Window, at_fraction, at_nodes, just_after


@dataclass(frozen=True, eq=False)
class Loop:
    """Steps of a march, and its observers: all see every step, and some also wait until they are due."""

    march: March
    problem: Problem
    watches: tuple[Watch, ...]

    @property
    def waiting(self) -> tuple[int, ...]:
        """Which observers the loop stops for."""
        return tuple(i for i, w in enumerate(self.watches) if w.waits)

    def attempt(self, place: Any, c: Carry) -> Carry:
        """Try one step."""
        march, problem, solver, method = self.march, self.problem, self.march.solver, self.march.method
        if march.resetting:
            c = c._replace(control=resets.moving(march, problem, c))
        window = solver.window(march, problem, place, c.control)
        step = method.step(window, c.s, c.slope)
        if solver.estimates or march.needs_slopes:
            step = method.estimated(window, c.s, step)
        if step.ok is not None and not solver.estimates:  # nothing else is tried: the row has failed
            step = step._replace(state=tuple(nan_unless(step.ok, x) for x in step.state))
        if not (solver.estimates or solver.layered):  # a residual network is what it computes
            step = method.looked_at(window, c.s, step)
        accept, control = solver.judge(march, problem, c.control, window, c.s, step)
        if march.resetting:
            accept, control = resets.aims(self, c, window, step, accept, control)
        choose = partial(where, accept) if accept is not None else lambda new, _: new
        slope = choose(method.reused(step.slopes[-1]), c.slope) if solver.estimates else ()
        t, slot = (None, place[-1]) if solver.lands else (control.t, None)
        seen = Seen(window, c.s, step.slopes, accept, t, slot, node_of(control), step.state)
        watched = zip(self.watches, c.observed, strict=True)
        observed = tuple(w.step(march, problem, m, seen) for w, m in watched)
        for w, m in zip(self.watches, observed, strict=True):
            if w.ends:
                control = solver.halted(control, m.over)
        return Carry(choose(step.state, c.s), slope, control, observed)

    def until_due(self, running: Callable[[Any], Array], c: Carry) -> Carry:
        """Step while the control says that it is running, and serve observers that wait where they are due, then the control."""
        march, problem, waiting, marked = self.march, self.problem, self.waiting, self.march.solver.marked
        solver, step = march.solver, partial(self.attempt, None)
        at_once = not waiting and marked and march.rows.size is not None  # nearly always some row is where something happens
        if at_once:
            step = lambda c: solver.serve(march, problem, self.attempt(None, c))

        def serve(c: Carry) -> Carry:
            due = {i: self.watches[i].due(march, problem, c.observed[i], c) for i in waiting}

            def stop(c: Carry) -> Array:
                ended = ~running(c.control)
                ended = ended | jnp.any(c.control.waits) if marked and not at_once else ended
                return reduce(jnp.logical_or, (d(c.control) for d in due.values()), ended)

            c = march.runner.until(stop, step, c)
            c = c._replace(control=solver.narrowest(march, problem, c.control))
            observed = list(c.observed)
            for i in waiting:
                now = due[i](c.control) & running(c.control)
                observed[i] = self.watches[i].serve(march, problem, observed[i], now, c)
            c = c._replace(observed=tuple(observed))
            return c if at_once else solver.serve(march, problem, c)

        return march.runner.until(lambda c: ~running(c.control), serve, c)


@dataclass(frozen=True, eq=False)
class March:
    """The march of a plan for one trajectory, or for the rows of a batch on some platform."""

    plan: Plan
    rows: Rows
    mapped: Any
    platform: str | None
    F: Callable  # the vector field of all rows, (t, y, params), traced once however many stages ask for it
    kept: Callable | None = None  # what observers keep, of all rows
    jump: Callable | None = None  # the state after jump k, of all rows: (t, y, params, k)
    jac: Callable | None = None  # the Jacobian that was given, of all rows
    functions: tuple = ()  # what observers look by, of all rows
    resets: tuple = ()  # what resets the state at events, of all rows
    alone: Any = None  # the vector field of one trajectory
    keeps_resets: bool = False  # whether states that are reset are kept, for a way back that cannot take the step again
    tells_stiff: bool = True  # whether a solve that ran out of steps is looked at for stiffness
    few: int = 0  # the loop ends where no more rows than this want another step

    @classmethod
    def of(cls, plan: Plan, batch: Batch | None, platform: str | None) -> March:
        """For a batch whose operands are (moving, still)."""
        rows = Rows.of(batch, plan.layout.size)
        mapped = problem_of(*batch.mapped) if batch else None
        return cls(plan, rows, mapped, platform, *_lifted(plan, rows, mapped), alone=plan.closed.field)

    @property
    def solver(self) -> Solver:
        return self.plan.solver

    @property
    def method(self) -> Method:
        return self.plan.solver.method

    @property
    def runner(self) -> Runner:
        return self.solver.runner

    def window(self, problem: Problem, t: Array, h: Array, i: Any) -> Window:
        """The step of width h from t, the i-th of all."""
        params = at_nodes(problem.params, i, self.plan.degree) if i is not None else problem.params
        flags = self.mapped and self.mapped.params
        still = self.solver.standing(self, problem, i, h)
        same = {"kept": self.kept, "long": self.long, "alone": self.alone, "mapped": flags, "jac": self.jac}
        return Window(self.F, self.rows, t, h, params, still=still, **same)

    def save_times(self, problem: Problem) -> Array:
        """The save times, which come first among the given ones."""
        n = self.plan.saves
        return problem.ts if problem.ts.shape[0] == n else problem.ts[:n]

    def slope(self, problem: Problem) -> State:
        """The slope at the initial time."""
        params = at_fraction(at_nodes(problem.params, jnp.zeros((), jnp.int32), self.plan.degree), 0.0)
        return self.F(self.rows.spread(problem.ts[0]), problem.y0, params)

    def initial(self, problem: Problem) -> State:
        """The method's own state at the initial time; f is evaluated only if the method asks for the slope."""
        return self.method.start(problem.y0, lambda: self.slope(problem))

    # --- forwards

    def march(self, problem: Problem, watches: Sequence[Watch]) -> tuple[Carry, Any, State | None]:
        """The last carry of the loop, what was saved between intervals, and the slope at the start."""
        slope, told = self.solver.started(self, problem) if self.solver.estimates else (None, problem)
        s = self.initial(problem) if slope is None else self.method.start(problem.y0, lambda: slope)
        control = self.solver.init(self, told, s, slope)
        c = Carry(s, self.method.reused(slope) if slope is not None else (), control, ())
        c = c._replace(observed=tuple(w.init(self, problem, c) for w in watches))
        loop = Loop(self, problem, tuple(watches))
        if not self._in_turns(watches):
            return *self.solver.drive(self, problem, loop, c), slope
        c, _ = self.solver.drive(replace(self, few=(self.rows.size or 0) // FEW_LEFT), problem, loop, c)
        return self._finish_in_groups(problem, watches, c), None, slope

    def _in_turns(self, watches: Sequence[Watch]) -> bool:
        """Whether rows that finish late go on in groups: where steps are found and not recorded."""
        apart = all(w.by_row for w in watches)
        return not self.solver.lands and apart and grouped(self.platform, self.rows.size, self.rows.axis == -1)

    def _finish_in_groups(self, problem: Problem, watches: Sequence[Watch], c: Carry) -> Carry:
        leaves, treedef = jax.tree.flatten(problem)
        flags = jax.tree.leaves(self.mapped)
        rows, loops = Rows(GROUP, -1), c.control.loops
        names = "F", "kept", "jump", "jac", "functions", "resets"
        group = replace(self, rows=rows, **dict(zip(names, _lifted(self.plan, rows, self.mapped), strict=True)))

        def with_loops(
            march: March, problem: Problem, c: Carry, loops: Any
        ) -> Carry:  # rows that still run have made as many attempts
            return c._replace(control=self.solver.continued(march, problem, c.control, loops))

        def run(some: Carry, given: list) -> Carry:
            mapped = iter(given)
            part = jax.tree.unflatten(treedef, [next(mapped) if m else x for x, m in zip(leaves, flags, strict=True)])
            loop = Loop(group, part, tuple(watches))
            c, _ = self.solver.drive(group, part, loop, with_loops(group, part, some, loops))
            return with_loops(group, part, c, None)

        left = self.solver.unfinished(c.control)
        given = [x for x, m in zip(leaves, flags, strict=True) if m]
        return with_loops(self, problem, in_groups(run, left, with_loops(self, problem, c, None), given), loops)

    def saved_as(self, s: State) -> tuple[State, Array]:
        """The state saved, NaN in rows that are not finite (and stay so: every step adds to the state), and which rows are."""
        y = self.method.read(s)
        good = self.rows.finite(y)
        return tuple(nan_unless(good, x) for x in y), good

    def run(self, problem: Problem) -> Outcome:
        return self.outcome(problem, *self.march(problem, self.watches))

    def record(self, problem: Problem, record: Record | None, resets: bool = False) -> tuple[Outcome, Kept]:
        """The outcome, and what the record kept; with `resets` also the states that were reset."""
        watches = self.watches if record is None else (*self.watches, record)
        keeping = replace(self, keeps_resets=resets and self.solver.marked)
        c, saved, slope = keeping.march(problem, watches)
        outcome = replace(self, tells_stiff=False).outcome(problem, c, saved, slope)
        kept = Recorded((), (), (), ()) if record is None else c.observed[-1]
        grid = Grid((), (), (), (), (), ())
        if not self.solver.lands:
            arrived = self.solver.arrived(self.save_times(problem), c.control)
            start = self.rows.spread(problem.ts[0])
            nodes = (kept.nodes, jnp.zeros_like(node_of(c.control))) if self.solver.marked else ()
            grid = Grid(kept.slots, kept.times, start, c.control.accepted, arrived, c.control.loops, nodes)
        states = kept.states or stack_zeros(0, c.s)
        before = self.solver.reset_states(c.control) if keeping.keeps_resets else ()
        return outcome, Kept(grid, c.s, states, kept.chapters or stack_zeros(0, chapter_start(c)), (), before)

    @property
    def saves(self) -> tuple[Interpolated, ...]:
        """The observer of save times, where steps do not end at them."""
        return () if self.solver.lands or self.plan.saves == 2 else (Interpolated(),)

    @property
    def watches(self) -> tuple[Watch, ...]:
        return (*self.saves, *self.plan.watches)

    @property
    def needs_slopes(self) -> bool:
        """Whether an observer needs the slopes of each step."""
        return any(w.slopes for w in self.watches)

    @property
    def resetting(self) -> tuple[Watch, ...]:
        """The observers at which rows are reset."""
        return tuple(w for w in self.plan.watches if w.resets)

    def happens(self, watch: Watch, node: Array) -> Array:
        """Whether rows at a node are reset by this observer."""
        return resets.happens(node, self.resetting.index(watch), len(self.resetting))

    def reset_found(self, problem: Problem, node: Array, t: Array, s: State) -> State:
        """The method's state after what happens at t, where an event that resets was found, from that before it."""
        return resets.reset_at(self, problem, node, t, s)

    def seen_by(self, watch: Watch) -> Callable:
        """What an observer looks by."""
        return self.functions[self.plan.watches.index(watch)]

    def end(self, problem: Problem, observed: tuple) -> Any:
        """The time at which an observer ended each row, a column, NaN where none did; None if there is none that may."""
        if not self.may_end:
            return None
        sign, tables = direction(self.save_times(problem)), zip(self.plan.watches, observed, strict=True)
        return sign * reduce(jnp.fmin, [sign * _or_nan(self.rows.number(x[0][w.ends - 1])) for w, x in tables if w.ends])

    @property
    def may_end(self) -> bool:
        """Whether an observer may end a row."""
        return any(w.ends for w in self.plan.watches)

    def _ended(self, problem: Problem, outcome: Outcome) -> Outcome:
        """The outcome of rows that failed between save times or that an observer ended: they know nothing of what is later."""
        rows = self.rows
        if self.solver.lands and self.plan.watches:  # of a row that failed nothing is known after the last state saved
            known = jnp.where(outcome.status != int(Status.success), outcome.reached, jnp.nan)
            seen = zip(self.plan.watches, outcome.observed, strict=True)
            outcome = outcome._replace(observed=tuple(w.ended(self, problem, x, rows.spread(known)) for w, x in seen))
        end = self.end(problem, outcome.observed)
        if end is None:
            return outcome
        ts = self.save_times(problem)
        sign, over = direction(ts), ~jnp.isnan(end)
        last = end + sign * rounding(self.method, ts)  # times that are the event's to rounding are before it
        good = jax.vmap(lambda t, good: good & ~(sign * (t - last) > 0))(ts, outcome.good)
        observed = tuple(w.ended(self, problem, x, last) for w, x in zip(self.plan.watches, outcome.observed, strict=True))
        saved = jnp.max(jax.vmap(lambda t: jnp.where(sign * (t - last) > 0, sign * ts[0], sign * t))(ts), axis=0)
        return outcome._replace(
            ys=tuple(nan_unless(rows.over_time(good), x) for x in outcome.ys),
            observed=observed,
            good=good,
            status=jnp.where(over, int(Status.event), outcome.status).astype(jnp.int32),
            reached=jnp.where(over, sign * jnp.maximum(sign * end, saved), outcome.reached),
        )

    def _unpadded(self, problem: Problem, outcome: Outcome) -> Outcome:
        """The outcome without states at save times that only pad those of a row: nothing is known there, and nothing failed."""
        if "asked" not in problem.numbers:
            return outcome
        asked = jax.vmap(self.rows.spread)(problem.numbers["asked"])
        ys = tuple(nan_unless(self.rows.over_time(asked), x) for x in outcome.ys)
        return outcome._replace(ys=ys, good=outcome.good & asked)

    def _whole(self, watch: Any, tables: State, status: Array) -> State:
        """The tables of an observer, NaN in rows that failed if its entry is of the whole solve."""
        if not watch.whole:
            return tables
        lost = self.rows.over_time(((status != int(Status.success)) & (status != int(Status.capacity)))[None])
        return tuple(jnp.where(lost, jnp.nan, x).astype(x.dtype) for x in tables)

    def outcome(self, problem: Problem, c: Carry, saved: Any, slope: State | None) -> Outcome:
        solver, method, rows = self.solver, self.method, self.rows
        dense = jnp.zeros((), jnp.int32)
        if solver.lands:
            good = rows.finite(problem.y0)
            first = tuple(nan_unless(good, x) for x in problem.y0), good
            ys, good = jax.tree.map(lambda x, z: jnp.concatenate([x[None], z]), first, saved)
        else:
            arrived = solver.arrived(self.save_times(problem), c.control)
            end = tuple(nan_unless(arrived, x) for x in method.read(c.s))
            middle = tuple(jnp.zeros((0, *x.shape), x.dtype) for x in end)
            if self.saves:
                middle, dense = self.saves[0].read(c.observed[0]), c.observed[0].dense
            ys = tuple(jnp.concatenate([x[None], v, z[None]]) for x, v, z in zip(problem.y0, middle, end, strict=True))
            assert slope is not None
            ys = moving_at_start(self.plan.saves - 1 - solver.marked, ys, self.save_times(problem), slope)
            every = jnp.ones((self.plan.saves, *rows.spread(jnp.zeros(())).shape), bool)
            good = every & jax.vmap(rows.finite)(ys) if ys else every
        status, reached, tried, accepted = solver.report(self, problem, c, good, slope)
        nfe = tried * (method.trials if solver.estimates else method.evaluations) + method.extra * dense
        if self.needs_slopes and not solver.estimates:
            nfe = nfe + tried * (method.trials - method.evaluations)
        if any(w.refines for w in self.plan.watches):
            nfe = nfe + accepted * method.extra
        nfe = nfe + (solver.nfe_start if solver.estimates else method.starts)
        nfe = nfe + solver.resets(self, problem, c.control) if solver.marked else nfe
        backward = accepted * self.pullback_nfe
        kept = c.observed[len(self.saves) :]
        watched = list(zip(self.plan.watches, kept, strict=False))
        for w, m in watched:
            full = (status == int(Status.success)) & w.overflowed(m)
            status = jnp.where(full, int(Status.capacity), status).astype(jnp.int32)
        observed = tuple(self._whole(w, w.read(m), status) for w, m in watched)
        jacobians = tried * method.jacobians if method.jacobians else jnp.zeros((), jnp.int32)
        stats = Stats(nfe, tried, accepted, tried - accepted, backward, jacobians)
        return self._unpadded(problem, self._ended(problem, Outcome(ys, observed, good, stats, status, reached)))

    # --- a slot of the grid again, and back

    def slots(self, problem: Problem, grid: Grid) -> Any:
        """How many slots the grid has."""
        return self.solver.slots(self, problem) if self.solver.lands else grid.slots

    def _window(self, problem: Problem, grid: Grid, i: Array) -> Window:
        (p, q), span = self.solver.ends(self, problem, grid, i)
        t, h = span(take(problem.ts, p), take(problem.ts, q))
        return self.solver.limited(self, problem, grid, i, self.window(problem, t, h, i if self.solver.lands else None))

    def still(self, window: Window, s: State, moved: State) -> State:
        """The state moved, or as it is in rows that stand still in this slot."""
        return moved if window.still is None else where(window.still, s, moved)

    def advance(self, problem: Problem, grid: Grid, i: Array, s: State) -> State:
        """The state after step i from the state s before it."""
        window = self._window(problem, grid, i)
        s = self.still(window, s, self.method.step(window, s).state)
        if not self.solver.marked:
            return s
        node = self.solver.node(self, problem, grid, i)
        s = self.reset(problem, node, s)
        return self.reset_found(problem, node, window.t + window.h, s) if self.resetting else s

    def reset(self, problem: Problem, j: Array, s: State) -> State:
        """The method's state after what happens at ts[j], from that before it; j is a column, -1 where nothing does.

        After a jump, and where f jumps, a method that carries more than y starts anew.
        """
        if self.jump is None and self.method.parts == 1:
            return s
        t = self.rows.spread(self.rows.pick(problem.ts, jnp.maximum(j, 0)))
        return self.reset_by(problem, self.mark(problem, j), t, s)

    def mark(self, problem: Problem, j: Array) -> Array:
        """What happens at ts[j], a column; nothing where j is -1. Marks are those of the last of ts."""
        at = self._among_marks(problem, j)
        return jnp.where(at >= 0, self.rows.pick(problem.numbers["marks"], jnp.maximum(at, 0)), -1)

    def interrupted(self, problem: Problem, j: Any) -> Any:
        """Whether something happens at ts[j], or at an equal time after it: f jumps, or the state."""
        return (self.mark(problem, j) != -1) | (j <= -2) if self.solver.marked else False

    def _among_marks(self, problem: Problem, j: Array) -> Array:
        """The place among the marks of ts[j]."""
        return j - (0 if self.solver.lands else problem.ts.shape[0] - problem.numbers["marks"].shape[0])

    def reset_by(self, problem: Problem, mark: Array, t: Array, s: State) -> State:
        """The method's state after what the mark says happens at t."""
        method, params, y = self.method, problem.params, self.method.read(s)
        if self.jump is not None:
            y = where(mark > 0, self.jump(t, y, params, jnp.maximum(mark - 1, 0)), y)
        return where(mark >= 0, method.start(y, lambda: self.F(self.after(problem, t), y, params)), s)

    def after(self, problem: Problem, t: Array) -> Array:
        """The time that the first stage after what happens at t sees."""
        return just_after(t, direction(self.save_times(problem)))

    def invert(self, problem: Problem, kept: Kept, i: Array, s1: State, ys: State) -> State:
        """The state before step i from the state s1 after it; where steps end at save times what was saved there, ys, is exact."""
        grid = kept.grid
        if kept.resets:
            at = self._among_marks(problem, self.solver.node(self, problem, grid, i))
            s1 = where(at >= 0, tuple(self.rows.pick_state(x, jnp.maximum(at, 0)) for x in kept.resets), s1)
        elif self.solver.lands and self.method.parts == 1:
            bound = self.solver.bound(self, problem)
            saved = take(ys, (i + 1) // bound)
            known = (i + 1) % bound == 0
            if self.may_end:  # rows that ended went on, but nothing was saved
                known = known & self.rows.finite(saved)
            s1 = where(known, saved, s1)
        window = self._window(problem, grid, i)
        return self.still(window, s1, self.method.inverse(window, s1))

    @property
    def long(self) -> bool:
        """Whether the field's program is long; one with effects has them once a stage, wherever it stands."""
        return not self.plan.closed.effects and long(self.plan.closed.equations, self.plan.layout.size)

    @property
    def rolled(self) -> bool:
        return rolled(self.platform, self.plan.layout.size, self.plan.weights, self.rows.size is not None)

    @property
    def pullback_nfe(self) -> int:
        """Evaluations that pulling back through one step takes."""
        return self.method.pullback_nfe(self.needs_slopes)


def _or_nan(t: Array) -> Array:
    """A time of a table, NaN where there is none."""
    return jnp.where(jnp.isfinite(t), t, jnp.nan)


def _lifted(plan: Plan, rows: Rows, mapped: Any) -> tuple:
    """The vector field, what observers keep, the jumps, the Jacobian, what observers look by, and the resets, for all rows."""
    axes, closed = mapped.params if mapped else None, plan.closed
    lift = lambda f: f and jax.jit(rows.lift(f, axes))
    one = map(lift, (closed.field, closed.kept, closed.jump, closed.jac))
    return *one, tuple(map(lift, closed.looks)), tuple(map(lift, closed.resets))
