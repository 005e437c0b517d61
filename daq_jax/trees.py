"""Trees of weights: paired by path, checked as a whole, quantized leaf by leaf."""

import collections
import dataclasses
import math
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from daq_jax import recipes
from daq_jax.errors import DaqError
from daq_jax.leaves import better_together, is_finite, is_staged, quantize_alike, quantize_and_look
from daq_jax.numerics.sharding import committed_sharding, lie_apart, place_of
from daq_jax.qtensor import QTensor
from daq_jax.recipes import Recipe
from daq_jax.rules import (
    DEFAULT_RULES,
    NAMED_RULES,
    Decision,
    NarrowMatrixWarning,
    Rule,
    UnusedRuleWarning,
    decide,
)
from daq_jax.tilings import matrix_problem

PyTree = Any
_FLOATS = ("bfloat16", "float16", "float32")


def is_qtensor(x: object) -> bool:
    """Whether a node of a tree is a QTensor, which is a leaf to us."""
    return isinstance(x, QTensor)


def is_box(x: object) -> bool:
    """Flax boxes that add metadata to an array: `nnx.Variable`, `nn.Partitioned` and their kin."""
    return hasattr(x, "get_raw_value") or (hasattr(x, "unbox") and hasattr(x, "replace_boxed"))


def word_of(key: Any) -> str:
    """A key of a JAX key path as it stands in a path: a dict key, an index or an attribute name."""
    for name in ("key", "idx", "name"):  # of DictKey, SequenceKey, GetAttrKey
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def keyed_leaves(
    tree: PyTree, is_whole: Callable[[Any], bool] = is_qtensor
) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """As `named_leaves`, with each leaf's JAX key path beside it; None is a leaf too.

    Args:
        tree: any pytree.
        is_whole: which nodes are one leaf, whatever they hold.

    Raises:
        DaqError: if two leaves have the same path, such as `{"a/b": x, "a": {"b": y}}`.
    """
    leaves: dict[str, tuple[tuple[Any, ...], Any]] = {}
    outer, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or is_whole(x) or is_box(x)
    )
    for keys, node in outer:
        path = "/".join(map(word_of, keys))
        found = [None] if node is None else jax.tree.leaves(node, is_leaf=is_whole)
        if len(found) > 1:
            raise DaqError(
                f"{path!r} is a {type(node).__name__} of {len(found)} arrays, not a weight. If it comes from "
                "`nnx_with` or `linen_variables`, pass what `quantize` returned instead."
            )
        for leaf in found:
            if path in leaves:
                raise DaqError(f"two leaves have the path {path!r}; rename one so that paths are unique.")
            leaves[path] = keys, leaf
    return leaves


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves of a tree by path, in the tree's order; a QTensor is one leaf, a box adds nothing to a path.

    Raises:
        DaqError: if two leaves have the same path, such as `{"a/b": x, "a": {"b": y}}`.
    """
    return {path: leaf for path, (_, leaf) in keyed_leaves(tree).items() if leaf is not None}


def with_leaves(tree: PyTree, leaves: Sequence[Any]) -> PyTree:
    """The tree with other leaves, in the order of `named_leaves`."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_qtensor), leaves)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A leaf before and after tuning, and what to do with it."""

    path: str
    base: Any
    tuned: Any
    decision: Decision


def pair_leaves(base: PyTree, tuned: PyTree, recipe: Recipe, rules: Sequence[Rule]) -> list[Pair]:
    """Pairs the leaves of two trees by path, in the order of `tuned`, and applies the rules.

    Raises:
        DaqError: naming every path that only one of the trees has.
    """
    before, after = named_leaves(base), named_leaves(tuned)
    problems = [f"{p!r} is in base but not in tuned" for p in before if p not in after]
    problems += [f"{p!r} is in tuned but not in base" for p in after if p not in before]
    if problems:
        raise DaqError(
            _report("base and tuned must have one structure", problems)
            + "\nPass two trees of the same model, or cut both down to the leaves they share."
        )
    pairs = [
        Pair(p, before[p], x, decide(p, _ndim(x), _is_float(x), rules, recipe)) for p, x in after.items()
    ]
    hidden = [
        f"{p.path!r} is a {type(p.tuned).__name__}"
        for p in pairs
        if p.decision.rule is None and _hides_arrays(p.tuned)
    ]
    if hidden:
        raise DaqError(
            _report("JAX does not look for arrays inside these leaves", hidden)
            + "\nRegister their class, as with jax.tree_util.register_dataclass, or keep(...) them."
        )
    return pairs


