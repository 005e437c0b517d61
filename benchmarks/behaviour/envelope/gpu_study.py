"""The 25M model: `python -m benchmarks.behaviour.envelope.gpu_study WHEELS OUT PLAN SECONDS`; a plan names pairs and recipes.

Matrices of one shape are rounded together, stacked over the layers.
"""

import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.behaviour.envelope import pairs as P
from benchmarks.behaviour.envelope.baselines import absmax_fresh, at_base_scale, default, gains, stochastic
from benchmarks.behaviour.envelope.envelope import VARIANTS, Number, envelope, native_tiles
from benchmarks.behaviour.envelope.grids import GRIDS

START = time.time()
BASELINES = {"absmax": absmax_fresh, "base_scale": at_base_scale, "stochastic": stochastic, "gains": gains}


def stacked(weights):
    kinds = sorted({k.split("/", 1)[1] for k in P.quantized(weights)})
    n = len({k.split("/")[0] for k in P.quantized(weights)})
    return {kind: jnp.stack([jnp.asarray(weights[f"layer_{i}/{kind}"]) for i in range(n)]) for kind in kinds}


def unstacked(stacks, weights):
    out = dict(weights)
    for kind, x in stacks.items():
        for i in range(len(x)):
            out[f"layer_{i}/{kind}"] = x[i]
    return out


_compiled = {}


def apply(name, grid, base, tuned, scale):
    """`[n, R, C]` each; returns weights and what the candidate says of itself."""
    with jax.default_matmul_precision("highest"):
        if name in BASELINES or name.startswith("rule "):
            f = BASELINES.get(name) or (lambda b, t, g, s: absmax_fresh(b, t, g, s, name[5:]))
            key = (name, grid.name)
            if key not in _compiled:
                _compiled[key] = jax.jit(jax.vmap(lambda b, t, s: f(b, t, grid, s)))
            return _compiled[key](base, tuned, scale), None
        if name == "default":
            return jnp.stack([default(b, t, grid, None) for b, t in zip(base, tuned, strict=True)]), None
        settings = jax.tree.map(jnp.float32, VARIANTS[name])
        made, about = _envelope(grid, base, tuned, scale, settings)
        if grid.rule == "any" and name.startswith("new"):  # a scale off the base's grid, where that errs less
            off = jax.vmap(grid.absmax)(tuned) * 1.19
            other, _ = _envelope(grid, base, tuned, off, settings._replace(damping=jnp.float32(3)))
            nearest = _off_error(grid, tuned, off)
            better = (about[:, 0] > 0) & (nearest < about[:, 4])
            made = jnp.where(better[:, None, None], other, made)
            about = jnp.concatenate([about, better[:, None]], 1)
        return made, about


def _envelope(grid, base, tuned, scale, settings):
    if ("spread", grid.name) not in _compiled:
        _compiled["spread", grid.name] = jax.jit(
            jax.vmap(lambda b, s: (grid.spread(s, b), native_tiles(grid, b, s)))
        )
    s, native = _compiled["spread", grid.name](base, scale)
    if "envelope" not in _compiled:
        _compiled["envelope"] = jax.jit(jax.vmap(envelope, (0, 0, 0, 0, None, None)))
    return _compiled["envelope"](base, tuned, s, native, Number.of(grid), settings)


def _off_error(grid, tuned, scale):
    if ("off", grid.name) not in _compiled:
        _compiled["off", grid.name] = jax.jit(
            jax.vmap(lambda t, s: jnp.mean((grid.encode(t, s) * grid.spread(s, t) - t) ** 2))
        )
    return _compiled["off", grid.name](tuned, scale)


def main(wheels, out, plan_file, seconds):
    plan, path = json.loads(Path(plan_file).read_text()), Path(out) / "results.json"
    texts, size = P.texts_of(wheels), P.SIZES["gpu"]
    judge = P.Judge(size, texts, plan.get("judged", 256))
    results = {}
    for seed in plan["seeds"]:
        trained_params, second, tune_key = P.make_trained(size, texts, seed)
        trained = P.flat(trained_params)
        print(f"base trained {time.time() - START:.0f}", flush=True)
        for kind, what, names, *on in plan["pairs"]:
            if time.time() - START > float(seconds):
                print("out of time before", kind, what)
                break
            grid = GRIDS[on[0] if on else kind]
            base, _ = P.to_base(trained, kind)
            if isinstance(what, str):
                tuned = P.noise_pair(base, float(what[5:])) if what != "zero" else dict(base)
            else:
                tuned = P.flat(P.learn(P.nested(base), second, size.tune_steps, what, tune_key, size))
            b, t = stacked(base), stacked(tuned)
            scales = {k: jax.vmap(grid.absmax)(stacked(trained)[k] if kind != "bf16" else t[k]) for k in b}
            ref = judge.reference(tuned)
            key = f"{seed}|{kind}|{what}|{grid.name}"
            n2 = sum(float(jnp.sum(x * x)) for x in b.values())
            d2 = sum(float(jnp.sum((t[k] - b[k]) ** 2)) for k in b)
            results[key] = {"change": math.sqrt(d2 / n2), "nothing": judge.kl(base, ref), "kl": {}}
            line = []
            for name in [r for n in names for r in plan["recipes"][n]]:
                made, about, e2, pr = {}, [], 0.0, 0.0
                for k in b:
                    made[k], told = apply(name, grid, b[k], t[k], scales[k])
                    if told is not None:
                        about.append(np.asarray(told).mean(0).round(3).tolist())
                    e2 += float(jnp.sum((made[k] - t[k]) ** 2))
                    pr += float(jnp.sum((made[k] - b[k]) * (t[k] - b[k])))
                kl = judge.kl(unstacked(made, tuned), ref)
                changed = sum(int(jnp.sum(made[k] != b[k])) for k in b)
                results[key]["kl"][name] = [kl, pr / max(d2, 1e-300), math.sqrt(e2 / n2), about, changed]
                line.append(f"{name} {kl:.2e} ({pr / max(d2, 1e-300):.2f},{math.sqrt(e2 / n2):.4f})")
                if name == "new":
                    line.append(str(about))
            print(
                f"{time.time() - START:.0f} {key} d {results[key]['change']:.5f} nothing {results[key]['nothing']:.2e}\n  "
                + "; ".join(line),
                flush=True,
            )
            path.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
