"""A kernel of ours where a program is compiled for the GPU at hand, and plain JAX everywhere else.

Which of the two runs is decided when a program is lowered, as in `jax.lax.platform_dependent`. An exported
program never holds the kernel: it may run on another GPU, and JAX promises nothing about kernels of
another version.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

Arrays = Sequence[Array]

_MOST_ELEMENTS = 2**31 - 1  # of an array in a kernel: Pallas for Triton counts them in 32 bits
_FIRST_WITH_FP8 = 8.9  # compute capability of Ada; Hopper has 9.0


Use = Literal["where possible", "interpreted", "never"]
_use: Use = "where possible"
_taken: list[Callable[..., Any]] = []  # kernels that ran interpreted since `kernels` was entered


@contextlib.contextmanager
def kernels(use: Use) -> Iterator[list[Callable[..., Any]]]:
    """Says for a while how kernels are used; for tests and benchmarks.

    Compiled programs are forgotten on the way in and out: they hold what was chosen when they were traced.

    Args:
        use: "where possible", as always; "interpreted", as plain JAX on any machine, also where there is no
            GPU; or "never".

    Yields:
        A list that every kernel which runs interpreted is added to when it is traced.
    """
    global _use
    before, _use = _use, use
    _taken.clear()
    jax.clear_caches()
    try:
        yield _taken
    finally:
        _use = before
        jax.clear_caches()


def interpreted() -> bool:
    """Whether kernels run as plain JAX, so that they need instructions that every machine has."""
    return _use == "interpreted"


def pallas_call(kernel: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`, interpreted where `kernels` says so."""
    from jax.experimental import pallas as pl

    return pl.pallas_call(kernel, interpret=interpreted(), **options)


def may_take_kernels() -> bool:
    """Whether programs are traced with kernels of ours in them, for GPUs that have FP8 instructions."""
    return interpreted() or (_use == "where possible" and not why_no_kernels())


@functools.cache
def why_no_kernels() -> str:
    """Why kernels of ours cannot run on the local devices, as a clause; "" where they can."""
    try:
        gpus = jax.local_devices(backend="cuda")
    except RuntimeError:  # no such backend
        return "JAX has no NVIDIA GPU here"
    least = min(float(gpu.compute_capability) for gpu in gpus)
    if least < _FIRST_WITH_FP8:
        return (
            f"a GPU of compute capability {least} has no FP8 instructions, which came with {_FIRST_WITH_FP8}"
        )
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this JAX has no Pallas for Triton"
    return ""


def kernel_or_plain(kernel: Callable[..., Arrays], plain: Callable[..., Arrays], *args: Array) -> list[Array]:
    """`kernel(*args)` where this is compiled for an NVIDIA GPU, and `plain(*args)` elsewhere.

    An array, or under `vmap` a batch of them, of 2^31 elements or more is left to `plain`.

    Args:
        kernel: works on arrays of one device.
        plain: has results of the same shapes and dtypes.
        args: arrays.
    """
    if any(x.size > _MOST_ELEMENTS for x in args):
        return list(plain(*args))
    if interpreted():
        _taken.append(kernel)
        return list(kernel(*args))
    return _choice.bind(*args, kernel=kernel, plain=plain)


_choice = Primitive("kernel_or_plain")
_choice.multiple_results = True


@_choice.def_impl
def _run(*args: Any, kernel: Callable[..., Arrays], plain: Callable[..., Arrays]) -> list[Any]:
    return list(plain(*args))  # only where `jit` is switched off


@_choice.def_abstract_eval
def _shapes(*args: Any, kernel: Callable[..., Arrays], plain: Callable[..., Arrays]) -> list[ShapedArray]:
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    return [ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(plain, *like)]


def _lower_plain(ctx: Any, *args: Any, kernel: Callable[..., Arrays], plain: Callable[..., Arrays]) -> Any:
    return mlir.lower_fun(lambda *xs: list(plain(*xs)), multiple_results=True)(ctx, *args)


def _lower_cuda(ctx: Any, *args: Any, kernel: Callable[..., Arrays], plain: Callable[..., Arrays]) -> Any:
    exported = ctx.module_context.lowering_parameters.for_export
    return _lower_plain(ctx, *args, kernel=kernel, plain=plain if exported else kernel)


mlir.register_lowering(_choice, _lower_plain)
mlir.register_lowering(_choice, _lower_cuda, platform="cuda")


def _batched(
    args: Arrays, axes: Sequence[int | None], *, kernel: Callable[..., Arrays], plain: Callable[..., Arrays]
) -> tuple[list[Array], list[int]]:
    kernel, plain = (jax.vmap(f, tuple(axes)) for f in (kernel, plain))
    results = kernel_or_plain(kernel, plain, *args)
    return results, [0] * len(results)


batching.primitive_batchers[_choice] = _batched
