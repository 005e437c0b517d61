"""Penzai: linear layers with named axes, whose axes `rules_for` reads from one trace."""

import jax
from penzai import pz

import daq_jax as daq
from benchmarks.jax_libraries.check import TOKENS, Case, filled

PACKAGE = "penzai"


def layer():
    keys = jax.random.split(jax.random.key(0), 2)
    model = pz.nn.Sequential(
        [
            pz.nn.Linear.from_config("into", keys[0], {"embed": 24}, {"heads": 6, "head": 8}),
            pz.nn.Elementwise(jax.nn.gelu),
            pz.nn.Linear.from_config("out", keys[1], {"heads": 6, "head": 8}, {"embed": 24}),
        ]
    )
    unbound, variables = pz.unbind_params(model, freeze=True)
    structure = {value.label: value for value in variables}
    weights = {label: value.value.data_array for label, value in structure.items()}
    x = jax.random.normal(jax.random.key(5), (TOKENS, 24))

    def run(weights, data):
        arrays = {label: daq.dequantize(leaf) for label, leaf in weights.items()}
        bound = [
            value.__class__(
                value=pz.nx.NamedArray(value.value.named_axes, arrays[label]),
                label=label,
                metadata=value.metadata,
            )
            for label, value in structure.items()
        ]
        return (
            pz.bind_variables(unbound, bound)(pz.nx.wrap(data).tag("token", "embed"))
            .untag("token", "embed")
            .unwrap()
        )

    return Case(weights, lambda weights: run(weights, x), rules=daq.rules_for(run, filled(weights), x))


MODELS = {"linear into and out of heads": layer}
