"""Rules: which leaves of a tree are quantized, how, and which are left as they are.

A leaf's path is its dict keys, indices and attribute names joined by "/"; a bare array has path "". Rules
are an ordered list; the first one whose pattern is found in the path (`re.search`, case-sensitive) decides.
A leaf that no rule names is quantized if it is floating point with two axes or more, and kept otherwise.
"""

from daq_jax.rules.decisions import Decision as Decision
from daq_jax.rules.decisions import decide_all as decide_all
from daq_jax.rules.decisions import first_match as first_match
from daq_jax.rules.files import RULE_SETS as RULE_SETS
from daq_jax.rules.files import rules_called as rules_called
from daq_jax.rules.layers import views_by_type as views_by_type
from daq_jax.rules.rule import AmbiguousMatrixWarning as AmbiguousMatrixWarning
from daq_jax.rules.rule import NarrowMatrixWarning as NarrowMatrixWarning
from daq_jax.rules.rule import Rule as Rule
from daq_jax.rules.rule import UnreadMetricWarning as UnreadMetricWarning
from daq_jax.rules.rule import UnusedRuleWarning as UnusedRuleWarning
from daq_jax.rules.rule import check_rules as check_rules
from daq_jax.rules.rule import keep as keep
from daq_jax.rules.rule import use as use
from daq_jax.rules.sets import DEFAULT_RULES as DEFAULT_RULES
from daq_jax.rules.sets import GEMMA_RULES as GEMMA_RULES
from daq_jax.rules.sets import HF_RULES as HF_RULES
from daq_jax.rules.sets import KERAS_RULES as KERAS_RULES
from daq_jax.rules.sets import MAXTEXT_RULES as MAXTEXT_RULES
from daq_jax.rules.sets import NAMED_RULES as NAMED_RULES
from daq_jax.rules.sets import OPTIMIZER as OPTIMIZER
from daq_jax.rules.sets import TUNIX_RULES as TUNIX_RULES
