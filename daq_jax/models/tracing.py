"""Rules for a model, from one trace of it: the axes that the model itself contracts."""

import collections
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from daq_jax.errors import DaqError
from daq_jax.models.contractions import Contractions, start, walk
from daq_jax.recipe import Recipe
from daq_jax.rules import DEFAULT_RULES, AmbiguousMatrixWarning, Rule, decide_all, views_by_type
from daq_jax.tilings import Matrix
from daq_jax.trees import PyTree, named_leaves


def rules_for(model: Any, *inputs: Any, **options: Any) -> list[Rule]:
    """Rules for the weights of a model, from the products in one trace of it. Computes nothing.

    A weight that the model multiplies its data by is viewed as the model contracts it. A weight that is
    looked up, used element by element, or used in two ways is kept, and so is what `DEFAULT_RULES` keep.
    Weights that the trace does not reach are left to `DEFAULT_RULES`, which stand at the end.

    Args:
        model: an NNX or a Linen module; any other callable pytree, such as an Equinox module; or a function,
            whose first argument is the tree of weights. Abstract arrays will do for weights.
        inputs: arguments of one call, arrays or `jax.ShapeDtypeStruct`s; for a function, weights first.
        options: keyword arguments of the call, which are not traced.

    Returns:
        Rules for `quantize` and `plan`. Leaves whose paths differ in numbers alone share a rule.

    Raises:
        DaqError: if the model has no floating-point array or no input, or if no weight is multiplied by data,
            but arrays that the function holds itself are.

    Warns:
        AmbiguousMatrixWarning: if some products are with arrays that the function holds itself, of which the
            rules say nothing.

    >>> import jax.numpy as jnp
    >>> apply = lambda weights, x: jnp.einsum("td,hdk->thk", x, weights["into"])
    >>> rule, *_ = rules_for(apply, {"into": jnp.ones((4, 8, 2))}, jnp.ones((3, 8)))
    >>> rule.matrix
    ((-2,), (-3, -1))
    """
    apply, weights, inputs = _as_function(model, inputs, options)
    leaves = named_leaves(weights)
    decisions = decide_all(leaves, DEFAULT_RULES, Recipe(), views_by_type(weights))
    if not any(how.why != "not floating point" for how in decisions.values()):
        raise DaqError("rules_for: the model has no floating-point array; pass its weights as first input.")
    found = _contractions(apply, weights, inputs)
    _speak_of_captured(found)
    if not any(hasattr(x, "dtype") for x in jax.tree.leaves(inputs)):
        raise DaqError("rules_for: no array to call the model with; pass the inputs of one call by position.")
    said: dict[str, Matrix | str | None] = {}
    for path, how in decisions.items():
        view = found.matrix_of(path, len(getattr(leaves[path], "shape", ())))
        if not how.quantize:
            said[path] = how.why
        elif view == "not used" or (re.search(_STACKED, path) and _is_finer(how.matrix, view)):
            said[path] = None
        else:
            said[path] = view
    return [*_as_rules(said), *DEFAULT_RULES]


Function = Callable[..., Any]
_STACKED = r"(?i)expert|moe"  # one matrix to a model that runs all experts, better as many


def _is_finer(matrix: Matrix, coarse: Matrix | str) -> bool:
    """Whether a view has the inputs of another one and some of its outputs."""
    return not isinstance(coarse, str) and matrix[0] == coarse[0] and set(matrix[1]) < set(coarse[1])


def _as_function(
    model: Any, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Function, PyTree, tuple]:
    """A function of weights and inputs, the weights, and the inputs."""
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return lambda state, *x: nnx.merge(graph, state, copy=True)(*x, **options), state, inputs
    if isinstance(model, linen.Module):
        key = jax.random.key(0)
        variables = jax.eval_shape(lambda *x: model.init(key, *x, **options), *inputs)
        return lambda variables, *x: model.apply(variables, *x, **options), variables, inputs
    if any(hasattr(x, "dtype") for x in jax.tree.leaves(model)):
        return lambda model, *x: model(*x, **options), model, inputs
    if not inputs or not callable(model):
        raise DaqError(f"rules_for: got {type(model).__name__}; needed a model and the inputs of one call.")
    return lambda weights, *x: model(weights, *x, **options), inputs[0], inputs[1:]


def _contractions(apply: Function, weights: PyTree, inputs: tuple[Any, ...]) -> Contractions:
    """What one call does with each weight."""
    leaves, structure = jax.tree.flatten((weights, inputs))
    traced = [hasattr(x, "dtype") for x in leaves]
    arrays = [x for x, is_array in zip(leaves, traced, strict=True) if is_array]

    def call(*arrays: Any) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if is_array else x for x, is_array in zip(leaves, traced, strict=True)]
        weights, inputs = jax.tree.unflatten(structure, filled)
        return jax.tree.leaves(apply(weights, *inputs))

    # Results that are no arrays, such as modules and strings, are of no use to a trace.
    program = jax.make_jaxpr(lambda *x: [y for y in call(*x) if hasattr(y, "dtype")])(*arrays)
    paths: list[str | None] = [path for path, x in named_leaves(weights).items() if hasattr(x, "dtype")]
    paths += [None] * (len(arrays) - len(paths))
    found = Contractions()
    walk(program.jaxpr, start(paths, [x.shape for x in arrays]), found)
    return found


def _speak_of_captured(found: Contractions) -> None:
    """Names arrays in products that are no arguments: no rule is made for them, nor for what they meet."""
    if not found.captured:
        return
    shown = sorted(found.captured)
    names = ", ".join(shown[:5]) + f" and {len(shown) - 5} more" * (len(shown) > 5)
    text = (
        f"rules_for: the model multiplies by arrays that it holds itself: {names}. Rules are made for the "
        "weights in the first argument, from their products with the arguments behind it. Pass weights and "
        "data as arguments: `rules_for(lambda weights, x: ..., weights, x)`."
    )
    if not any(isinstance(use, tuple) for uses in found.uses.values() for use in uses):
        raise DaqError(text)
    warnings.warn(f"{text} Constants that are no weights may stay.", AmbiguousMatrixWarning, stacklevel=3)


def _as_rules(said: dict[str, Matrix | str | None]) -> list[Rule]:
    """Rules that say this of each leaf; one rule speaks of all paths that differ in numbers and agree."""
    alike = collections.defaultdict[str, dict[str, Matrix | str | None]](dict)
    for path, what in said.items():
        alike[re.sub(r"\d+", "#", path)][path] = what
    rules = []
    for shape, paths in alike.items():
        whole = len(set(paths.values())) == 1
        for name in [shape] if whole else paths:
            what = next(iter(paths.values())) if whole else paths[name]
            # The collection of a Linen module may be passed on without its name.
            short = re.escape(name.removeprefix("params/"))
            pattern = f"(^|/){short.replace(re.escape('#'), '[0-9]+') if whole else short}$"
            if isinstance(what, str):
                rules.append(Rule(pattern, quantize=False, about=what))
            elif what is not None:
                rules.append(Rule(pattern, quantize=True, matrix=what, about="as the model contracts it"))
    return rules
