"""The one loop over windows, and its transpose.

A march knows how to `run` (values only), how to `record` (values, and what the way back needs), how to take slot i of the grid it
found again (`advance`) or back (`invert`), and how to pull cotangents back through slot i given the state it starts from (`pull`).
How that state is recovered is the adjoint's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jode.control import Grid, Solver, Stats, Status
from jode.method import Method
from jode.native import Batch, Promise
from jode.observe import Interpolated, Record, Recorded, Seen, Watch
from jode.observe.record import chapter_start
from jode.observe.saves import Bars, at_start
from jode.rows import Rows
from jode.runner import Runner
from jode.tree import Layout, State, add, entry, nan_unless, stack_zeros, take, where, zeros_like
from jode.turns import in_groups
from jode.tuning import FEW_LEFT, GROUP, grouped, rolled, stops_at_saves
from jode.window import Params, Window, at_fraction, at_nodes


class Problem(NamedTuple):
    """Everything a march depends on that is data. `numbers` are the solver's: a step count, or tolerances."""

    ts: Array
    y0: State
    params: Params
    numbers: dict


class Outcome(NamedTuple):
    """States at the save times (save time first), which of them are finite, the counts, the status, and the time reached."""

    ys: State
    good: Array
    stats: Stats
    status: Array
    reached: Array


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a march depends on that is not data."""

    field: Callable
    solver: Solver
    layout: Layout
    saves: int
    time: Any  # dtype
    steps: int | None  # steps between save times; None where that number is data
    weights: int  # how many numbers the parameters with gradients are
    effects: Any  # of evaluating the field
    kept: Callable | None = None  # what observers keep, of (t, y, params)

    @property
    def promise(self) -> Promise:
        """What a march of one trajectory returns: the states, and the rest of an `Outcome`."""
        shape: Any = jax.ShapeDtypeStruct
        ys = tuple(shape((self.saves, *x.shape), x.dtype) for x in self.layout.packed)
        one = shape((), jnp.int32)
        stats = Stats(*[one] * len(Stats._fields))
        return Promise(ys, (shape((self.saves,), bool), stats, one, shape((), self.time)), self.effects)

    @property
    def degree(self) -> int:
        """Of the layers' weights, a piecewise polynomial of depth."""
        return getattr(self.solver, "degree", 0)

    @property
    def most(self) -> int:
        return self.solver.most_steps(self.saves - 1, self.steps)


class Carry(NamedTuple):
    """What the loop carries: the method's state, the slope its next step uses again, the control's carry, and the observers'.
    last: the step taken last, where observers wait until they are due."""

    s: State
    slope: Any
    control: Any
    observed: tuple
    last: Any


class Kept(NamedTuple):
    """What the way back needs: the grid, and the states kept, of the last chapter; the last state, and where the chapters start.
    first: of a chapter, its first state. What is not kept is a table without entries, so that every batch keeps the same arrays."""

    grid: Grid
    last: State
    states: State
    chapters: Any
    first: State = ()


class Cotangents(NamedTuple):
    """What the way back carries: cotangents of the method's state, the save times and the parameters; how many of its steps each row
    has not gone back, and which save time it goes back to next."""

    s: State
    ts: Array
    shared: list
    layers: list
    left: Any
    next: Any


