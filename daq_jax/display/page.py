"""A comparison as one HTML page with figures, pictures and a table that sorts; it loads nothing.

Needs matplotlib and jinja2: `pip install 'daq-jax[plot]'`.
"""

import base64
import functools
import io
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from daq_jax.analysis import sheets
from daq_jax.analysis.comparison import Comparison
from daq_jax.analysis.verdicts import verdict_of_result
from daq_jax.version import __version__

try:
    import jinja2
except ImportError as error:
    raise ImportError("a page needs jinja2: pip install 'daq-jax[plot]'.") from error

_DPI = 110  # about 50 kB a picture


class _Inlined(NamedTuple):
    png: str  # base64
    caption: str
    wide: bool


def page(
    comparison: Comparison,
    *,
    title: str = "What quantization kept",
    others: Mapping[str, Comparison] | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """An HTML page that shows a comparison. It makes no request, and is below 2 MB for 1,000 leaves.

    Args:
        comparison: what to show. Three of the pictures need one made with `details=True`.
        title: title of the page.
        others: comparisons of the same pair under other recipes, by name, which are drawn side by side.
        facts: what was compared, in words by name, such as base, tuned, recipe, command and date.

    Returns:
        The page, to be written to a file as UTF-8.
    """
    columns = list(sheets.COLUMNS)
    ranked = comparison.worst(len(comparison.leaves))
    return _template().render(
        title=title,
        columns=columns,
        total=list(zip(columns, sheets.cells(comparison.total), strict=True)),
        verdict=verdict_of_result(comparison.total, ranked),
        facts=dict(facts or {}),
        notes=[*filter(None, [comparison.doubt]), *comparison.sheet(len(ranked)).after],
        rows=[(path, sheets.cells(figures)) for path, figures in ranked.items()],
        pictures=_pictures(comparison, others or {}),
        made=f"Made by daq-jax {__version__} from the stored codes and scales.",
    )


@functools.cache
def _template() -> jinja2.Template:
    source = resources.files("daq_jax.display").joinpath("page.html.j2").read_text("utf-8")
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)


def _pictures(comparison: Comparison, others: Mapping[str, Comparison]) -> list[_Inlined]:
    from daq_jax.display import plots

    found = []
    if comparison.leaves:
        found.append(
            (plots.projection_by_layer(comparison), "Projection of each layer and kind of matrix", True)
        )
    if comparison.details:
        found += [
            (plots.density(comparison), "Kept against true change: on the diagonal it is kept", False),
            (plots.sign_rate_by_size(comparison), "Signs kept, by the size of the change", False),
            (plots.scale_ratios(comparison), "Scales that were chosen, against those of AbsMax", False),
        ]
    if others:
        found.append((plots.recipes_side_by_side(others), "Recipes side by side", True))
    return [_Inlined(_png(picture), caption, wide) for picture, caption, wide in found]


def _png(picture: Any) -> str:
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=_DPI)
    return base64.b64encode(file.getvalue()).decode()
