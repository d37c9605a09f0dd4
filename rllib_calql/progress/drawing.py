"""What all pictures of runs and studies share. Matplotlib is imported on use; its global state is left alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# Okabe and Ito's colours, which colour-blind readers can tell apart; then the same with another line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dashed", "dotted")
_MAX_NAME = 48  # Characters.


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the curve of that number, as arguments of Matplotlib."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def shown_name(name: str) -> str:
    """A name on one line, its middle left out if it is long. A `$` in it is no formula: `parse_math` is off."""
    line = " ".join(name.split())
    half = _MAX_NAME // 2
    return line if len(line) <= _MAX_NAME else f"{line[:half]}…{line[-half:]}"


def write_names(legend: Legend, names: Iterable[str]) -> None:
    """Writes names into a legend that was made with blanks: Matplotlib leaves out those that begin with `_`.

    A `$` in a name is no formula.
    """
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def new_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # A name in a script that the font does not have.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
