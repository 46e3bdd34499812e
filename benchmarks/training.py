"""Training: what does one step cost, of an ODE-Net on real digits, and of a fit to a trajectory observed at 100 times?

python -m benchmarks.training
"""

from functools import partial

from benchmarks.measure import best, compiled, race, report  # first: it prepares diffrax's environment

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.ode import odeint

import jode
import jode.data
from benchmarks.adaptive_gradient import PROBLEMS
from jode.models import Classifier, vector_field

try:
    import torch
    import torchdiffeq
except ImportError:
    torch = None

TOL = 1e-3


def main(quick=False):
    rows = []
    for name, (contestants, x) in {"ODE-Net, 32 digits, width 32": network(), "trajectory at 100 times": trajectory()}.items():
        programs, costs = {}, {}
        for peer, f in contestants.items():
            programs[peer], costs[peer] = (f, 0.0) if peer.startswith("torch") else compiled(f, *x, quick=quick)
        times = race(programs, *x, repeats=5 if quick else 15, seconds=1.0 if quick else 4.0)
        found = {peer: float(np.asarray(programs[peer](*x)[0])) for peer in programs}
        for peer, seconds in times.items():
            ratio = f"{seconds / best(times, 'jode'):.2f}"
            cost = f"{costs[peer]:.2f}" if costs[peer] else "–"
            rows.append([name, peer, f"{seconds * 1e3:.2f}", ratio, f"{found[peer]:.6f}", cost])
    columns = ["what", "solver", "ms a step", "time / best jode", "loss", "trace + compile s"]
    report("training", "One training step (loss, gradient, Adam), float32", columns, rows, quick)


def step_of(loss):
    """(weights, Adam's state, data) -> (loss, weights, Adam's state)."""
    optimiser = optax.adam(1e-3)

    def step(weights, state, *data):
        value, gradient = jax.value_and_grad(loss)(weights, *data)
        updates, state = optimiser.update(gradient, state)
        return value, optax.apply_updates(weights, updates), state

    return step, optimiser.init


