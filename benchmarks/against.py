"""Is this revision as fast as an earlier one? python -m benchmarks.against REV

Both run in processes of their own, side by side, and take turns case by case, so that a busy machine slows both; a third process runs
this revision once more, and its ratio to the first shows what the machine alone does. A row is the paired ratio of times, present /
REV, with its 95 % interval; it fails where the interval lies above 1.05. Temporaries are XLA's own account of the compiled program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jode

ROOT = Path(__file__).parent.parent
TURNS, SECONDS, LIMIT = 20, 0.06, 1.05


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("rev", help="any name git knows")
    p.add_argument("--only", default="", help="cases whose name holds this")
    p.add_argument("--turns", type=int, default=TURNS)
    args = p.parse_args(argv)
    from benchmarks.measure import report

    rev = git("rev-parse", "--short", args.rev)
    with tempfile.TemporaryDirectory() as folder:
        git("worktree", "add", "--detach", folder, rev)
        try:
            workers = {"rev": Worker(folder), "now": Worker(ROOT), "again": Worker(ROOT)}
            names = [name for name in cases() if args.only in name]
            rows = [compare(workers, name, args.turns) for name in names]
        finally:
            git("worktree", "remove", "--force", folder)
    ratios, memory, compiling = (np.array([row[k] for row in rows]) for k in ("ratio", "memory", "compiling"))
    mean = lambda x: float(np.exp(np.mean(np.log(x))))
    interval = lambda r, k: f"{r[k]:.3f} [{r[k + ' low']:.3f}, {r[k + ' high']:.3f}]"
    table = []
    for r in rows:
        verdict = "slower" if r["ratio low"] > LIMIT else ""
        times = f"{r['us']:.1f}", interval(r, "ratio"), interval(r, "again")
        table.append([r["name"], *times, f"{r['memory']:.3f}", f"{r['compiling']:.2f}", verdict])
    table.append(["geometric mean", "", f"{mean(ratios):.3f}", "", f"{mean(memory):.3f}", f"{mean(compiling):.2f}", ""])
    columns = ["case", "us, present", f"time, present / {rev}", "present / present", "temporaries", "trace + compile", "verdict"]
    report("against", f"The present revision against {rev}", columns, table)
    sys.exit(any(row[-1] for row in table))


def git(*args):
    return subprocess.run(["git", "-C", ROOT, *args], check=True, capture_output=True, text=True).stdout.strip()


class Worker:
    """A process that has one revision's jode, and does one thing at a time."""

    def __init__(self, tree):
        env = {**os.environ, "PYTHONPATH": str(tree)}
        command = [sys.executable, __file__, "--worker", str(tree)]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(workers, name, turns):
    """One row: the paired ratios of the turns, temporaries and compile times."""
    first = {who: worker.ask("compile", name) for who, worker in workers.items()}
    loops = max(1, int(SECONDS / first["now"]["once"]))
    times = {who: [] for who in workers}
    for turn in range(turns):
        order = list(workers) if turn % 2 else list(workers)[::-1]
        for who in order:
            times[who].append(workers[who].ask("time", name, loops))
    out = {"name": name, "us": 1e6 * float(np.median(times["now"]))}
    for key, pair in {"ratio": ("now", "rev"), "again": ("again", "now")}.items():
        logs = np.sort(np.log(times[pair[0]]) - np.log(times[pair[1]]))
        out[key] = float(np.exp(np.median(logs)))
        # The median's interval by ranks: a turn that something else disturbed counts as one.
        rank = max(0, int(np.floor(turns / 2 - 0.98 * np.sqrt(turns))) - 1)
        out[key + " low"], out[key + " high"] = (float(np.exp(logs[k])) for k in (rank, turns - 1 - rank))
    out["memory"] = (1024 + first["now"]["memory"]) / (1024 + first["rev"]["memory"])
    out["compiling"] = first["now"]["seconds"] / first["rev"]["seconds"]
    print(json.dumps(out), flush=True)
    return out


def serve(tree):
    """Answer the parent's questions, a line each."""
    assert Path(jode.__file__).is_relative_to(tree), f"jode is that of {jode.__file__}, not of {tree}"
    programs, out = {}, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed goes to stderr
    for line in sys.stdin:
        what, name, *rest = json.loads(line)
        if what == "compile":
            f, args = cases()[name]()
            seconds = []
            for _ in range(3):
                jax.clear_caches()
                start = time.perf_counter()
                program = jax.jit(lambda *x: f(*x)).lower(*args).compile()
                seconds.append(time.perf_counter() - start)
            jax.block_until_ready(program(*args))
            once = clock(program, args, 1)
            memory = program.memory_analysis().temp_size_in_bytes
            programs = {name: (program, args)}
            answer = {"seconds": float(np.median(seconds)), "once": once, "memory": memory}
        else:
            answer = clock(*programs[name], *rest)
        print(json.dumps(answer), file=out, flush=True)


