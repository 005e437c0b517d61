"""LoRA adapters on trees: which leaves are a pair of factors, which weight they belong to, and their sum.

| library | pair | weight | change |
|---|---|---|---|
| Flax NNX | `P/lora/lora_a` `[in, r]`, `P/lora/lora_b` `[r, out]` | `P/kernel` | `a b` |
| Flax NNX, wrapped | `P/lora_a`, `P/lora_b` | `P/base_module/kernel` or `P/kernel` | `a b` |
| qwix, Tunix | `P/w_lora_a` `[inputs..., r]`, `P/w_lora_b` `[r, outputs...]` | `P/w` | `alpha / rank * a b` |
| PEFT | `P.lora_A.weight` `[r, in]`, `P.lora_B.weight` `[out, r]` | `P.weight` | `alpha / rank * B A` |

Source: `flax.nnx.LoRA` and `LoRALinear` of flax 0.12, `qwix.LoraProvider` of qwix 0.1.8, peft 0.21.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from daq_jax.errors import DaqError, refuse
from daq_jax.numerics.arithmetic import is_finite, is_staged
from daq_jax.numerics.sharding import run_sharded, sharding_of
from daq_jax.qtensor import FLOATS, QTensor, as_array, codes_of
from daq_jax.trees import PyTree, is_concrete, named_leaves, unreadable, with_leaves

_NAMED = 8  # weights that a message names

_NNX = re.compile(r"^(?P<parent>.*/)?lora_(?P<side>[ab])$")
_QWIX = re.compile(r"^(?P<weight>.+)_lora_(?P<side>[ab])$")
_PEFT = re.compile(r"^(base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")

Scale = float | ArrayLike  # of a product, or one for each layer of a stack


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two factors: their paths in the adapter, and the paths of the weight that they may belong to."""

    a: str
    b: str
    weights: tuple[str, ...]
    kind: str


