"""Ready sets of rules: what is kept, and the matrix views of the layers that libraries share by name.

A pattern may end in `(/value)?$`: some checkpoints store the value of each `nnx.Variable` under that name.
"""

from daq_jax.rules.rule import Rule, RuleSet
from daq_jax.tilings import Matrix

_END = r"(/value)?$"
# Its moments have the paths of the weights behind it.
OPTIMIZER = r"(^|[./])(opt_states?|optim(izer)?_states?|optimizer(?!/(model|params)/))([./]|$)"


def _keep(pattern: str, about: str) -> Rule:
    return Rule(pattern, quantize=False, about=about)


def _kernel(pattern: str, matrix: Matrix, about: str, ndim: int = 3) -> Rule:
    """A weight of several input or output axes; with fewer than `ndim` axes it is a plain matrix."""
    return Rule(pattern + _END, quantize=True, matrix=matrix, ndim_at_least=ndim, about=about)


# Embeddings and output heads decide which token comes out, routers which expert is asked, and norms, biases
# and adapters are small: none is worth the risk. A norm or bias has two axes where layers are stacked.
_STATE = _keep(OPTIMIZER, "state of an optimizer")
_KEPT: tuple[Rule, ...] = (
    _STATE,
    _keep(
        r"(?i)embed|(^|[./_])(emb|wte|wpe)([./_]|$)|(^|[./])(cls|mask|dist|register)_tokens?([./]|$)"
        r"|(^|[./])pos(ition(al|s)?)?(_(enc\w*|emb\w*|table))?([./]|$)",
        "embedding",
    ),
    _keep(r"(?i)norm|(^|[./])(ln\w*|bn\w*|scale|layer_?scal\w*|gamma|beta)([./]|$)", "norm or scale"),
    _keep(r"(?i)bias", "bias"),
    _keep(r"(?i)(^|[./_])lora([./_]|$)", "adapter"),
    _keep(r"(^|[./])(A_log|dt_bias|sinks?)([./]|$)", "vector of a mixer"),
    _keep(r"(^|[./])(correction|prediction)_coefs([./]|$)", "coefficients of AltUp"),
    _keep(
        r"(^|[./])(\w*head|logits\w*|classifier|score)([./]|$)"
        r"|^((params|model|transformer|decoder)[./])*output(_layer|_projection)?[./](kernel|weight|w)(/value)?$",
        "output head",
    ),
    _keep(r"(?i)router|(moe\w*|experts?)[./]gate([./]|$)|(^|[./])mlp[./]gate[./]weight$", "router"),
    _keep(r"(?i)depthwise", "depthwise convolution"),
)

DEFAULT_RULES = RuleSet(
    "DEFAULT_RULES",
    (
        *_KEPT,
        # Attention of Flax: [D, heads, hd] into the heads, [heads, hd, D] out of them.
        _kernel(r"(^|/)(query|key|value)/kernel", ((-3,), (-2, -1)), "Flax: into heads"),
        _kernel(r"(^|/)out/kernel", ((-3, -2), (-1,)), "Flax: out of heads"),
        # Convolutions: [height, width, in, out], or [width, in, out].
        _kernel(r"(?i)conv\w*/kernel", ((-4, -3, -2), (-1,)), "Flax: convolution", ndim=4),
        _kernel(r"(?i)conv\w*/kernel", ((-3, -2), (-1,)), "Flax: convolution"),
    ),
)

# MaxText stacks layers along the second axis of every weight, and blocks of layers along the third: axes are
# counted from the front where they stand before the stacks. Weights end in `kernel`, but for experts.
MAXTEXT_RULES = RuleSet(
    "MAXTEXT_RULES",
    (
        _STATE,
        _keep(r"(^|/)(gate|conv1d)/kernel" + _END, "router or depthwise convolution"),
        _kernel(
            r"(^|/)(query|key|value|wq_b|wkv_b|qkv_proj)/kernel", ((0,), (-2, -1)), "MaxText: into heads"
        ),
        _kernel(r"(^|/)attention/attention/out/kernel", ((0,), (-1,)), "MaxText: out of heads, merged"),
        _kernel(r"(^|/)out/kernel", ((0, -2), (-1,)), "MaxText: out of heads"),
        _kernel(r"(^|/)(wi(_\d)?|wo|wq_a|wkv_a|in_proj\w*|out_proj)/kernel", ((0,), (-1,)), "MaxText: dense"),
        *DEFAULT_RULES,
        _kernel(r"/kernel", ((0,), (-1,)), "MaxText: dense"),
        _keep(r"^(?!.*(/kernel|(^|/)w[io](_\d)?)(/value)?$)", "MaxText: no kernel"),
        _kernel(r"(^|/)w[io](_\d)?", ((-2,), (-1,)), "MaxText: experts"),
    ),
)

# Heads as einsums of Gemma hold them, [heads, D, hd], with key and value or all three in front of that.
_EINSUMS = (
    _kernel(r"(^|/)attn_vec_einsum(/w)?", ((-3, -2), (-1,)), "Gemma: out of heads"),
    _kernel(r"(^|/)(q|k|v|kv|qkv)_einsum(/w)?", ((-2,), (-3, -1)), "Gemma: into heads"),
)

# Google DeepMind's `gemma`. The two orders of `gating_einsum` are told apart by `linear` beside it.
GEMMA_RULES = RuleSet("GEMMA_RULES", (_STATE, *_EINSUMS, *DEFAULT_RULES))

# Tunix: heads as [D, heads, hd] and [heads, hd, D], and in its Gemma as above.
TUNIX_RULES = RuleSet(
    "TUNIX_RULES",
    (
        _STATE,
        _kernel(r"(^|/)[qkv]_proj/w", ((-3,), (-2, -1)), "Tunix: into heads"),
        _kernel(r"(^|/)o_proj/w", ((-3, -2), (-1,)), "Tunix: out of heads"),
        *_EINSUMS,
        *DEFAULT_RULES,  # feed-forward layers and experts, [E, in, out], are plain
    ),
)

# Hugging Face and PyTorch: `weight` is [out, in], of convolutions [out, in, ...], and of GPT-2 [in, out].
HF_RULES = RuleSet(
    "HF_RULES",
    (
        *_KEPT,
        _kernel(r"(?i)conv\w*[./]weight", ((1, 2, 3), (0,)), "PyTorch: convolution", ndim=4),
        _kernel(r"(?i)conv\w*[./]weight", ((1, 2), (0,)), "PyTorch: convolution"),
        _kernel(
            r"(^|[./])h[./]\d+[./]\w+[./]c_(attn|fc|proj)[./]weight", ((-2,), (-1,)), "GPT-2: dense", ndim=2
        ),
        _kernel(r"(^|[./])weight", ((-1,), (-2,)), "PyTorch: dense", ndim=2),
    ),
)

# Keras, as `{v.path: v.value for v in model.variables}`.
KERAS_RULES = RuleSet(
    "KERAS_RULES",
    (
        _STATE,
        _kernel(r"(^|/)attention_output/kernel", ((-3, -2), (-1,)), "Keras: out of heads"),
        *DEFAULT_RULES,
    ),
)

# No model has use for all rules of a set, so an unused one is not warned of.
NAMED_RULES = frozenset({*DEFAULT_RULES, *MAXTEXT_RULES, *GEMMA_RULES, *TUNIX_RULES, *HF_RULES, *KERAS_RULES})
