"""Exported programs take and return our types, in a process that loads nothing but the core."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from tests.cases import rng_for

MAKE = """
import pathlib, sys
import jax, jax.numpy as jnp
import daq_jax as daq

def program(base, tuned, q):
    table = daq.compare(base, tuned, q)
    return q, daq.quantize(base, tuned, daq.recipes.absmax), table, table.total, table.total.to_dict()

base = {"k": jax.random.normal(jax.random.key(0), (128, 64))}
tuned = {"k": base["k"] * 1.01}
q = daq.quantize(base, tuned, daq.Recipe(format=daq.int8, tiling=daq.Channel()))
exported = jax.export.export(jax.jit(program))(base, tuned, q)
pathlib.Path(sys.argv[1]).write_bytes(exported.serialize())
assert not [m for m in sys.modules if m.partition(".")[0] == "flax" or m.startswith("daq_jax.models")]
"""

CALL = """
import pathlib, sys
import jax, numpy as np
import daq_jax as daq

base = {"k": jax.random.normal(jax.random.key(0), (128, 64))}
tuned = {"k": base["k"] * 1.01}
q = daq.quantize(base, tuned, daq.Recipe(format=daq.int8, tiling=daq.Channel()))
again = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
same, new, table, total, plain = again.call(base, tuned, q)
assert not [m for m in sys.modules if m.partition(".")[0] == "flax" or m.startswith("daq_jax.models")]
assert isinstance(table, daq.Comparison) and isinstance(total, daq.Figures)
wanted = q, daq.quantize(base, tuned, daq.recipes.absmax)
assert jax.tree.structure((same, new)) == jax.tree.structure(wanted)
jax.tree.map(np.testing.assert_array_equal, (same, new), wanted)
here = daq.compare(base, tuned, q)
assert jax.tree.structure(table) == jax.tree.structure(here)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
jax.tree.map(close, table, here)
jax.tree.map(close, total, here.total)
close(plain["projection"], here.total.projection)
"""


def test_a_program_of_our_types_is_written_in_one_process_and_called_in_another(tmp_path):
    for lines in (MAKE, CALL):
        subprocess.run([sys.executable, "-c", lines, str(tmp_path / "program")], check=True)


def test_gram_matrices_go_into_an_exported_program():
    weight = rng_for("exported grams").normal(0, 0.02, (16, 4)).astype(np.float32)
    inputs = jnp.asarray(rng_for("inputs").normal(size=(64, 16)).astype(np.float32))
    params = {"kernel": jnp.asarray(weight)}
    grams = daq.calibrate_from(lambda p, x: x @ p["kernel"], params, [inputs], 8, progress=False)
    recipe = daq.DensityRecipe(group=8, adjust=None, sweeps=1)
    program = jax.jit(lambda params, grams: daq.quantize_density(params, grams, recipe))
    again = jax.export.deserialize(jax.export.export(program)(params, grams).serialize())
    got, wanted = again.call(params, grams)["kernel"], program(params, grams)["kernel"]
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_format_of_ones_own_has_no_name_in_an_exported_program():
    own = dataclasses.replace(daq.int8, name="mine", largest=100.0)
    q = daq.quantize(jnp.ones((8, 8)), jnp.ones((8, 8)), daq.Recipe(format=own))
    exported = jax.export.export(jax.jit(lambda q: q.dequantize()))(q)
    with pytest.raises(daq.DaqError, match="none of daq_jax's own"):
        exported.serialize()