def merge(
    base: PyTree,
    adapter: PyTree,
    *,
    scale: Scale | Mapping[str, Scale] | None = None,
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> tuple[PyTree, PyTree]:
    """The weights before and after tuning, of a base and a LoRA adapter: `quantize(*merge(base, adapter))`.

    Weights that the adapter changes are float32 in both trees: the base's exactly, and the base's plus
    `scale * a b`. So the change is not rounded to bfloat16. All other leaves are those of the base. If
    the base has pairs of its own, as a model with LoRA layers has, their second factors are 0 in both trees.

    Args:
        base: weights before tuning; a QTensor stands for what it dequantizes to in float32.
        adapter: LoRA pairs by the names of Flax NNX, qwix and Tunix, or PEFT (table above); all leaves of the
            tuned model, or the pairs alone. Any other leaf of it replaces the leaf of `base` at its path.
        scale: factor of the products, `alpha / rank`: a number or an array `[]`, which may be traced; of
            weights that are stacks also an array `[L]`, or more of the first axes of the stack, with a factor
            for each layer. Or such factors by pattern of the weight's path, of which the first that is found
            in it counts (`jit` sorts the patterns of a dict that is its argument). None for Flax NNX, whose
            layers have none.
        inputs: axes of a weight that its first factor has, by pattern of its path. Needed where shapes do not
            tell, as those of a stack of square matrices.

    Returns:
        `(base, tuned)`, in the structure of `base`.

    Raises:
        DaqError: naming each leaf of the adapter that has no partner, that does not fit its weight, or that
            lacks a scale or has one of a wrong shape; each leaf that is not of floats; a scale that is not
            finite and real; and each pattern of `scale` or `inputs` that is found in no path of `base`.

    >>> base = {"q": {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}}
    >>> pair = {"q": {"kernel_lora_a": jnp.ones((2, 1)), "kernel_lora_b": jnp.ones((1, 3))}}
    >>> merge(base, pair, scale=2.0)[1]["q"]["kernel"][0]
    Array([2., 2., 2.], dtype=float32)
    """
    before, given = named_leaves(base), named_leaves(adapter)
    pairs, problems = _pairs(given)
    _check_scale(scale)
    tuned, wide = dict(before), dict(before)
    used = {path for pair in pairs for path in (pair.a, pair.b)}
    weights = [next((w for w in pair.weights if w in before), None) for pair in pairs]
    found = [weight for weight in weights if weight is not None]
    problems += _unused(scale, "scale", before, found) + _unused(inputs, "inputs", before, found)
    for pair, weight in zip(pairs, weights, strict=True):
        if weight is None:
            problems.append(f"{pair.a!r} belongs to no leaf of base; looked for {' and '.join(pair.weights)}")
            continue
        try:
            _check_weight(before[weight])
            for path in (pair.a, pair.b):
                _check_factor(path, given[path])
            factor = _factor(scale, weight, pair.kind)
            axes = _input_axes(inputs, weight, pair.kind)
            wide[weight], tuned[weight] = _sum(
                before[weight], given[pair.a], given[pair.b], factor, axes, pair.kind
            )
        except DaqError as error:
            problems.append(f"{weight!r}: {error}")
    for path in given.keys() - used:
        if path not in before:
            problems.append(f"{path!r} is no LoRA pair and has no partner in base")
        elif path not in {w for pair in pairs for w in pair.weights}:
            tuned[path] = given[path]
    if problems or not pairs:
        refuse("adapter does not fit base", sorted(problems) or ["it holds no LoRA pair"], _WAY_OUT)
    for path in before:
        if path in used and path.endswith(("lora_b", "lora_B.weight")):
            wide[path] = tuned[path] = jax.tree.map(jnp.zeros_like, before[path])
    return with_leaves(base, list(wide.values())), with_leaves(base, list(tuned.values()))


_WAY_OUT = (
    "Pass the base that the adapter was trained on; `merge` names the forms of LoRA pairs that are read."
)


def _pairs(given: Mapping[str, Any]) -> tuple[list[_Pair], list[str]]:
    """The LoRA pairs of an adapter, and what is wrong with half ones."""
    pairs, problems = [], []
    for path in given:
        pair, side = _pair_of(path)
        if pair is None:
            continue
        missing = next((x for x in (pair.a, pair.b) if x not in given), None)
        if missing is not None:
            problems.append(f"{path!r} has no partner {missing!r}")
        elif side in "aA":
            pairs.append(pair)
    return pairs, problems


def _pair_of(path: str) -> tuple[_Pair | None, str]:
    """The pair that a path is half of, and which half it is."""
    if found := _PEFT.match(path):
        a, b = (path.replace(f".lora_{found['side']}", f".lora_{side}") for side in "AB")
        return _Pair(a, b, (f"{found['module']}.weight", f"{found['module']}"), "PEFT"), found["side"]
    start = path[: -len("a")]
    if found := _NNX.match(path):
        parent = found["parent"] or ""
        outer = parent.removesuffix("lora/")
        weights = (f"{parent}kernel", f"{parent}base_module/kernel", f"{outer}kernel")
        return _Pair(f"{start}a", f"{start}b", tuple(dict.fromkeys(weights)), "NNX"), found["side"]
    if found := _QWIX.match(path):
        return _Pair(f"{start}a", f"{start}b", (found["weight"],), "qwix"), found["side"]
    return None, ""


def _check_scale(scale: Any) -> None:
    """Raises DaqError unless a scale, or each value of one by patterns, is of finite real numbers or None."""
    named = {f"scale[{p!r}]": x for p, x in scale.items()} if isinstance(scale, Mapping) else {"scale": scale}
    for name, value in named.items():
        if value is not None and not _is_scale(value):
            raise DaqError(f"{name} is {value!r}; needed finite real numbers, alpha / rank.")


def _is_scale(value: Any) -> bool:
    """Whether a value, unless it is traced, is one real number that is finite, or an array of them."""
    if isinstance(value, jax.Array) and not is_concrete(value):
        return jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    found = np.asarray(value)
    if found.dtype.kind not in "iuf" and not jnp.issubdtype(found.dtype, jnp.floating):
        return False
    return bool(np.all(np.isfinite(found.astype(np.float64))))


def _unused(patterns: Any, argument: str, paths: Collection[str], weights: Sequence[str]) -> list[str]:
    """One problem for each pattern of an argument that is found in no path of the base."""
    if not isinstance(patterns, Mapping) or not weights:
        return []
    shown = ", ".join(weights[:_NAMED]) + (f" and {len(weights) - _NAMED} more" if weights[_NAMED:] else "")
    problems = []
    for pattern in patterns:
        try:
            if not any(re.search(pattern, path) for path in paths):
                problems.append(
                    f"{argument}: {pattern!r} is found in no path of base; the weights with pairs are {shown}"
                )
        except (re.error, TypeError) as error:
            raise DaqError(f"{argument}: {pattern!r} is not a regular expression: {error}.") from error
    return problems


def _check_weight(x: Any) -> None:
    """Raises DaqError unless a leaf of the base is a weight in floats."""
    if isinstance(x, QTensor):
        return
    if why := unreadable(x):
        raise DaqError(f"it is {why}")
    found = str(x.dtype) if hasattr(x, "dtype") else f"a {type(x).__name__}"
    if found not in FLOATS:
        codes = "int" in found or "float8" in found or "float4" in found
        way = "if these are codes, dequantize them first, or pass a QTensor" if codes else "cast it first"
        raise DaqError(f"it is {found}; needed bfloat16, float16 or float32: {way}")


def _check_factor(path: str, x: Any) -> None:
    """Raises DaqError unless a factor is of floats, all of them finite."""
    if why := unreadable(x):
        raise DaqError(f"{path!r} is {why}")
    if not isinstance(x, QTensor) and not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        found = getattr(x, "dtype", f"a {type(x).__name__}")
        raise DaqError(f"{path!r} is {found}; needed floats: pass the factors as they were trained")
    if is_concrete(x) and not is_staged() and not is_finite(jnp.asarray(as_array(x))):
        raise DaqError(f"{path!r} holds NaN or infinity; every factor must be finite: mend the adapter")


def _factor(scale: Scale | Mapping[str, Scale] | None, weight: str, kind: str) -> Scale:
    found: Any = scale
    if isinstance(scale, Mapping):
        found = next((value for pattern, value in scale.items() if re.search(pattern, weight)), None)
    if found is None and kind == "NNX":
        return 1.0
    if found is None:
        raise DaqError(f"pairs of {kind} are multiplied by alpha / rank: pass scale=alpha / rank")
    return found if np.ndim(found) or isinstance(found, jax.Array) else float(found)


def _input_axes(inputs: Mapping[str, Sequence[int]] | None, weight: str, kind: str) -> tuple[int, ...] | None:
    if kind == "PEFT":
        return (1,)
    return next((tuple(axes) for pattern, axes in (inputs or {}).items() if re.search(pattern, weight)), None)


def _sum(
    weight: Any, a: Any, b: Any, scale: Scale, axes: tuple[int, ...] | None, kind: str
) -> tuple[Any, Array]:
    """A weight and its tuned one, both float32."""
    if isinstance(weight, QTensor):
        wide = dataclasses.replace(weight, dtype=jnp.dtype(jnp.float32))
    else:
        wide = jnp.asarray(weight).astype(jnp.float32)
    a, b = (jnp.asarray(as_array(x)) for x in (a, b))
    a, b = (a.T, b.T) if kind == "PEFT" else (a, b)
    equation, shapes = _equation(tuple(wide.shape), tuple(a.shape), tuple(b.shape), axes)
    scale = jnp.asarray(scale, jnp.float32)
    stacked = tuple(wide.shape[:-2]) if equation.startswith("...") else ()
    if scale.shape != stacked[: scale.ndim]:
        needed = f", or one for each layer of the stack, {stacked}" if stacked else ""
        raise DaqError(f"its scale is an array {scale.shape}; needed one number{needed}")

    def run(weight: Array, a: Array, b: Array, scale: Array) -> Array:
        a, b = (x.astype(jnp.float32).reshape(shape) for x, shape in zip((a, b), shapes, strict=True))
        change = jnp.einsum(equation, a, b, precision="highest").reshape(weight.shape)
        return weight + scale.reshape(scale.shape + (1,) * (change.ndim - scale.ndim)) * change

    sharded = run_sharded(run, sharding_of(codes_of(wide)))
    return wide, sharded(as_array(wide), a, b, scale)


_Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _equation(
    weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], axes: tuple[int, ...] | None
) -> tuple[str, _Shapes]:
    """The einsum of two factors that gives a weight, and the shapes in which it takes them."""
    names = "abcdefghijklmnopq"[: len(weight)]
    ways = []
    if len(a) + len(b) == len(weight) + 2:
        for chosen in itertools.combinations(range(len(weight)), len(a) - 1):
            rest = [i for i in range(len(weight)) if i not in chosen]
            if (*[weight[i] for i in chosen], b[0]) == a and (a[-1], *[weight[i] for i in rest]) == b:
                left, right = ("".join(names[i] for i in some) for some in (chosen, rest))
                ways.append((chosen, (f"{left}r,r{right}->{names}", (a, b))))
    elif len(a) == len(b) == len(weight) and (*a[:-1], b[-1]) == weight and (*a[:-2], a[-1]) == b[:-1]:
        ways.append((None, ("...ir,...ro->...io", (a, b))))
    elif len(a) == len(b) == 2 and a[1] == b[0]:
        for i in range(1, len(weight)):
            if (math.prod(weight[:i]), math.prod(weight[i:])) == (a[0], b[1]):
                ways.append((tuple(range(i)), ("ir,ro->io", (a, b))))
    fitting = [way for chosen, way in ways if axes is None or chosen is None or chosen == axes]
    if len(fitting) > 1 and len(weight) == 2:
        return fitting[0]  # kernels of Flax have their inputs first
    if len(fitting) != 1:
        why = (
            "in more ways than one: say which axes are inputs, inputs={pattern: axes}"
            if fitting
            else "in no way"
        )
        raise DaqError(f"factors {a} and {b} give a weight {weight} {why}")
    return fitting[0]
