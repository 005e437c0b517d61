"""The modules that a result's config says are not quantized, by every name that a loader looks for.

vLLM and SGLang map the names of the file to their own. transformers looks for the names of its modules, which
differ from those of the file where it renames weights as it loads them: both are listed. The head is listed
also where the file has none, since a model may tie it without a word in its config.

Source: `conversion_mapping.py` of transformers 5.24.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from daq_jax.io.hf.weight_names import skipped_modules

_HEAD = "lm_head"
_RENAMES = (
    (r"^language_model\.lm_head$", _HEAD),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?!model\.|lm_head|language_model\.)(\w+\.)", r"model.\1"),
    (r"^model\.(?!language_model\.|vis|audio|multi_modal|image)", "model.language_model."),
)


def skip_list(kept: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Names of the modules that are not quantized, sorted.

    Args:
        kept: names of the two-dimensional weights and fused experts that stay as they are.
        config: the `config.json` of the model; weights are renamed where it has a text model in it.
    """
    names = {*skipped_modules(kept), _HEAD}
    if isinstance(config.get("text_config"), Mapping):
        names |= {re.sub(pattern, to, name) for name in names for pattern, to in _RENAMES}
    return sorted(names)