def _ndim(x: Any) -> int:
    return x.ndim if hasattr(x, "dtype") else 0


def _hides_arrays(x: Any) -> bool:
    """Whether what JAX takes for a leaf is a container that it does not know."""
    if hasattr(x, "dtype") or callable(x):
        return False
    inside = list(x.values()) if isinstance(x, Mapping) else list(getattr(x, "__dict__", {}).values())
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(inside))


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _report(headline: str, problems: Sequence[str]) -> str:
    return f"{headline}:" + "".join(f"\n  {p}" for p in problems)


def _kind(x: Any) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if hasattr(x, "dtype") else f"a {type(x).__name__}"


def problem_of(pair: Pair) -> str | None:
    """Why a pair cannot be quantized, from shapes and dtypes alone: what came, what was needed."""
    base, tuned = pair.base, pair.tuned
    for word, x in (("base", base), ("tuned", tuned)):
        if not hasattr(x, "dtype") or str(x.dtype) not in _FLOATS:
            return f"{word} is {_kind(x)}; a quantized leaf must be bfloat16, float16 or float32"
    if tuple(base.shape) != tuple(tuned.shape):
        return f"base is {tuple(base.shape)} but tuned is {tuple(tuned.shape)}; a pair must share one shape"
    if base.dtype != tuned.dtype:
        return (
            f"base is {base.dtype} but tuned is {tuned.dtype}; a pair must share one dtype: cast one of them"
        )
    if tuned.size == 0:
        return f"it is empty, {tuple(tuned.shape)}; a quantized leaf needs at least one element"
    places = [committed_sharding(x.codes if is_qtensor(x) else x) for x in (base, tuned)]
    if lie_apart(*places):
        return (
            f"base lies on {place_of(places[0])} but tuned on {place_of(places[1])}; a pair must share its "
            "devices and its mesh: base = jax.device_put(base, tuned.sharding)"
        )
    why = matrix_problem(tuned.shape, pair.decision.matrix)
    if why:
        return f"it is {tuple(tuned.shape)} and cannot be viewed as matrix={pair.decision.matrix}: {why}"
    return None


def _all_finite(leaves: Sequence[Any]) -> list[bool]:
    """A flag for each leaf. All are asked for before the host waits for one."""
    return [bool(x) for x in jax.device_get([is_finite(x) for x in leaves])]


