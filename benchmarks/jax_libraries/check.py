"""One library's models: plan, quantize, save, load and run, in the environment that has the library.

    python -m benchmarks.jax_libraries.check LIBRARY

prints one line of JSON for each model. `study` calls it.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import daq_jax as daq
from benchmarks.jax_libraries.axes import verdict
from daq_jax.trees import is_qtensor, named_leaves, with_leaves

TOKENS = 2  # all sizes of the models differ and are larger
RECIPE = daq.Recipe(search=daq.AbsMax(), tiling=daq.Block(16, 16))


class Case(NamedTuple):
    """A model of a library.

    Attributes:
        weights: arrays alone, in the containers of the library.
        run: the model on weights; the result is an array of `TOKENS` tokens.
        hold: quantized weights as `run` takes them.
        rules: for `quantize`.
    """

    weights: Any
    run: Callable[[Any], jax.Array]
    hold: Callable[[Any], Any] = lambda q: q
    rules: Sequence[Any] = daq.DEFAULT_RULES


def filled(tree: Any) -> Any:
    """Random weights, so that a gradient reaches each; vectors and norms are about 0.8."""

    def leaf(path: str, x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        noise = jax.random.normal(jax.random.key(zlib.crc32(path.encode())), x.shape)
        return 0.3 * noise + (0.8 if x.ndim < 2 or "norm" in path else 0.0)

    return with_leaves(tree, [leaf(path, x) for path, x in named_leaves(tree).items()])


def gradients(case: Case, weights: Any) -> dict[str, list[np.ndarray]]:
    """The gradients of three losses in each floating-point leaf, by path."""
    leaves = named_leaves(weights)
    floats = {p: x for p, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def loss(floats: dict[str, Any], weigh: jax.Array) -> jax.Array:
        return (
            case.run(with_leaves(weights, [*(leaves | floats).values()])).astype(jnp.float32) * weigh
        ).sum()

    shape = jax.eval_shape(case.run, weights).shape
    gradient = jax.jit(jax.grad(loss))
    found = [gradient(floats, jax.random.normal(jax.random.key(i), shape)) for i in range(3)]
    return {path: [np.asarray(g[path], np.float64) for g in found] for path in floats}


def measure(case: Case) -> dict[str, Any]:
    """What becomes of a model's leaves, and how far its result on codes is from the dequantized one."""
    weights = filled(case.weights)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = daq.plan(weights, recipe=RECIPE, rules=case.rules)
        q = daq.quantize(weights, weights, RECIPE, rules=case.rules)
    taken = {
        p: (tuple(a % x.ndim for a in x.matrix[0]), tuple(a % x.ndim for a in x.matrix[1]))
        for p, x in named_leaves(q).items()
        if is_qtensor(x)
    }
    assert set(taken) == {path for path, leaf in plan.leaves.items() if leaf.quantized}
    found = gradients(case, weights)
    said = {path: verdict(found[path], view, TOKENS) for path, view in taken.items()}
    with tempfile.TemporaryDirectory() as folder:
        daq.save(f"{folder}/q", q)
        loaded = daq.load(f"{folder}/q", q)
    same = all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(loaded), strict=True)
    )
    run = jax.jit(case.run)
    wanted, got = run(daq.dequantize(q)), run(case.hold(loaded))
    return {
        "leaves": len(named_leaves(weights)),
        "quantized": len(taken),
        **{
            word: sum(how == word for how in said.values())
            for word in ("right", "finer", "wrong", "not told")
        },
        "wrong_leaves": [path for path, how in said.items() if how == "wrong"],
        "not_told_leaves": [path for path, how in said.items() if how == "not told"],
        "warnings": sorted(
            {str(w.message)[:200] for w in told if issubclass(w.category, daq.AmbiguousMatrixWarning)}
        ),
        "loaded_is_saved": same,
        "difference": float(jnp.abs(got - wanted).max()),
        "moved_by_quantizing": float(jnp.abs(wanted - run(weights)).max()),
    }


def main(name: str) -> None:
    """Prints a line for each model of a library."""
    jax.config.update("jax_default_matmul_precision", "highest")
    module = importlib.import_module(f"benchmarks.jax_libraries.{name}_models")
    versions = {p: importlib.metadata.version(p) for p in (module.PACKAGE, "jax", "flax")}
    versions["python"] = platform.python_version()
    for model, make in module.MODELS.items():
        row: dict[str, Any] = {"library": module.PACKAGE, "model": model, "versions": versions}
        try:
            row |= measure(make())
        except Exception as error:
            traceback.print_exc(limit=-6)
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
