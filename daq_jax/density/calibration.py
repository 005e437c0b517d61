"""Calibration: run a model over some data and keep the Gram matrix of each kernel's inputs.

The model is traced to a jaxpr, and the jaxpr is evaluated equation by equation. Where an equation contracts
an array with one of the params, which may have been transposed or cast before, the array holds the inputs of
that kernel. So this module knows nothing of layers: Linen, NNX and functions of your own are all treated
alike. Kernels inside `jax.lax.scan`, loops and branches are not found, nor are kernels with a batch axis
(experts).

Letters: `M` input vectors, `R` inputs, `N` groups of `n` inputs.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from daq_jax.density.grams import Grams, KernelInputs
from daq_jax.errors import DaqError
from daq_jax.numerics.sharding import run_sharded, sharding_of
from daq_jax.recipe import Recipe
from daq_jax.rules import DEFAULT_RULES, Rule, decide_all, views_by_type
from daq_jax.trees import PyTree, named_leaves


def calibrate(
    model: linen.Module | nnx.Module,
    params: PyTree,
    batches: Iterable[Any],
    group: int | None = 128,
    *,
    joint: bool = False,
    rules: Sequence[Rule] = DEFAULT_RULES,
    one_at_a_time: bool = False,
    progress: bool = True,
) -> Grams:
    """Gram matrices of the inputs of a Flax model's kernels, in one pass over some batches.

    Args:
        model: a Linen module, or an NNX module in the state in which it is to run.
        params: weights of the model. For Linen, its collection "params" or the whole dict of collections; for
            NNX, `nnx.state(model, nnx.Param)`. Paths in the result are those of this tree.
        batches: each is for one call of the model: an array, a tuple of positional arguments, or a dict of
            keyword arguments. Leave padding out: every position counts alike. 1024 tokens are enough for most
            layers.
        group: inputs of a group, as in `DensityRecipe`; None for one group of all inputs.
        joint: keep the products between groups too, for `DensityRecipe(loss="row")`.
        rules: which leaves will be quantized, as in `quantize`; only their inputs are looked at.
        one_at_a_time: hold the matrices of one kernel at a time. Each kernel then costs one pass over the
            batches, made when it is quantized, and `batches` must be a list or another reusable iterable.
        progress: show a bar, if there is a terminal.

    Returns:
        Gram matrices by path, for `quantize_density`.

    Raises:
        DaqError: if there are no batches, or `one_at_a_time` with an iterator.

    >>> import flax.linen as nn
    >>> model, batch = nn.Dense(8), jax.numpy.ones((4, 16))
    >>> params = model.init(jax.random.key(0), batch)["params"]
    >>> calibrate(model, params, [batch], progress=False).products["kernel"].shape
    (1, 16, 16)
    """
    options = {"joint": joint, "rules": rules, "one_at_a_time": one_at_a_time, "progress": progress}
    if isinstance(model, nnx.Module):
        graph, _, rest = nnx.split(model, nnx.Param, ...)

        def merged(params: PyTree, batch: Any) -> Any:
            return _call(nnx.merge(graph, params, rest, copy=True), batch)  # a call may change its state

        return calibrate_from(merged, params, batches, group, **options)
    whole = isinstance(params, Mapping) and "params" in params

    def apply(params: PyTree, batch: Any) -> Any:
        variables = params if whole else {"params": params}
        return _call(functools.partial(model.apply, variables), batch)

    return calibrate_from(apply, params, batches, group, **options)


def _call(function: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)


def calibrate_from(
    apply: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    group: int | None = 128,
    *,
    joint: bool = False,
    rules: Sequence[Rule] = DEFAULT_RULES,
    one_at_a_time: bool = False,
    progress: bool = True,
) -> Grams:
    """Gram matrices of the inputs of a model's kernels, for any function of params and a batch.

    Args:
        apply: the model, `(params, batch) -> anything`, traceable by JAX.
        params: weights of the model. Paths in the result are those of this tree.
        batches: each is the second argument of one call of `apply`. Leave padding out: every position counts
            alike.
        group: inputs of a group, as in `DensityRecipe`; None for one group of all inputs.
        joint: keep the products between groups too, for `DensityRecipe(loss="row")`.
        rules: which leaves will be quantized, as in `quantize`; only their inputs are looked at.
        one_at_a_time: hold the matrices of one kernel at a time. Each kernel then costs one pass over the
            batches, made when it is quantized, and `batches` must be a list or another reusable iterable.
        progress: show a bar, if there is a terminal.

    Returns:
        Gram matrices by path, for `quantize_density`.

    Raises:
        DaqError: if there are no batches, or `one_at_a_time` with an iterator.

    >>> apply = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
    >>> params = {"up": jax.numpy.ones((6, 4)), "down": jax.numpy.ones((4, 6))}
    >>> grams = calibrate_from(apply, params, [jax.numpy.ones((3, 6))], 2, progress=False)
    >>> grams.products["up"].shape, grams.products["down"].shape
    ((3, 2, 2), (2, 2, 2))
    """
    if one_at_a_time and iter(batches) is batches:
        raise DaqError("`one_at_a_time` goes through `batches` once for each kernel: pass a list of them.")
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise DaqError("there are no batches to calibrate with.")
    watch = _Watch(apply, _paths(params, rules), group, joint)
    kernels = watch.kernels(params, first)
    if one_at_a_time:
        products: Mapping[str, Array] = _OneAtATime(watch, params, batches, [k.path for k in kernels])
    else:
        total = len(batches) if isinstance(batches, Sized) else None
        every = _with_bar(itertools.chain([first], remaining), total) if progress else (first, *remaining)
        products = watch.mean(params, every)
    return Grams(products, kernels, group, joint)


def _with_bar(batches: Iterable[Any], total: int | None) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, "Calibrating", total, console=console, disable=not console.is_terminal)


def _paths(params: PyTree, rules: Sequence[Rule]) -> list[str | None]:
    """For each leaf of params its path, or None if it is not to be quantized."""
    decisions = decide_all(named_leaves(params), rules, Recipe(), views_by_type(params))
    return [path if how.quantize else None for path, how in decisions.items()]


@dataclasses.dataclass(frozen=True)
class _Watch:
    """A model, and what is to be kept of the inputs of its kernels."""

    apply: Callable[[PyTree, Any], Any]
    paths: list[str | None]
    group: int | None
    joint: bool

    def kernels(self, params: PyTree, batch: Any) -> tuple[KernelInputs, ...]:
        """How the model contracts its inputs with each kernel."""
        seen: dict[str, _Seen] = {}
        jax.eval_shape(lambda params, batch: self._run(params, batch, seen), params, batch)
        return tuple(KernelInputs(path, x.axes, x.size) for path, x in seen.items())

    def mean(self, params: PyTree, batches: Iterable[Any], only: str | None = None) -> dict[str, Array]:
        """Gram matrices by path, means over the batches; of one kernel alone if `only` names its path."""

        @jax.jit
        def sums(params: PyTree, batch: Any) -> dict[str, tuple[Array, Array]]:
            seen: dict[str, _Seen] = {}
            self._run(params, batch, seen, only)
            return {path: (x.gram, jnp.float32(x.count)) for path, x in seen.items()}

        total = None
        for batch in batches:
            new = sums(params, batch)
            total = new if total is None else _add(total, new)
        return {path: gram / count for path, (gram, count) in (total or {}).items()}

    def _run(self, params: PyTree, batch: Any, seen: "dict[str, _Seen]", only: str | None = None) -> None:
        program = jax.make_jaxpr(self.apply)(params, batch)
        leaves = jax.tree.leaves(params)
        kernels = [
            _Kernel(path, tuple(range(x.ndim))) if path is not None and only in (None, path) else None
            for path, x in zip(self.paths, leaves, strict=True)
        ]
        inputs = [*leaves, *jax.tree.leaves(batch)]
        kernels += [None] * (len(inputs) - len(leaves))

        def notice(kernel: _Kernel, contracted: Sequence[int], x: Array, x_axes: Sequence[int]) -> None:
            by_axis = sorted(zip((kernel.axes[i] for i in contracted), x_axes, strict=True))
            axes, last = (tuple(column) for column in zip(*by_axis, strict=True))
            size, rest = math.prod(x.shape[i] for i in last), [i for i in range(x.ndim) if i not in last]

            def gram(x: Array) -> Array:
                vectors = x.transpose(*rest, *last).reshape(-1, size)
                return gram_of(vectors.astype(jnp.float32), self.group, joint=self.joint)

            where = sharding_of(x)
            whole = None if where is None else NamedSharding(where.mesh, PartitionSpec())
            new = _Seen(axes, size, run_sharded(gram, whole)(x), math.prod(x.shape[i] for i in rest))
            old = seen.get(kernel.path)
            seen[kernel.path] = new if old is None else old.plus(new)

        _interpret(program.jaxpr, program.consts, inputs, kernels, notice)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, new: Any) -> Any:
    return jax.tree.map(jnp.add, total, new)


def gram_of(x: Float[Array, "M R"], group: int | None, *, joint: bool) -> Float[Array, "..."]:
    """Sum of `x x'` over the vectors: `[N, n, n]`, one matrix for each group, or `[R, R]` if `joint`."""
    size = x.shape[1]
    if joint:
        return jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)
    n = min(group or size, size)
    count = -(-size // n)
    x = jnp.pad(x, [(0, 0), (0, count * n - size)]).reshape(-1, count, n)
    return jnp.einsum("mgi,mgj->gij", x, x, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Sums over the inputs of one kernel: the axes contracted, their size, `x x'` and the number of `x`."""

    axes: tuple[int, ...]
    size: int
    gram: Array
    count: int

    def plus(self, other: "_Seen") -> "_Seen":
        """The sums of two uses of one kernel, which must contract the same axes."""
        if self.axes != other.axes:
            raise DaqError(f"a kernel is contracted over axes {self.axes} and also {other.axes}.")
        return dataclasses.replace(self, gram=self.gram + other.gram, count=self.count + other.count)