@dataclass(frozen=True, eq=False)
class Loop:
    """Steps of a march, and its observers: those served at every step, and those that wait until they are due."""

    march: March
    problem: Problem
    watches: tuple[Watch, ...]

    @property
    def waiting(self) -> tuple[int, ...]:
        """Which observers the loop stops for."""
        return tuple(i for i, w in enumerate(self.watches) if w.waits)

    @property
    def looks_back(self) -> bool:
        """Whether one of them looks at the step taken last."""
        return any(w.waits and not w.steps for w in self.watches)

    def attempt(self, place: Any, c: Carry) -> Carry:
        """Try one step."""
        march, problem, solver, method = self.march, self.problem, self.march.solver, self.march.method
        window = solver.window(march, problem, place, c.control)
        step = method.step(window, c.s, c.slope)
        if solver.estimates:
            step = method.estimated(window, c.s, step)
        accept, control = solver.judge(march, problem, c.control, window, c.s, step)
        choose = partial(where, accept) if accept is not None else lambda new, _: new
        slope = choose(method.reused(step.slopes[-1]), c.slope) if solver.estimates else ()
        t, slot = (None, place[-1]) if solver.lands else (control.t, None)
        seen = Seen(window, c.s, step.slopes, accept, t, slot)
        watched = zip(self.watches, c.observed, strict=True)
        observed = tuple(w.step(march, problem, m, seen) if w.steps else m for w, m in watched)
        last = (window.t, window.h, c.s, step.slopes, t) if self.looks_back else ()
        return Carry(choose(step.state, c.s), slope, control, observed, last)

    def until_due(self, running: Callable[[Any], Array], c: Carry) -> Carry:
        """Step while the control says that it is running, and serve observers that wait where they are due."""
        march, problem, waiting = self.march, self.problem, self.waiting
        step = partial(self.attempt, None)
        if not waiting:
            return march.runner.until(lambda c: ~running(c.control), step, c)

        def serve(c: Carry) -> Carry:
            # The loop inside carries nothing of those that only wait: XLA on a CPU compiles one over less than a kilobyte as one function.
            held = {i: c.observed[i] for i in waiting if not self.watches[i].steps}
            due = {i: self.watches[i].due(march, problem, c.observed[i], c) for i in waiting}

            def stop(c: Carry) -> Array:
                return reduce(jnp.logical_or, (d(c.control) for d in due.values()), ~running(c.control))

            c = c._replace(observed=tuple(() if i in held else m for i, m in enumerate(c.observed)))
            c = march.runner.until(stop, step, c)
            observed = [held.get(i, m) for i, m in enumerate(c.observed)]
            for i in waiting:
                now = due[i](c.control) & running(c.control)
                observed[i] = self.watches[i].serve(march, problem, observed[i], now, c)
            return c._replace(observed=tuple(observed))

        return march.runner.until(lambda c: ~running(c.control), serve, c)

    def saved(self, c: Carry) -> tuple[State, Array]:
        return self.march.saved_as(c.s)