def network(batch=32, width=32):
    """ODE-Net of Chen et al. 2018 on digits, Dopri5 at 1e-3."""
    train, _ = jode.data.digits()
    images, labels = jnp.asarray(train.images[:batch]), jnp.asarray(train.labels[:batch])
    model = Classifier(images.shape[1:], width, key=jax.random.key(0))

    def with_jode(x, w, field=vector_field, **options):
        return jode.odeint(field, x, (0.0, 1.0), w, solver=jode.Adaptive(jode.dopri5, TOL, TOL, **options))[-1]

    def with_diffrax(x, w, field=vector_field, **options):
        controller = diffrax.PIDController(rtol=TOL, atol=TOL)
        term, solver = diffrax.ODETerm(field), diffrax.Dopri5()
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, y0=x, args=w, stepsize_controller=controller, **options).ys[-1]

    def rows(solve, model, images, labels):
        """Each image a solve of its own."""

        def one(image, label):
            x = solve(model.features(image), model.block)
            return optax.softmax_cross_entropy_with_integer_labels(model.logits(x), label)

        return jnp.mean(jax.vmap(one)(images, labels))

    def whole(solve, model, images, labels):
        """The batch as one state, with steps in common."""
        x = solve(jax.vmap(model.features)(images), model.block)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model.logits)(x), labels))

    together = lambda t, x, w: jax.vmap(lambda x: vector_field(t, x, w))(x)
    tuned = {"dt0": 0.1, "throw": False, "max_steps": 32, "adjoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=32)}
    bound = {"first_step": 0.1, "max_steps": 32}
    losses = {
        "jode, default, steps by image": partial(rows, with_jode),
        "jode, steps by image": partial(rows, partial(with_jode, **bound)),
        "jode, steps in common": partial(whole, partial(with_jode, field=together, **bound)),
        "diffrax, default, steps by image": partial(rows, partial(with_diffrax, dt0=None)),
        "diffrax, tuned, steps by image": partial(rows, partial(with_diffrax, **tuned)),
        "diffrax, tuned, steps in common": partial(whole, partial(with_diffrax, field=together, **tuned)),
    }
    steps = {peer: step_of(loss)[0] for peer, loss in losses.items()}
    x = jax.vmap(model.features)(images)

    def bare(model, *_):
        """What jode evaluates with steps in common: the solve, then f and its vector-Jacobian product as often as in reverse."""
        solved = jode.solve(together, x, (0.0, 1.0), model.block, solver=jode.Adaptive(jode.dopri5, TOL, TOL, **bound))

        def back(i, carry):
            x, xbar, wbar = carry
            _, pull = jax.vjp(lambda x, w: together(0.1, x, w), x, model.block)
            xbar, step = pull(xbar)
            return x + 1e-3 * xbar, 0.5 * xbar, jax.tree.map(jnp.add, wbar, step)

        nothing = jax.tree.map(jnp.zeros_like, model.block)
        ends = jax.lax.fori_loop(0, solved.stats.nfe_backward, back, (solved.ys[-1], x, nothing))
        return jnp.sum(ends[0]), ends

    steps["bare f and vjp, as many as jode's"] = bare
    if torch is not None:
        steps |= torch_network(model, np.asarray(images), np.asarray(labels))
    return steps, (model, step_of(None)[1](model), images, labels)


def torch_network(model, images, labels):
    """The same network and weights in PyTorch, the batch as one state."""
    tensor = lambda x: torch.tensor(np.asarray(x)).requires_grad_()
    w = jax.tree.map(tensor, model)
    optimiser = torch.optim.Adam(jax.tree.leaves(w), 0.0)  # the same weights at every call
    x0, target = torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels).long()

    def conv(w, x, t=None, padding=1):
        if t is not None:
            x = torch.cat([torch.ones_like(x[:, :1]) * t, x], 1)
        return torch.nn.functional.conv2d(x, w.weight.permute(3, 2, 0, 1), w.bias, padding=padding)

    def norm(w, x):
        groups = min(32, x.shape[1] // 2)
        return torch.nn.functional.group_norm(x, groups, w.weight, w.bias)

    def field(t, x):
        for layer in (w.block.first, w.block.second):
            x = conv(layer.conv, torch.relu(norm(layer.norm, x)), t)
        return norm(w.block.norm, x)

    class Field(torch.nn.Module):
        """torchdiffeq's adjoint asks for a module that owns its parameters."""

        def forward(self, t, x):
            return field(t, x)

    def step(solve, *_):
        optimiser.zero_grad()
        x = conv(w.stem[0], x0, padding=0)
        x = solve(Field(), x, torch.tensor([0.0, 1.0]), rtol=TOL, atol=TOL, method="dopri5")[-1]
        x = torch.relu(norm(w.norm, x)).mean((2, 3))
        loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w.linear.weight, w.linear.bias), target)
        loss.backward()
        value = loss.detach().numpy()
        optimiser.step()
        return (value,)

    block = tuple(jax.tree.leaves(w.block))
    adjoint = partial(torchdiffeq.odeint_adjoint, adjoint_params=block)
    return {"torchdiffeq, odeint": partial(step, torchdiffeq.odeint), "torchdiffeq, odeint_adjoint": partial(step, adjoint)}


def trajectory(saves=100, tol=1e-6):
    """Four parameters of Lotka and Volterra's equations fitted to a trajectory."""
    slopes, y0, true, t1 = PROBLEMS["Lotka-Volterra"]
    f = lambda t, y, a: jnp.stack(slopes(y, a))
    ts = jnp.linspace(0.0, t1, saves + 1)
    seen = jode.odeint(f, y0, ts, true, solver=jode.Adaptive(jode.dopri8, tol, tol))

    def with_diffrax(a, ts, **options):
        controller, saveat = diffrax.PIDController(rtol=tol, atol=tol), diffrax.SaveAt(ts=ts)
        term, solver = diffrax.ODETerm(f), diffrax.Tsit5()
        return diffrax.diffeqsolve(
            term, solver, 0.0, t1, y0=y0, args=a, saveat=saveat, stepsize_controller=controller, **options
        ).ys

    tuned = {"dt0": 0.01, "throw": False, "max_steps": 256}
    checkpoints = diffrax.RecursiveCheckpointAdjoint(checkpoints=256)
    solves = {
        "jode": lambda a, ts: jode.odeint(f, y0, ts, a, solver=jode.Adaptive(jode.tsit5, tol, tol, max_steps=256)),
        "diffrax, default": partial(with_diffrax, dt0=None),
        "diffrax, tuned": partial(with_diffrax, **tuned, adjoint=checkpoints),
        "jax.experimental.ode": lambda a, ts: odeint(lambda y, t, a: f(t, y, a), y0, ts, a, rtol=tol, atol=tol),
    }
    steps = {
        peer: step_of(lambda a, ts, seen, solve=solve: jnp.mean((solve(a, ts) - seen) ** 2))[0] for peer, solve in solves.items()
    }
    start = 1.05 * true
    return steps, (start, step_of(None)[1](start), ts, seen)


if __name__ == "__main__":
    main()
