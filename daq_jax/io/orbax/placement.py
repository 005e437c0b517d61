"""On which devices the leaves of a tree go when they are read from files."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from daq_jax.errors import DaqError
from daq_jax.qtensor import QTensor
from daq_jax.trees import named_leaves

Place = Callable[[str, tuple[int, ...]], Sharding]  # of a leaf's path and shape


def placement(sharding: Any, template: Mapping[str, Any]) -> Place:
    """The sharding of each leaf; for a QTensor, the sharding of its codes.

    Args:
        sharding: one `Sharding`, replicated over its mesh where it does not fit; a tree of them with the
            paths of the leaves; a function of path and shape; or None, for what the template says or, without
            that, where JAX puts new arrays: with several processes, on all devices.
        template: leaves by path, whose shardings count where `sharding` is None.

    Raises:
        DaqError: from the function returned, for a leaf that a tree of shardings lacks.
    """
    if isinstance(sharding, Sharding):
        return lambda path, shape: sharding if _fits(sharding, shape) else _replicated(sharding)
    if callable(sharding):
        return sharding  # pyright: ignore[reportReturnType]
    if sharding is not None:
        return _from_tree(sharding)
    return lambda path, shape: _sharding_of(template.get(path)) or _default()


def _from_tree(tree: Any) -> Place:
    known = {path: _sharding_of(x) or x for path, x in named_leaves(tree).items()}

    def place(path: str, shape: tuple[int, ...]) -> Sharding:
        if not isinstance(known.get(path), Sharding):
            raise DaqError(f"`sharding` has no sharding for the leaf {path!r}; give one for every leaf.")
        return known[path]

    return place


def _sharding_of(x: Any) -> Any:
    x = x.codes if isinstance(x, QTensor) else x
    return x if isinstance(x, Sharding) else getattr(x, "sharding", None)


def _fits(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def _replicated(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _default() -> Sharding:
    if jax.process_count() == 1:
        return jnp.zeros(()).sharding
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
