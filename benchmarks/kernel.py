"""The limit: the same adaptive Tsit5 loop written in C, one trajectory at a time, and 16 in lock-step for SIMD."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import jode

FIELDS = {
    "Lotka-Volterra": ["1.5f*y0 - y0*y1", "-3*y1 + y0*y1"],
    "Lorenz": ["10*(y1 - y0)", "y0*(28 - y2) - y1", "y0*y1 - 8/3.f*y2"],
}


def kernel(problem, t1, tol, lanes):
    """A function of y0 (B, D) that returns y(t1), or None without a compiler. `lanes` trajectories march in lock-step."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp())
    (folder / "kernel.c").write_text(source(FIELDS[problem], lanes))
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "kernel.c", "-o", "kernel.so", "-lm"], cwd=folder, check=True)
    march = ctypes.CDLL(str(folder / "kernel.so")).march
    march.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_float]

    def solve(y0):
        y0 = np.ascontiguousarray(y0, np.float32)
        out = np.empty_like(y0)
        march(y0.ctypes.data, out.ctypes.data, len(y0), t1, tol)
        return out

    return solve


def source(field, lanes):
    """C for all rows: `lanes` at a time while there are so many; those that are done take steps of width zero."""
    tableau, d = jode.tsit5.tableau, len(field)
    point = "".join(f"float y{i} = x[{i}][l]; " for i in range(d))
    slope = " ".join(f"k[j][{i}][l] = {e};" for i, e in enumerate(field))
    f = f"for (int l = 0; l < W; l++) {{ {point}{slope} }}"

    def total(row):
        return " + ".join(f"{w!r}f*k[{j}][i][l]" for j, w in enumerate(row) if w)

    each = f"for (int i = 0; i < {d}; i++) for (int l = 0; l < W; l++)"
    stages = "\n".join(
        f"    {{ const int j = {j}; {each} x[i][l] = y[i][l] + h[l]*({total(row)}); {f} }}"
        for j, row in enumerate((*tableau.rows[1 : tableau.stages], tableau.b), 1)
    )
    return f"""#include <math.h>
#define W {lanes}
static void some(const float *y0, float *out, float t1, float tol) {{
  float y[{d}][W], x[{d}][W], k[7][{d}][W], t[W], h[W];
  for (int l = 0; l < W; l++) {{ t[l] = 0; h[l] = 0.01f; }}
  {each} x[i][l] = y[i][l] = y0[l*{d} + i];
  {{ const int j = 0; {f} }}
  for (float width = 1; width > 0;) {{
{stages}
    float e[W] = {{0}};
    {each} {{
      float s = tol + tol*fmaxf(fabsf(y[i][l]), fabsf(x[i][l])), r = h[l]*({total(tableau.error[0])})/s;
      e[l] += r*r;
    }}
    width = 0;
    for (int l = 0; l < W; l++) {{
      float r = e[l]/{d}, grow = 0.9f*expf(-0.1f*logf(fmaxf(r, 1e-30f)));
      int good = r <= 1;
      t[l] = good ? t[l] + h[l] : t[l];
      for (int i = 0; i < {d}; i++) {{
        y[i][l] = good ? x[i][l] : y[i][l];
        k[0][i][l] = good ? k[6][i][l] : k[0][i][l];
      }}
      float left = t1 - t[l];
      h[l] = left <= 1e-6f*t1 ? 0 : fminf(h[l]*fminf(fmaxf(grow, 0.2f), good ? 10 : 1), left);
      width = fmaxf(width, h[l]);
    }}
  }}
  {each} out[l*{d} + i] = y[i][l];
}}
void march(const float *y0, float *out, long n, float t1, float tol) {{
  for (long r = 0; r < n; r += W) {{
    long at = r + W <= n ? r : n - W;
    some(y0 + at*{d}, out + at*{d}, t1, tol);
  }}
}}
"""
