"""Which axes of its weights a program contracts, read off its jaxpr.

The jaxpr is walked without running it. An array depends on the data that the program is called with, or it is
a weight: cast, transposed, reshaped, sliced or scaled. In a product of data and a weight, the contracted axes
of the weight are its inputs, and the axes that the weight alone gives to the result are its outputs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from daq_jax.tilings import Matrix

INPUT, OUTPUT, LOOKED_UP, ELEMENTWISE, UNCLEAR = "input", "output", "looked up", "elementwise", "unclear"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight, or what became of it.

    Attributes:
        path: path of the weight.
        axes: for each axis of the array the axes of the weight that it runs over, and the length of each:
            several where a reshape merged axes, none where the axis is new.
    """

    path: str
    axes: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def whole(cls, path: str, shape: Sequence[int]) -> "Weight":
        """A weight as it is."""
        return cls(path, tuple(((axis, n),) if n > 1 else () for axis, n in enumerate(shape)))

    def pick(self, order: Sequence[int | None]) -> "Weight":
        """The same with these axes of the array, None for a new one."""
        return Weight(self.path, tuple(() if i is None else self.axes[i] for i in order))

    def reshaped(self, shape: Sequence[int]) -> "Weight | None":
        """The same in another shape; None where an axis is cut in a way that cannot be followed."""
        atoms = [atom for axis in self.axes for atom in axis]
        if math.prod(n for _, n in atoms) != math.prod(shape):
            return None  # part of it is new, or was sliced away
        axes = []
        for size in shape:
            inside: list[tuple[int, int]] = []
            while size > 1:
                axis, n = atoms.pop(0)
                taken = math.gcd(n, size)
                if taken == 1 or (taken < n and taken < size):
                    return None
                inside.append((axis, taken))
                size //= taken
                if taken < n:
                    atoms.insert(0, (axis, n // taken))
            axes.append(tuple(inside))
        return Weight(self.path, tuple(axes))


class Contractions:
    """What a program does with each axis of each of its weights.

    Attributes:
        uses: of each weight, by path: the roles of its axes in a product, or another use in a word.
        captured: types of the arrays in products that are neither weights nor data, but constants of the
            program, as `float32 (8, 4)`.
    """

    def __init__(self) -> None:
        self.uses: dict[str, set[tuple[tuple[int, str], ...] | str]] = {}
        self.captured: set[str] = set()

    def note(self, weight: Weight, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Data is multiplied by a weight, over some axes of the array and in step with others."""
        roles: dict[int, str] = {}
        for i, inside in enumerate(weight.axes):
            role = INPUT if i in contracted else "" if i in batch else OUTPUT
            for axis, _ in inside:
                if roles.setdefault(axis, role) != role:
                    return self.say(weight, UNCLEAR)
        self.uses.setdefault(weight.path, set()).add(tuple(sorted((a, r) for a, r in roles.items() if r)))

    def say(self, weight: Weight, how: str) -> None:
        """A weight is used in another way."""
        self.uses.setdefault(weight.path, set()).add(how)

    def matrix_of(self, path: str, ndim: int) -> Matrix | str:
        """The view of a weight, axes counted from the end; or why it has none, in a word."""
        uses = self.uses.get(path, set())
        products = [use for use in uses if not isinstance(use, str)]
        words = [use for use in uses if isinstance(use, str)]
        if len(products) > 1 or (products and set(words) & {LOOKED_UP, UNCLEAR}):
            return "used in several ways"
        if not products:
            return words[0] if words else "not used"
        rows, columns = (
            tuple(axis - ndim for axis, role in products[0] if role == wanted) for wanted in (INPUT, OUTPUT)
        )
        return (rows, columns) if rows and columns else "a vector"


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array of the program: whether it depends on data, the weights that it may be, and its constants."""

    is_data: bool = False
    weights: tuple[Weight, ...] = ()
    captured: frozenset[str] = frozenset()


_SAME = {"convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint"}
_SAME |= {"optimization_barrier", "reshard", "neg", "rev", "device_put", "name"}
_CUT = {"slice", "dynamic_slice", "split", "gather"}
_WITH_OTHERS = {"mul", "div", "add", "sub", "select_n", "max", "min", "add_any"}
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def walk(program: core.Jaxpr, values: Sequence[_Value], found: Contractions) -> list[_Value]:
    """Follows weights through a program, notes every product, and returns what the results are."""
    known: dict[Any, _Value] = {var: _constant(var) for var in program.constvars}
    known |= zip(program.invars, values, strict=True)

    def of(var: Any) -> _Value:
        return _Value() if isinstance(var, core.Literal) else known.get(var, _Value())

    for eqn in program.eqns:
        given = [of(var) for var in eqn.invars]
        known |= zip(eqn.outvars, _results(eqn, given, found), strict=True)
    return [of(var) for var in program.outvars]


def start(paths: Sequence[str | None], shapes: Sequence[Sequence[int]]) -> list[_Value]:
    """The inputs of a program: weights with a path, data without."""
    return [
        _Value(True) if path is None else _Value(False, (Weight.whole(path, shape),))
        for path, shape in zip(paths, shapes, strict=True)
    ]


def _constant(var: Any) -> _Value:
    """A constant of a program; one number scales and is no weight."""
    shape, dtype = var.aval.shape, var.aval.dtype
    is_array = shape and jnp.issubdtype(dtype, jnp.floating)
    return _Value(captured=frozenset([f"{dtype} {shape}"] if is_array else []))


def _results(eqn: Any, given: list[_Value], found: Contractions) -> list[_Value]:
    name = eqn.primitive.name
    if name in ("scan", "while", "cond"):
        return {"scan": _scan, "while": _while, "cond": _cond}[name](eqn, given, found)
    inner = next((eqn.params[key] for key in _INNER if key in eqn.params), None)
    body: Any = getattr(inner, "jaxpr", inner)
    if hasattr(body, "eqns") and len(body.invars) == len(given):  # a call of any kind
        return walk(body, given, found)
    is_data = any(value.is_data for value in given)
    weights = _followed(eqn, name, given, found)
    captured = frozenset[str]().union(*(value.captured for value in given if not (is_data or weights)))
    return [_Value(is_data and not weights, weights, captured) for _ in eqn.outvars]


def _followed(eqn: Any, name: str, given: list[_Value], found: Contractions) -> tuple[Weight, ...]:
    """The weights that the result of an operation is, after noting what the operation does with them."""
    shape = eqn.outvars[0].aval.shape if eqn.outvars else ()
    first = given[0].weights if given else ()
    if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
        _product(eqn, name, given, found)
        return ()
    if name in _SAME:
        return first
    if name == "transpose":
        return tuple(w.pick(eqn.params["permutation"]) for w in first)
    if name == "squeeze":
        gone = eqn.params["dimensions"]
        return tuple(w.pick([i for i in range(len(w.axes)) if i not in gone]) for w in first)
    if name == "broadcast_in_dim":
        places = {place: i for i, place in enumerate(eqn.params["broadcast_dimensions"])}
        return tuple(w.pick([places.get(i) for i in range(len(shape))]) for w in first)
    if name == "reshape":
        return tuple(x for w in first if (x := w.reshaped(shape)))
    if name in _CUT:
        return _cut(eqn, name, given, found)
    if name == "concatenate":
        return tuple(w for value in given for w in value.weights)
    if name in _WITH_OTHERS:
        return _mixed(given, len(shape), found)
    for weight in (w for value in given for w in value.weights):
        found.say(weight, ELEMENTWISE)
    return ()


def _product(eqn: Any, name: str, given: list[_Value], found: Contractions) -> None:
    for k, value in enumerate(given[:2]):
        other = given[1 - k]
        if other.is_data or other.weights:
            found.captured |= value.captured
        if not other.is_data:
            continue  # a product of weights: of the pair of an adapter, for example
        for weight in value.weights:
            if name == "conv_general_dilated":
                _, *inputs = eqn.params["dimension_numbers"].rhs_spec
                single = eqn.params["feature_group_count"] > 1 and not weight.axes[inputs[0]]
                found.say(weight, ELEMENTWISE) if single else found.note(weight, inputs, ())
                continue
            groups: tuple[int, ...] = ()
            if name == "ragged_dot_general":
                numbers = eqn.params["ragged_dot_dimension_numbers"]
                contracting, batch = numbers.dot_dimension_numbers
                groups = tuple(numbers.rhs_group_dimensions) if k == 1 else ()
            else:
                contracting, batch = eqn.params["dimension_numbers"]
            found.note(weight, contracting[k], (*batch[k], *groups))


def _cut(eqn: Any, name: str, given: list[_Value], found: Contractions) -> tuple[Weight, ...]:
    """A part of a weight: an axis that is cut to length 1 is one along which weights are stacked."""
    shape = eqn.outvars[0].aval.shape
    if name == "gather":
        numbers = eqn.params["dimension_numbers"]
        collapsed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        sizes, left = eqn.params["slice_sizes"], []
        for weight in given[0].weights:
            rest = [i for i in range(len(sizes)) if i not in collapsed]
            if sum(bool(axis) for axis in weight.axes) < 3 or any(
                sizes[i] != math.prod(n for _, n in weight.axes[i]) for i in rest
            ):
                found.say(weight, LOOKED_UP)
            else:
                places = dict(zip(numbers.offset_dims, rest, strict=True))
                left.append(weight.pick([places.get(i) for i in range(len(shape))]))
        return tuple(left)
    left = []
    for weight in given[0].weights:
        axes = list(weight.axes)
        for i, n in enumerate(shape):
            if n != eqn.invars[0].aval.shape[i]:
                axes[i] = () if n == 1 else ((axes[i][0][0], n),) if len(axes[i]) == 1 else axes[i]
        left.append(Weight(weight.path, tuple(axes)))
    return tuple(left)


def _mixed(given: list[_Value], ndim: int, found: Contractions) -> tuple[Weight, ...]:
    """A weight with numbers or other weights, element by element; with data it is no weight any more."""
    weights = [w for value in given for w in value.weights]
    if any(value.is_data for value in given):
        for weight in weights:
            found.say(weight, ELEMENTWISE)
        return ()
    most = max((sum(bool(axis) for axis in w.axes) for w in weights), default=0)
    return tuple(w for w in weights if sum(bool(axis) for axis in w.axes) == most and len(w.axes) == ndim)


def _scan(eqn: Any, given: list[_Value], found: Contractions) -> list[_Value]:
    consts, carry = _sizes_of_scan(eqn.params)
    inside = [*given[:consts], *(_Value(True) for _ in range(carry))]
    for value in given[consts + carry :]:
        sliced = tuple(w.pick(range(1, len(w.axes))) for w in value.weights)
        inside.append(_Value(value.is_data, sliced, value.captured))
    walk(eqn.params["jaxpr"].jaxpr, inside, found)
    return [_Value(True) for _ in eqn.outvars]


def _sizes_of_scan(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried."""
    if "num_consts" in params:  # as older versions of JAX have it
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def _while(eqn: Any, given: list[_Value], found: Contractions) -> list[_Value]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carried = given[first + second :]
    body = eqn.params["body_jaxpr"].jaxpr
    walk(body, [*given[first : first + second], *(_Value(not v.weights, v.weights) for v in carried)], found)
    return [_Value(True) for _ in eqn.outvars]


def _cond(eqn: Any, given: list[_Value], found: Contractions) -> list[_Value]:
    results = [walk(branch.jaxpr, given[1:], found) for branch in eqn.params["branches"]]
    return [
        _Value(given[0].is_data or any(v.is_data for v in column)) for column in zip(*results, strict=True)
    ]