class _OneAtATime(Mapping[str, Array]):
    """Gram matrices by path, each made by a pass over the batches when it is asked for, and not kept."""

    def __init__(self, watch: _Watch, params: PyTree, batches: Iterable[Any], paths: Sequence[str]) -> None:
        self._watch, self._params, self._batches, self._paths = watch, params, batches, paths

    def __getitem__(self, path: str) -> Array:
        return self._watch.mean(self._params, self._batches, only=path)[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class _Kernel(NamedTuple):
    """A param, or a transposed or cast copy of it: `axes` is the param's axis of each axis of the copy."""

    path: str
    axes: tuple[int, ...]


Notice = Callable[[_Kernel, Sequence[int], Array, Sequence[int]], None]
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # where a call keeps its program
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call"}
_CASTS = {"convert_element_type", "copy", "stop_gradient", "reduce_precision"}
_CASTS |= {"sharding_constraint", "reshard"}


def _interpret(
    program: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Any],
    kernels: Sequence[_Kernel | None],
    notice: Notice,
) -> tuple[list[Any], list[_Kernel | None]]:
    """Runs a program, and calls `notice` wherever it contracts an array with a kernel.

    Args:
        program: its equations are run one by one, those of the calls in it too.
        consts, inputs: its values.
        kernels: for each input, the kernel that it is, or None.
        notice: told the kernel, its contracted axes, the array, and the array's contracted axes.
    """
    values: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    values |= dict(zip(program.invars, inputs, strict=True))
    known = {var: k for var, k in zip(program.invars, kernels, strict=True) if k is not None}

    def value(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    def kernel(var: Any) -> _Kernel | None:
        return None if isinstance(var, core.Literal) else known.get(var)

    for eqn in program.eqns:
        name, given, of = eqn.primitive.name, [*map(value, eqn.invars)], [*map(kernel, eqn.invars)]
        made: Sequence[_Kernel | None] = [None] * len(eqn.outvars)
        inner = next((eqn.params[key] for key in _INNER if key in eqn.params), None)
        if name in _CALLS and any(of) and inner is not None:
            closed = isinstance(inner, core.ClosedJaxpr)
            body, inner_consts = (inner.jaxpr, inner.consts) if closed else (inner, [])
            results, made = _interpret(body, inner_consts, given, of, notice)
        else:
            if name == "dot_general" and (of[0] is None) != (of[1] is None):
                contracting, batch = eqn.params["dimension_numbers"]
                for k, found in enumerate(of):
                    if found is not None and not batch[k]:
                        notice(found, contracting[k], given[1 - k], contracting[1 - k])
            with eqn.ctx.manager:
                results = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
            if name in _CASTS:
                made = of[:1]
            elif name == "transpose" and of[0] is not None:
                made = [of[0]._replace(axes=tuple(of[0].axes[i] for i in eqn.params["permutation"]))]
        values |= dict(zip(eqn.outvars, results, strict=True))
        known |= {var: k for var, k in zip(eqn.outvars, made, strict=True) if k is not None}
    return [*map(value, program.outvars)], [*map(kernel, program.outvars)]
