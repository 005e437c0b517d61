"""Ready sets of rules: what is kept, and the matrix views of the layers that libraries share by name."""

from daq_jax.rules.rule import Rule, keep
from daq_jax.tilings import Matrix


def _kernel(pattern: str, matrix: Matrix, ndim: int = 3) -> Rule:
    """A weight of several input or output axes; with fewer than `ndim` axes it is a plain matrix."""
    return Rule(pattern, quantize=True, matrix=matrix, ndim_at_least=ndim)


# Embeddings and output heads decide which token comes out, routers which expert is asked, and norms, biases
# and adapters are small: none is worth the risk. A norm or bias has two axes where layers are stacked.
DEFAULT_RULES: tuple[Rule, ...] = (
    keep(r"(?i)embed|(^|[./])(wte|wpe)([./]|$)"),
    keep(r"(?i)norm|(^|[./])(ln\w*|bn\w*|scale)([./]|$)"),
    keep(r"(?i)bias"),
    keep(r"(?i)(^|[./_])lora([./_]|$)"),
    keep(r"(^|[./])(\w*head|logits\w*|classifier)([./]|$)"),
    keep(r"(?i)router|(moe\w*|experts?)[./]gate([./]|$)|(^|[./])mlp\.gate\.weight$"),
    # Attention of Flax: [D, heads, hd] into the heads, [heads, hd, D] out of them.
    _kernel(r"(^|/)(query|key|value)/kernel$", ((-3,), (-2, -1))),
    _kernel(r"(^|/)out/kernel$", ((-3, -2), (-1,))),
    # Convolutions: [height, width, in, out], or [width, in, out].
    _kernel(r"(?i)conv\w*/kernel$", ((-4, -3, -2), (-1,)), ndim=4),
    _kernel(r"(?i)conv\w*/kernel$", ((-3, -2), (-1,))),
)

# MaxText stacks layers along the second axis of every weight, between the inputs and the rest.
MAXTEXT_RULES: tuple[Rule, ...] = (
    _kernel(r"(^|/)(query|key|value|wq_b|wkv_b)/kernel$", ((-4,), (-2, -1)), ndim=4),
    _kernel(r"(^|/)(query|key|value|wq_b|wkv_b)/kernel$", ((-3,), (-2, -1))),
    _kernel(r"(^|/)out/kernel$", ((-4, -2), (-1,)), ndim=4),
    _kernel(r"(^|/)(wi_0|wi_1|wo|wq_a|wkv_a)/kernel$", ((-3,), (-1,))),
    *DEFAULT_RULES,  # experts, [E, in, out] or [E, L, in, out], are plain
)

# Tunix: heads as einsums hold them, [D, heads, hd] and [heads, hd, D]; in Gemma [heads, D, hd].
TUNIX_RULES: tuple[Rule, ...] = (
    _kernel(r"(^|/)[qkv]_proj/w$", ((-3,), (-2, -1))),
    _kernel(r"(^|/)(o_proj|attn_vec_einsum)/w$", ((-3, -2), (-1,))),
    _kernel(r"(^|/)(q|k|kv|qkv)_einsum/w$", ((-2,), (-3, -1))),
    *DEFAULT_RULES,  # feed-forward layers and experts, [E, in, out], are plain
)

NAMED_RULES = frozenset({*DEFAULT_RULES, *MAXTEXT_RULES, *TUNIX_RULES})  # no model has use for all of them
