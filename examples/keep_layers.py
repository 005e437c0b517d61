"""Choose layer by layer: keep some leaves as they are, give others a recipe or a layout of their own."""

import jax

import daq_jax as daq

shapes = {
    "embed": {"embedding": (512, 256)},  # kept by the default rules, as norms, biases and output heads are
    "layer_0": {"attention": {"out": {"kernel": (4, 64, 256)}}, "mlp": {"kernel": (256, 512)}},
    "layer_1": {"attention": {"out": {"kernel": (4, 64, 256)}}, "mlp": {"kernel": (256, 512)}},
    "from_torch": {"weight": (512, 256)},  # [out, in]
}
base = jax.tree.map(
    lambda shape: jax.random.normal(jax.random.key(0), shape), shapes, is_leaf=lambda x: type(x) is tuple
)
tuned = jax.tree.map(lambda w: w + 0.02 * jax.random.normal(jax.random.key(1), w.shape), base)

rules = [
    daq.keep("^layer_0/mlp"),  # the first rule found in a leaf's path decides
    daq.use("mlp", daq.Recipe(format=daq.int8, tiling=daq.Channel())),
    daq.use("from_torch", matrix=((1,), (0,))),  # its input axis is 1, its output axis 0
    *daq.DEFAULT_RULES,  # for all other leaves
]
q = daq.quantize(base, tuned, daq.recipes.absmax, rules=rules)

leaves = jax.tree_util.tree_leaves_with_path(q, is_leaf=lambda x: isinstance(x, daq.QTensor))
for path, leaf in leaves:
    how = f"{leaf.format.name}, {leaf.tiling}" if isinstance(leaf, daq.QTensor) else "kept"
    print(f"{jax.tree_util.keystr(path, simple=True, separator='/'):30} {leaf.shape!s:15} {how}")