@dataclass(frozen=True, eq=False)
class March:
    """The march of a plan for one trajectory, or for the rows of a batch on some platform."""

    plan: Plan
    rows: Rows
    mapped: Any
    platform: str | None
    F: Callable  # the vector field of all rows, (t, y, params), traced once however many stages ask for it
    kept: Callable | None = None  # what observers keep, of all rows
    few: int = 0  # the loop ends where no more rows than this want another step

    @classmethod
    def of(cls, plan: Plan, batch: Batch | None, platform: str | None) -> March:
        """For a batch whose operands are (moving, still)."""
        rows = Rows.of(batch, plan.layout.size)
        mapped = problem_of(*batch.mapped) if batch else None
        F, kept = (f and jax.jit(rows.lift(f, mapped.params if mapped else None)) for f in (plan.field, plan.kept))
        return cls(plan, rows, mapped, platform, F, kept)

    @property
    def solver(self) -> Any:
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
        return Window(self.F, self.rows, t, h, params, kept=self.kept)

    def initial(self, problem: Problem) -> tuple[State, State | None]:
        """The method's own state at the initial time, and the slope there where the control asks for it."""
        t0 = self.rows.spread(problem.ts[0])
        params = at_fraction(at_nodes(problem.params, jnp.zeros((), jnp.int32), self.plan.degree), 0.0)
        if not self.solver.estimates:
            return self.method.start(problem.y0, lambda: self.F(t0, problem.y0, params)), None
        slope = self.F(t0, problem.y0, params)
        return self.method.start(problem.y0, lambda: slope), slope

    # --- forwards

    def march(self, problem: Problem, watches: Sequence[Watch]) -> tuple[Carry, Any, State | None]:
        """The last carry of the loop, what was saved between intervals, and the slope at the start."""
        s, slope = self.initial(problem)
        control = self.solver.init(self, problem, s, slope)
        c = Carry(s, self.method.reused(slope) if slope is not None else (), control, (), ())
        c = c._replace(observed=tuple(w.init(self, problem, c) for w in watches))
        loop = Loop(self, problem, tuple(watches))
        if loop.looks_back:  # before the first step nothing is due
            c = c._replace(last=jax.tree.map(jnp.zeros_like, jax.eval_shape(partial(loop.attempt, None), c).last))
        if not self._in_turns(watches):
            return *self.solver.drive(self, problem, loop, c), slope
        c, _ = self.solver.drive(replace(self, few=self.rows.size // FEW_LEFT), problem, loop, c)
        return self._finish_in_groups(problem, watches, c), None, slope

    def _in_turns(self, watches: Sequence[Watch]) -> bool:
        """Whether rows that finish late go on in groups: where steps are found and not recorded."""
        rows_last = all(isinstance(w, Interpolated) for w in watches)
        return not self.solver.lands and rows_last and grouped(self.platform, self.rows.size, self.rows.axis == -1)

    def _finish_in_groups(self, problem: Problem, watches: Sequence[Watch], c: Carry) -> Carry:
        leaves, treedef = jax.tree.flatten(problem)
        flags = jax.tree.leaves(self.mapped)
        rows, loops = Rows(GROUP, -1), c.control.loops
        F, kept = (f and jax.jit(rows.lift(f, self.mapped.params)) for f in (self.plan.field, self.plan.kept))
        group = replace(self, rows=rows, F=F, kept=kept)

        def with_loops(c: Carry, loops: Any) -> Carry:  # rows that still run have made as many attempts
            return c._replace(control=c.control._replace(loops=loops))

        def run(some: Carry, given: list) -> Carry:
            mapped = iter(given)
            part = jax.tree.unflatten(treedef, [next(mapped) if m else x for x, m in zip(leaves, flags, strict=True)])
            loop = Loop(group, part, tuple(watches))
            return with_loops(self.solver.drive(group, part, loop, with_loops(some, loops))[0], None)

        left = self.solver.unfinished(c.control)
        given = [x for x, m in zip(leaves, flags, strict=True) if m]
        return with_loops(in_groups(run, left, with_loops(c, None), given), loops)

    def saved_as(self, s: State) -> tuple[State, Array]:
        """The state saved, NaN in rows that are not finite (and stay so: every step adds to the state), and which rows are."""
        y = self.method.read(s)
        good = self.rows.finite(y)
        return tuple(nan_unless(good, x) for x in y), good

    def run(self, problem: Problem) -> Outcome:
        return self.outcome(problem, *self.march(problem, self.saves))

    def record(self, problem: Problem, record: Record | None) -> tuple[Outcome, Kept]:
        """The outcome, and what the record kept."""
        watches = self.saves if record is None else (*self.saves, record)
        c, saved, slope = self.march(problem, watches)
        outcome = self.outcome(problem, c, saved, slope)
        kept = Recorded((), (), (), ()) if record is None else c.observed[-1]
        grid = Grid((), (), (), (), (), ())
        if not self.solver.lands:
            arrived, start = self.solver.arrived(problem.ts, c.control), self.rows.spread(problem.ts[0])
            grid = Grid(kept.slots, kept.times, start, c.control.accepted, arrived, c.control.loops)
        states = kept.states or stack_zeros(0, c.s)
        return outcome, Kept(grid, c.s, states, kept.chapters or stack_zeros(0, chapter_start(c)))

    def chapter(self, problem: Problem, kept: Kept, record: Record, k: Array) -> tuple[Kept, Array]:
        """What was kept of chapter k, and how many steps its rows had accepted at its end.

        That of the last chapter is there; another is found again from where it starts.
        """
        loops, (s, slope, control), (_, _, next_) = kept.grid.loops, take(kept.chapters, k), take(kept.chapters, k + 1)
        again = replace(record, chapters=0)

        def there() -> tuple[Kept, Array]:
            return kept._replace(grid=kept.grid._replace(start=control.t), first=s), kept.grid.accepted

        def found() -> tuple[Kept, Array]:
            c = Carry(s, slope, control._replace(loops=k * record.slots), (), ())
            c = c._replace(observed=(again.init(self, problem, c),))
            step = partial(Loop(self, problem, (again,)).attempt, None)
            c = self.runner.until(lambda c: c.control.loops >= (k + 1) * record.slots, step, c)
            recorded, end = c.observed[0], c.control
            times = jnp.where(
                recorded.times == end.t[None], next_.t[None], recorded.times
            )  # rounded otherwise, steps land where the next ones start
            accepted = jnp.where(next_.h == 0, end.accepted, kept.grid.accepted)
            grid = Grid(recorded.slots, times, control.t, accepted, kept.grid.arrived, loops)
            return Kept(grid, c.s, recorded.states or kept.states, kept.chapters, s), end.accepted

        return jax.lax.cond(k == (loops - 1) // record.slots, there, found)

    @property
    def saves(self) -> tuple[Watch, ...]:
        """The observer of save times, where steps do not end at them."""
        if self.solver.lands or self.plan.saves == 2:
            return ()
        return (Interpolated(stops_at_saves(self.platform, self.plan.layout.size, self.rows.size)),)

    def outcome(self, problem: Problem, c: Carry, saved: Any, slope: State | None) -> Outcome:
        solver, method, rows = self.solver, self.method, self.rows
        dense = jnp.zeros((), jnp.int32)
        if solver.lands:
            good = rows.finite(problem.y0)
            first = tuple(nan_unless(good, x) for x in problem.y0), good
            ys, good = jax.tree.map(lambda x, z: jnp.concatenate([x[None], z]), first, saved)
        else:
            arrived = solver.arrived(problem.ts, c.control)
            end = tuple(nan_unless(arrived, x) for x in method.read(c.s))
            middle = tuple(jnp.zeros((0, *x.shape), x.dtype) for x in end)
            if self.saves:
                middle, dense = self.saves[0].read(c.observed[0]), c.observed[0].dense
            ys = tuple(jnp.concatenate([x[None], v, z[None]]) for x, v, z in zip(problem.y0, middle, end, strict=True))
            every = jnp.ones((self.plan.saves, *rows.spread(jnp.zeros(())).shape), bool)
            good = every & jax.vmap(rows.finite)(ys) if ys else every
        status, reached, tried, accepted = solver.report(self, problem, c, good, slope)
        nfe = tried * (method.trials if solver.estimates else method.evaluations) + method.extra * dense
        nfe = nfe + (solver.nfe_start if solver.estimates else method.starts)
        backward = accepted * self.pullback_nfe
        return Outcome(ys, good, Stats(nfe, tried, accepted, tried - accepted, backward), status, reached)

    # --- a slot of the grid again, and back

    def slots(self, problem: Problem, grid: Grid) -> Any:
        """How many slots the grid has."""
        return self.solver.slots(self, problem) if self.solver.lands else grid.slots

    def _window(self, problem: Problem, grid: Grid, i: Array) -> Window:
        (p, q), span = self.solver.ends(self, problem, grid, i)
        return self.window(problem, *span(entry(problem.ts, p), entry(problem.ts, q)), i if self.solver.lands else None)

    def _still(self, problem: Problem, window: Window, s: State, moved: State) -> State:
        """The state moved, or as it is in rows that stand still in this slot."""
        return where(window.h == 0, s, moved) if self.solver.may_stand(self, problem) else moved

    def advance(self, problem: Problem, grid: Grid, i: Array, s: State) -> State:
        """The state after step i from the state s before it."""
        window = self._window(problem, grid, i)
        return self._still(problem, window, s, self.method.step(window, s).state)

    def invert(self, problem: Problem, grid: Grid, i: Array, s1: State, ys: State) -> State:
        """The state before step i from the state s1 after it; where steps end at save times what was saved there, ys, is exact."""
        if self.solver.lands and self.method.parts == 1:
            bound = self.solver.bound(self, problem)
            s1 = where((i + 1) % bound == 0, take(ys, (i + 1) // bound), s1)
        window = self._window(problem, grid, i)
        return self._still(problem, window, s1, self.method.inverse(window, s1))

    # --- backwards

    @property
    def rolled(self) -> bool:
        return rolled(self.platform, self.plan.layout.size, self.plan.weights, self.rows.size is not None)

    @property
    def pullback_nfe(self) -> int:
        """Evaluations that pulling back through one step takes."""
        return self.method.pullback_nfe(bool(self.saves))

    def failed_at_start(self, grid: Grid, good: Array, failed: Array) -> Array:
        """Rows whose later states are never looked at: they failed before their first step, or before their first save time."""
        return ~good[1] if self.solver.lands else failed & (grid.accepted == 0)

    def pull(
        self, problem: Problem, good: Array, grid: Grid, g: State, i: Array, s: State, c: Cotangents, start: State
    ) -> Cotangents:
        """Cotangents before step i from those after it, s being the state at its start; rows that failed take that of the march."""
        solver, ts = self.solver, problem.ts
        (p, q), span = solver.ends(self, problem, grid, i, c.left)
        (t, h), span_back = jax.vjp(span, entry(ts, p), entry(ts, q))
        window = self.window(problem, t, h, i if solver.lands else None)
        sbar, left, next_, slopes_bar = c.s, c.left, c.next, None
        if solver.lands:
            if self.plan.saves > 2:
                bound = solver.bound(self, problem)
                landed = (i % bound == bound - 1) & (q < self.plan.saves - 1)
                sbar = where(landed, self._saved(sbar, take(g, q)), sbar)
            s = where(good[q], s, start)
        elif self.rows.size is not None:
            s = where(grid.accepted > 0, s, start)
        K, pull = self.method.pullback(window, s, bool(self.saves), self.rolled)
        bars = Bars(jnp.zeros_like(t), jnp.zeros_like(h), zeros_like(s), None, c.ts)
        if self.saves:
            assert K is not None
            seen = Seen(window, s, [], None, None, None)
            next_, bars = self.saves[0].pull(self, problem, c.next, seen, K, g, bars._replace(slopes=zeros_like(K)))
            slopes_bar = bars.slopes
        size = self.plan.degree + 1
        before = [jax.lax.dynamic_slice_in_dim(x, i, size, 0) for x in c.layers]
        sbar_step, (tbar, hbar, shared, after) = pull(sbar, slopes_bar, (jnp.zeros_like(t), jnp.zeros_like(h), c.shared, before))
        sbar = self._still(problem, window, sbar, sbar_step)
        if self.saves:
            sbar, tbar, hbar = add(bars.s, sbar), tbar + bars.t, hbar + bars.h
        if not solver.lands:
            left = left - (h != 0).astype(jnp.int32)
        abar, bbar = span_back((tbar, hbar))
        layers = [jax.lax.dynamic_update_slice_in_dim(x, u, i, 0) for x, u in zip(c.layers, after, strict=True)]
        return Cotangents(sbar, bars.ts.at[p].add(abar).at[q].add(bbar), shared, layers, left, next_)

    def _saved(self, sbar: State, g: State) -> State:
        """The cotangent of the method's state with that of a saved state added."""
        return (*add(self.method.read(sbar), g), *sbar[len(g) :])

    def terminal(self, problem: Problem, good: Array, grid: Grid, g: State) -> Cotangents:
        """The terminal cotangents: those after the last step, before any is pulled back."""
        nothing = zeros_like(tuple(x[0] for x in g)) * (self.method.parts - 1)
        next_ = jnp.sum(good[:-1], axis=0).astype(jnp.int32) - 1 if self.saves else None
        params = problem.params
        s = (*(x[-1] for x in g), *nothing)
        shared, layers = zeros_like(params.shared), zeros_like(params.layers)
        return Cotangents(s, jnp.zeros_like(problem.ts), shared, layers, grid.accepted, next_)

    def at_initial(self, problem: Problem, g: State, c: Cotangents) -> Cotangents:
        """Cotangents of the problem from those at the first step, and from states saved at the initial time itself, which are y0.

        If such a save time moved on, the state saved would move along the slope there.
        """
        ts, rows, params = problem.ts, self.rows, problem.params
        if self.solver.lands or not g:
            ybar = tuple(x[0] for x in g)
        else:
            same = at_start(ts)
            beside = (lambda x: same) if same.ndim > 1 else (lambda x: same.reshape(-1, *[1] * (x.ndim - 1)))
            there = tuple(jnp.where(beside(x), x, 0).astype(x.dtype) for x in g)
            slope = self.F(rows.spread(ts[0]), problem.y0, params)
            moved = jax.vmap(lambda x: rows.total(inner(rows, slope, x).astype(ts.dtype), ts[0]))(tuple(x[1:] for x in there))
            c = c._replace(ts=c.ts.at[1:].add(moved).at[0].add(-jnp.sum(moved, axis=0)))
            ybar = tuple(jnp.sum(x[:-1], axis=0) for x in there)

        def begin(t0: Array, y0: State, shared: list, layers: list) -> State:
            given = params._replace(shared=shared, layers=layers)
            F = lambda: self.F(rows.spread(t0), y0, at_fraction(at_nodes(given, jnp.zeros((), jnp.int32), self.plan.degree), 0.0))
            return self.method.start(y0, F)

        _, back = jax.vjp(begin, ts[0], problem.y0, params.shared, params.layers)
        tbar, sbar, shared, layers = back(c.s)
        c = c._replace(s=add(sbar, ybar), ts=c.ts.at[0].add(tbar), shared=add(c.shared, shared))
        return c._replace(layers=add(c.layers, layers)) if self.method.starts else c

    # --- to and from the layout of a batch

    def to_layout(self, problem: Problem) -> Problem:
        """The problem with rows where this march wants them; layers lead, whatever else does."""
        if self.rows.size is None:
            return problem
        rows, mapped = self.rows, self.mapped
        params = Params(
            *(
                [rows.to_layout(x, m, lead) for x, m in zip(leaves, flags, strict=True)]
                for leaves, flags, lead in zip(problem.params, mapped.params, (0, 1, 0, 1), strict=True)
            )
        )
        y0 = tuple(
            rows.to_layout(x if m else jnp.broadcast_to(x, (rows.size, *x.shape)), True)
            for x, m in zip(problem.y0, mapped.y0, strict=True)
        )
        numbers = {k: rows.column(x, mapped.numbers[k]) for k, x in problem.numbers.items()}
        return Problem(rows.column(problem.ts, mapped.ts), y0, params, numbers)

    def from_layout(self, outcome: Outcome) -> Outcome:
        rows = self.rows
        ys = tuple(rows.from_layout(x, 1) for x in outcome.ys)
        stats = Stats(*(rows.flat(rows.spread(jnp.asarray(x, jnp.int32))) for x in outcome.stats))
        return Outcome(ys, rows.flat(outcome.good), stats, rows.flat(outcome.status), rows.flat(rows.spread(outcome.reached)))

    def kept_from_layout(self, kept: Kept) -> Kept:
        """What was kept, each array led by the rows."""
        rows = self.rows
        if rows.size is None:
            return kept
        shared = lambda x: jnp.broadcast_to(x, (rows.size,))
        return self._kept(kept, shared, rows.flat, rows.from_layout)

    def kept_to_layout(self, kept: Kept) -> Kept:
        """The inverse of `kept_from_layout`."""
        rows = self.rows
        if rows.size is None:
            return kept
        shared = lambda x: jnp.max(x, initial=0)
        return self._kept(kept, shared, rows.column, lambda x, lead: rows.to_layout(x, True, lead))

    def _kept(self, kept: Kept, shared: Callable, columns: Callable, states: Callable) -> Kept:
        """The same functions of all that rows share, of their numbers and of their states."""
        grid, last, table, chapters, _ = kept
        if not self.solver.lands:
            grid = Grid(shared(grid.slots), *map(columns, grid[1:-1]), shared(grid.loops))
        s, slope, control = chapters
        chapters = (*jax.tree.map(lambda x: states(x, 1), (s, slope)), jax.tree.map(columns, control))
        return Kept(grid, jax.tree.map(lambda x: states(x, 0), last), jax.tree.map(lambda x: states(x, 1), table), chapters)

    def cotangents_from_layout(self, c: Cotangents) -> tuple:
        """Cotangents of (ts, y0, shared, layers), with a leading row axis for what differs by row."""
        rows, mapped = self.rows, self.mapped
        if rows.size is None:
            return c.ts, c.s, c.shared, c.layers
        y = tuple(rows.from_layout(x) if m else jnp.sum(x, rows.axis) for x, m in zip(c.s, mapped.y0, strict=True))
        shared = [rows.from_layout(x) if m else x for x, m in zip(c.shared, mapped.params.shared, strict=True)]
        layers = [rows.from_layout(x, 1) if m else x for x, m in zip(c.layers, mapped.params.layers, strict=True)]
        return rows.flat(c.ts) if mapped.ts else c.ts, y, shared, layers

    def replace_failed(self, problem: Problem, failed: Array) -> Problem:
        """Give rows that failed at their first step the data of a row that did not.

        Their cotangents are zero, but zero times the NaN of their own derivatives would reach parameters shared with
        other rows.
        """
        if not self.rows.size:
            return problem
        column, axis = self.rows.flat(failed), 0 if self.rows.axis == 0 else -1
        other = jnp.argmin(column)

        def replaced(x: Array, m: bool, lead: int = 0) -> Array:
            if not m:
                return x
            at = lead if axis == 0 else -1
            mask = column.reshape([-1 if i == at % x.ndim else 1 for i in range(x.ndim)])
            return jnp.where(mask, jnp.take(x, other[None], axis=at), x)

        params = [
            [replaced(x, m, lead) for x, m in zip(leaves, flags, strict=True)]
            for leaves, flags, lead in zip(problem.params, self.mapped.params, (0, 1, 0, 1), strict=True)
        ]
        return problem._replace(y0=tuple(replaced(x, True) for x in problem.y0), params=Params(*params))


def reverse(
    march: March, problem: Problem, good: Array, kept: Kept, g: State, record: Record | None, recovery: Callable
) -> tuple[Cotangents, State]:
    """Pull the cotangents g of the saved states back over the grid; recovery(kept) -> (store, recover), and recover(i, store) ->
    (the state that step i starts from, store), asked for the last step first.

    Returns the cotangents of the problem and the last state recovered, that at the start.
    """
    start = march.initial(problem)[0]

    def back(kept: Kept, c: Cotangents) -> tuple[State, Cotangents]:
        grid, (store, recover), n = kept.grid, recovery(kept), march.slots(problem, kept.grid)

        def body(k: Array, carry: tuple) -> tuple:
            store, _, c = carry
            i = n - 1 - k
            s, store = recover(i, store)
            return (store, s, march.pull(problem, good, grid, g, i, s, c, start)), None

        return march.runner.repeat(n, body, (store, start, c))[0][1:]

    def chapter(k: Array, carry: tuple) -> tuple:
        part, left = march.chapter(problem, kept, record, chapters - 1 - k)
        return back(part, carry[1]._replace(left=left)), None

    c = march.terminal(problem, good, kept.grid, g)
    if record is None or not record.chapters:
        first, c = back(kept, c)
    else:
        chapters = (kept.grid.loops + record.slots - 1) // record.slots
        (first, c), _ = march.runner.repeat(chapters, chapter, (start, c))
    return march.at_initial(problem, g, c), first


def moving_of(problem: Problem) -> tuple[tuple, tuple]:
    """What carries cotangents, and what does not."""
    p = problem.params
    return (problem.ts, problem.y0, p.shared, p.layers), (p.fixed, p.fixed_layers, problem.numbers)


def problem_of(moving: tuple, still: tuple) -> Problem:
    """The inverse of `moving_of`."""
    ts, y0, shared, layers = moving
    fixed, fixed_layers, numbers = still
    return Problem(ts, y0, Params(shared, layers, fixed, fixed_layers), numbers)


def inner(rows: Rows, k: State, g: State) -> Array:
    """<k, g> by row, in JAX's convention for complex cotangents."""
    total = rows.spread(jnp.zeros(()))
    for x, z in zip(k, g, strict=True):
        total = total + jnp.real(rows.sum(x * z)).astype(total.dtype)
    return total
