"""The loop that one would write by hand: adaptive Tsit5 with the classical controller, no statuses, saves or checks."""

import jax
import jax.numpy as jnp

import jode


def start(f, y0, args):
    """The carry (t, h, y, slope) at t = 0."""
    return jnp.float32(0.0), jnp.float32(0.01), y0, f(0.0, y0, args)


def attempt(f, args, t1, tol):
    """One attempted step, as a function of the carry."""
    tableau = jode.tsit5.tableau

    def once(carry):
        t, h, y, k1 = carry
        ks = [k1]
        for c, row in zip(tableau.nodes[1:6], tableau.rows[1:6], strict=True):
            ks.append(f(t + c * h, y + h * sum(w * k for w, k in zip(row, ks, strict=True) if w), args))
        y1 = y + h * sum(w * k for w, k in zip(tableau.b, ks, strict=True) if w)
        ks.append(f(t + h, y1, args))
        gap = h * sum(w * k for w, k in zip(tableau.error[0], ks, strict=True) if w)
        e = jnp.sqrt(jnp.mean((gap / (tol + tol * jnp.maximum(jnp.abs(y), jnp.abs(y1)))) ** 2))
        e = jax.lax.stop_gradient(jnp.maximum(e, 1e-10))
        good = e <= 1
        t = jnp.where(good, jnp.where(h >= t1 - t, t1, t + h), t)
        y, k1 = jnp.where(good, y1, y), jnp.where(good, ks[-1], k1)
        h = jnp.minimum(h * jnp.clip(0.9 * jnp.exp(-0.2 * jnp.log(e)), 0.2, jnp.where(good, 10.0, 1.0)), t1 - t)
        return t, h, y, k1

    return once
