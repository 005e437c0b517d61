"""KL of recipes on the pairs of `make_pairs`, remembered in a JSON file."""

import json
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.behaviour.envelope import pairs as P
from benchmarks.behaviour.envelope.grids import GRIDS

DATA = Path(__file__).parents[3] / "build" / "envelope"
RESULTS = Path(__file__).parents[2] / "results" / "behaviour" / "envelope_cpu.json"


class Study:
    """Pairs by name `grid|rate` or `grid|noise`, and the KL of what a rounding makes of them."""

    def __init__(self, wheels="/root/.cache/daq_jax/wheels"):
        self.size = P.SIZES["cpu"]
        self.judge = P.Judge(self.size, P.texts_of(wheels))
        self.trained = dict(np.load(DATA / "trained.npz"))
        self.packed = {}
        for f in sorted(DATA.glob("pairs*.npz")):
            z = np.load(f)
            for k in z.files:
                self.packed[k] = (z, k)
        self._references = {}

    def names(self):
        return sorted(
            {
                k.rsplit("|", 1)[0] if not k.endswith("|top") else "|".join(k.split("|")[:2])
                for k in self.packed
            }
        )

    def pair(self, name):
        kind, what = name.split("|")
        base, scales = P.to_base(self.trained, kind)
        if what.startswith("noise"):
            tuned = P.noise_pair(base, float(what[5:]))
        elif what == "zero":
            tuned = base
        else:

            def get(k):
                z, key = self.packed[k]
                return z[key]

            tuned = {k: base[k] + P.unpack(get(f"{name}|{k}"), get(f"{name}|{k}|top")) for k in base}
        return base, tuned, scales

    def kl(self, name, recipe, pair=None, grid=None, detail=False):
        base, tuned, scales = pair or self.pair(name)
        kind = name.split("|")[0]
        g = GRIDS[grid or kind]
        if name not in self._references:
            self._references = {name: self.judge.reference(tuned)}
        out, dots = dict(tuned), np.zeros(3)
        for k in P.quantized(base):
            b, t = jnp.asarray(base[k]), jnp.asarray(tuned[k])
            s = scales.get(k) if not grid or grid == kind else g.absmax(b)
            w = recipe(k, b, t, g, s) if getattr(recipe, "wants_path", False) else recipe(b, t, g, s)
            out[k] = np.asarray(w)
            d, q = np.float64(tuned[k] - base[k]), np.float64(out[k] - base[k])
            dots += (np.sum(d * q), np.sum(d * d), np.sum((q - d) ** 2))
        kl = self.judge.kl(out, self._references[name])
        size = sum(np.sum(np.float64(base[k]) ** 2) for k in P.quantized(base))
        return kl, dots[0] / max(dots[1], 1e-300), math.sqrt(dots[2] / size), math.sqrt(dots[1] / size)


def remembered():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def run(study, names, recipes, again=False, say=True):
    """`{pair: {recipe: [kl, projection, error, change]}}`, and prints it."""
    for name in names:
        pair = None
        for label, (recipe, grid) in recipes.items():
            known = remembered().get(name, {})
            key = label if not grid else f"{label}@{grid}"
            if key in known and not again:
                continue
            pair = pair or study.pair(name)
            start = time.time()
            found = study.kl(name, recipe, pair, grid)
            if say:
                print(
                    f"{name:22s} {key:28s} KL {found[0]:.2e} proj {found[1]:.3f} err {found[2]:.4f} d {found[3]:.5f} ({time.time() - start:.1f}s)",
                    flush=True,
                )
            results = remembered()
            results.setdefault(name, {})[key] = found
            RESULTS.write_text(json.dumps(results, indent=0))


def jitted(f, **fixed):
    return jax.jit(partial(f, **fixed), static_argnums=2)