def clock(program, args, loops):
    """Seconds a call."""
    jax.block_until_ready(program(*args))
    start = time.perf_counter()
    for _ in range(loops):
        found = program(*args)
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / loops


def lotka_volterra(t, y, a):
    return jnp.stack([a[0] * y[0] - a[1] * y[0] * y[1], a[2] * y[0] * y[1] - a[3] * y[1]])


def lorenz(t, y, a):
    return jnp.stack([a[0] * (y[1] - y[0]), y[0] * (a[1] - y[2]) - y[1], y[0] * y[1] - a[2] * y[2]])


PROBLEMS = {
    "Lotka-Volterra": (lotka_volterra, jnp.array([1.0, 1.0]), jnp.array([1.5, 1.0, 1.0, 3.0]), 10.0),
    "Lorenz": (lorenz, jnp.array([1.0, 1.0, 25.0]), jnp.array([10.0, 28.0, 8 / 3]), 5.0),
}
SOLVERS = {"adaptive": jode.Adaptive(jode.tsit5, 1e-6, 1e-6), "fixed": jode.Fixed(jode.rk4, 100)}


def cases():
    """By name, a function that makes (f, arguments); only the public interface is used."""
    found = {}
    for problem in PROBLEMS:
        for kind in SOLVERS:
            for rows in (1, 100, 1000):
                for what in ("forward", "gradient"):
                    found[f"{problem}, {kind}, {rows} rows, {what}"] = lambda p=problem, k=kind, r=rows, w=what: small(
                        p, k, r, w, 1
                    )
        for rows in (1, 1000):
            for what in ("forward", "gradient"):
                found[f"{problem}, adaptive, 100 save times, {rows} rows, {what}"] = lambda p=problem, r=rows, w=what: small(
                    p, "adaptive", r, w, 100
                )
    found["Lotka-Volterra, adaptive, 10000 rows, forward"] = lambda: small("Lotka-Volterra", "adaptive", 10_000, "forward", 1)
    for adjoint in ("Backprop", "MemoryFree", "Backsolve"):
        found[f"perceptron 64-128-64, 128 rows, midpoint x 100, gradient by {adjoint}"] = lambda a=adjoint: perceptron(a)
    found["perceptron 64-128-64, 128 rows, midpoint x 100, forward"] = lambda: perceptron(None)
    found["training step, perceptron, 128 rows, adaptive"] = training
    return found


def small(problem, kind, rows, what, saves):
    f, y0, args, t1 = PROBLEMS[problem]
    ts, solver = np.linspace(0.0, t1, saves + 1), SOLVERS[kind]
    y0 = y0 if rows == 1 else y0 * (1 + 0.01 * jax.random.normal(jax.random.key(0), (rows, len(y0))))

    def solve(y0, args):
        one = lambda y: jode.odeint(f, y, ts, args, solver=solver)[1:]
        return one(y0) if rows == 1 else jax.vmap(one)(y0)

    if what == "forward":
        return solve, (y0, args)
    return jax.grad(lambda y0, args: jnp.sum(solve(y0, args) ** 2), (0, 1)), (y0, args)


def weights(key, sizes=(64, 128, 64)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [(jax.random.normal(k, (n, m)) / n**0.5, jnp.zeros(m)) for k, n, m in zip(keys, sizes, sizes[1:], strict=False)]


def network(t, y, w):
    (a, b), (c, d) = w
    return jnp.tanh(y @ a + b) @ c + d


def perceptron(adjoint):
    x, w = jax.random.normal(jax.random.key(1), (128, 64)), weights(jax.random.key(2))
    options = {} if adjoint is None else {"adjoint": getattr(jode, adjoint)()}
    solver = jode.Fixed(jode.midpoint, 100)
    solve = lambda x, w: jax.vmap(lambda x: jode.odeint(network, x, (0.0, 1.0), w, solver=solver, **options)[-1])(x)
    if adjoint is None:
        return solve, (x, w)
    return jax.grad(lambda x, w: jnp.sum(solve(x, w) ** 2), (0, 1)), (x, w)


def training():
    """Loss, gradient and Adam's update of a neural ODE with the defaults but for the tolerance."""
    x, w = jax.random.normal(jax.random.key(1), (128, 64)), weights(jax.random.key(2))
    optimizer = optax.adam(1e-3)

    def loss(w, x):
        ends = jax.vmap(lambda x: jode.odeint(network, x, (0.0, 1.0), w, solver=jode.Adaptive(jode.tsit5, 1e-3, 1e-3))[-1])(x)
        return jnp.mean((ends - jnp.roll(x, 1, 1)) ** 2)

    def step(w, state, x):
        value, gradient = jax.value_and_grad(loss)(w, x)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(w, updates), state, value

    return step, (w, optimizer.init(w), x)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        serve(sys.argv[-1])
    else:
        main()
