"""Keeping the sharding of a weight through reshapes.

Cutting a weight into tiles reshapes it, which JAX refuses for an array whose mesh axes are Explicit: there
the caller states every sharding. Codes are sharded like their weight and scales like their tiles, so only the
results need a statement, and the reshapes in between are left to the compiler (mesh axes Auto).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def sharding_of(x: Any) -> NamedSharding | None:
    """The sharding of an array over a mesh; None if it has none, or is traced over Auto mesh axes."""
    traced = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return None if traced and not _is_explicit(sharding) else sharding


def _is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def is_explicit(x: Any) -> bool:
    """Whether an array lies on a mesh with Explicit axes, where the caller states every sharding."""
    sharding = sharding_of(x)
    return sharding is not None and _is_explicit(sharding)


def run_sharded(function: Callable[..., Any], out: Any) -> Callable[..., Any]:
    """`function`, with its result sharded as `out` says and everything inside left to the compiler.

    Args:
        function: of arrays.
        out: a tree of `NamedSharding` for the result, or of None to leave the result to the compiler too.
    """
    leaves = [s for s in jax.tree.leaves(out) if isinstance(s, NamedSharding)]
    if not leaves:
        return function
    if any(_is_explicit(s) for s in leaves):
        return jax.sharding.auto_axes(function, out_sharding=out)
    return lambda *args: jax.lax.with_sharding_constraint(function(*args), out)


def resharded(x: Any, sharding: NamedSharding | None) -> Any:
    """An array under another sharding, inside what `run_sharded` runs; as it is for None."""
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.spec if _is_explicit(sharding) else sharding)


def on_each_device(
    function: Callable[..., Any], inside: Sequence[NamedSharding | None], out: Sequence[NamedSharding]
) -> Callable[..., Any]:
    """`function`, called on each device with the shards of that device: no device waits for another.

    Args:
        function: of arrays, to a tuple of arrays.
        inside: the sharding of each argument; None where it is replicated, or is None.
        out: the sharding of each result.
    """

    def spec(sharding: NamedSharding | None) -> PartitionSpec:
        return PartitionSpec() if sharding is None else sharding.spec

    return jax.shard_map(
        function,
        mesh=None if _is_explicit(out[0]) else out[0].mesh,  # None: that which `run_sharded` has set
        in_specs=tuple(map(spec, inside)),
        out_specs=tuple(map(spec, out)),
        check_vma=False,
    )


def committed_sharding(x: Any) -> Sharding | None:
    """The sharding that an array is committed to; None for NumPy, traced and uncommitted arrays."""
    bound = isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed
    return x.sharding if bound else None


def lie_apart(a: Sharding | None, b: Sharding | None) -> bool:
    """Whether two arrays are on other devices, or on two meshes: not every program can take both."""
    if isinstance(a, NamedSharding) and isinstance(b, NamedSharding):
        return a.mesh != b.mesh
    return a is not None and b is not None and a.device_set != b.device_set


def place_of(sharding: Sharding | None) -> str:
    """The devices of a sharding, for messages."""
    if isinstance(sharding, NamedSharding):
        ids = [d.id for d in sharding.mesh.devices.flat]  # pyright: ignore[reportOptionalMemberAccess]
        return f"{sharding.mesh} of devices {ids}"
    return "no device" if sharding is None else ", ".join(map(str, sharding.device_set))