@jax.jit
def _all_of(flags: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(flags).all()


def _are_true(flags: Sequence[jax.Array]) -> bool:
    """Whether all are. The host waits for one answer from each set of devices."""
    groups = collections.defaultdict(list)
    for flag in flags:
        groups[frozenset(flag.sharding.device_set)].append(flag)
    answers = [_all_of(x) if len(x) > 1 else x[0] for x in groups.values()]
    return all(jax.device_get([_towards_host(x) for x in answers]))


def _towards_host(flag: jax.Array) -> jax.Array:
    """A flag where the host reads it soonest: on a GPU in pinned memory, which took 0.25 ms off an H200's."""
    sharding = flag.sharding
    if [device.platform for device in sharding.device_set] != ["gpu"]:
        return flag
    return jax.device_put(flag, sharding.with_memory_kind("pinned_host"))


def is_concrete(x: Any) -> bool:
    """Whether all arrays of a tree hold numbers: none is traced or abstract."""
    return not any(isinstance(a, (Tracer, jax.ShapeDtypeStruct)) for a in jax.tree.leaves(x))


def _not_finite(pairs: Sequence[Pair]) -> dict[str, str]:
    """Of the pairs with NaN or infinity in a concrete array: path, and which of the two it is."""
    named = [(p.path, word, x) for p in pairs for word, x in (("base", p.base), ("tuned", p.tuned))]
    named = [(path, word, x) for path, word, x in named if is_concrete(x)]
    if not named or is_staged():
        return {}
    flags = _all_finite([x for _, _, x in named])
    return {path: word for (path, word, _), fine in zip(named, flags, strict=True) if not fine}


def refuse_unquantizable(pairs: Sequence[Pair], check_finite: bool, *, later: bool = False) -> None:
    """Raises one DaqError that names every pair that is to be quantized and cannot be.

    Args:
        pairs: of both trees.
        check_finite: look for NaN and infinity.
        later: but only if there is something to raise anyway.
    """
    pairs = [p for p in pairs if p.decision.quantize]
    problems = {p.path: why for p in pairs if (why := problem_of(p))}
    if check_finite and (problems or not later):
        broken = _not_finite([p for p in pairs if p.path not in problems])
        problems |= {
            path: f"{word} holds NaN or infinity; every weight must be finite: mend the checkpoint"
            for path, word in broken.items()
        }
    if problems:
        lines = [
            f"{path!r}: {why}. "
            f"Or leave it as it is: put keep({f'^{re.escape(path)}$'!r}) before your other rules."
            for path, why in problems.items()
        ]
        raise DaqError(_report(f"{len(problems)} of the leaves cannot be quantized", lines))


def warn_unused(pairs: Sequence[Pair], rules: Sequence[Rule]) -> None:
    """Warns of each rule of the caller's own that no leaf's path matches."""
    for rule in rules:
        if rule not in NAMED_RULES and not any(rule.matches(p.path, np.ndim(p.tuned)) for p in pairs):
            warnings.warn(f"the rule for {rule.pattern!r} matches no leaf", UnusedRuleWarning, stacklevel=3)


def warn_narrow(pairs: Sequence[Pair]) -> None:
    """Warns of each leaf that no rule knows and that looks as if it needed a matrix view of its own."""
    for p in pairs:
        *stack, rows, _ = np.shape(p.tuned) if np.ndim(p.tuned) > 2 else (1, 1)
        if p.decision.quantize and p.decision.rule is None and math.prod(stack) >= 16 * rows:
            shape, many = np.shape(p.tuned), math.prod(stack)
            warnings.warn(
                f"{p.path!r} {shape} is taken as {many} matrices of {rows} rows, with scales of their own; "
                "if its rows are on other axes, as those of attention heads are, say "
                "which with use(pattern, matrix=(input axes, output axes))",
                NarrowMatrixWarning,
                stacklevel=3,
            )


def quantize(
    base: PyTree,
    tuned: PyTree,
    recipe: Recipe = recipes.default,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    donate: bool = False,
    check_finite: bool = True,
) -> PyTree:
    """Quantizes a tuned model so that what tuning changed survives.

    Pure; works eagerly and under `jax.jit`, `jax.eval_shape` and `jax.export`, on NumPy arrays, and on
    sharded arrays, whose sharding the result keeps.

    Args:
        base: tree of weights before tuning: bfloat16, float16 or float32 arrays `[..., in, out]`, or
            QTensors, each of which stands for what it dequantizes to.
        tuned: tree of weights after tuning, of the same structure; dtypes agree leaf by leaf.
        recipe: how to quantize leaves whose rule does not say.
        rules: which leaves are quantized, in place of `DEFAULT_RULES`; write `[..., *daq.DEFAULT_RULES]` to
            add to those.
        donate: delete each input array as soon as its codes exist. Ignored under a trace.
        check_finite: refuse NaN and infinity. A tile that holds one gets the scale NaN, so it takes a look at
            all scales once every leaf is on its way; with `donate`, a look at both trees first. Under a trace
            there is no look.

    Returns:
        A tree like `tuned`, with a `QTensor` for each leaf that was quantized.

    Raises:
        DaqError: naming every leaf at fault: other structure, shape or dtype, an empty leaf, a rule that
            quantizes what cannot be quantized, all before any work, or NaN or infinity.

    Source: arXiv:2603.22324 for the question; see `Recipe` for the answers.

    >>> base = {"kernel": jnp.ones((128, 128))}
    >>> tuned = {"kernel": jnp.full((128, 128), 1.25)}
    >>> quantize(base, tuned)["kernel"].codes.dtype
    dtype(float8_e4m3fn)
    """
    pairs = pair_leaves(base, tuned, recipe, rules)
    warn_unused(pairs, rules)
    warn_narrow(pairs)
    donate = donate and not is_staged()
    later = not donate and is_concrete((base, tuned))
    refuse_unquantizable(pairs, check_finite, later=later)
    uses = collections.Counter(id(x) for x in jax.tree.leaves((base, tuned)))
    results, finite = [pair.tuned for pair in pairs], []
    for group in _groups(pairs):
        found, flag = _quantize_group([pairs[i] for i in group])
        finite.append(flag)
        for i, q in zip(group, found, strict=True):
            results[i] = q
            if donate:
                _delete(pairs[i], uses)
    if check_finite and later and is_concrete(finite) and not _are_true(finite):
        refuse_unquantizable(pairs, check_finite)
    return with_leaves(tuned, results)


def _groups(pairs: Sequence[Pair]) -> list[list[int]]:
    """Positions in `pairs` of those that are quantized at once, as a batch.

    All batches of a kind have one size, so that one program does for them: the last repeats its last pair.
    """
    alike = collections.defaultdict[tuple[Any, ...], list[int]](list)
    for i, pair in enumerate(pairs):
        if pair.decision.quantize:
            most = better_together(pair.tuned, pair.decision.recipe)
            alike[(1, i) if most == 1 else (most, *_batch_kind(pair))].append(i)
    groups = []
    for (most, *_), some in alike.items():
        count = -(-len(some) // most)
        size = -(-len(some) // count)
        some += some[-1:] * (count * size - len(some))
        groups += [some[i : i + size] for i in range(0, len(some), size)]
    return sorted(groups)


def _batch_kind(pair: Pair) -> tuple[Any, ...]:
    """The same for pairs that one program takes as a batch."""
    leaves, structure = jax.tree.flatten((pair.base, pair.tuned))
    places = (frozenset(x.devices()) if isinstance(x, jax.Array) else None for x in leaves)
    shapes = ((x.shape, x.dtype) for x in leaves)
    return pair.decision.recipe, pair.decision.matrix, structure, *shapes, *places


def _quantize_group(pairs: Sequence[Pair]) -> tuple[list[QTensor], jax.Array]:
    """The results, and whether all was finite."""
    how = pairs[0].decision
    if len(pairs) > 1:
        bases, tuneds = [pair.base for pair in pairs], [pair.tuned for pair in pairs]
        return quantize_alike(bases, tuneds, recipe=how.recipe, matrix=how.matrix)
    (pair,), stream = pairs, zlib.crc32(pairs[0].path.encode())
    q, finite = quantize_and_look(pair.base, pair.tuned, recipe=how.recipe, matrix=how.matrix, stream=stream)
    return [q], finite


def _delete(pair: Pair, uses: collections.Counter[int]) -> None:
    """Frees the arrays of a pair, but for those that stand in other places of the trees too."""
    for x in jax.tree.leaves((pair.base, pair.tuned)):
        uses[id(x)] -= 1
        if not uses[id(x)] and isinstance(x, jax.Array) and not isinstance(x, Tracer):
            x.delete()


def dequantize(tree: PyTree, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
    """Arrays again: every QTensor of a tree dequantized, everything else as it is.

    Args:
        tree: any pytree.
        dtype: of the results; None gives each leaf's original dtype.
    """
    return jax.tree.map(lambda x: x.dequantize(dtype) if is_qtensor(x) else x, tree, is_leaf=is_qtensor)
