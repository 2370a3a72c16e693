"""What all pictures share: colours, ticks, maps, and writing figures to files.

A figure is made without pyplot, so nothing global changes and no display is needed. Colours are
those of Okabe and Ito, with markers beside them, and cividis for maps: both are told apart by
colour-blind readers and in grey.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullLocator,
)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
ROLES = ("pathway", "pooled", "random", "other", "tuned")
"""Of an arm, in the order of colours and markers."""

GREY = "#666666"
DPI = 150
COLUMNS = 4
"""Most small multiples in a row."""

LEAST_WIDTH = 6.4
"""Inches in which a title with a model's name, and a legend of all roles, have room."""


class Picture(Figure):
    """A figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        """Return the picture, as a notebook asks for it."""
        content = BytesIO()
        self.savefig(content, dpi=DPI, format="png")
        return content.getvalue()


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[str]:
    """Write figures as ``NAME.png`` into a folder that exists; return the file names."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI, format="png")
    return [f"{name}.png" for name in figures]


def literal_names() -> AbstractContextManager[None]:
    """Within the block, a dollar sign in the name of a model or text starts no formula."""
    return rc_context({"text.parse_math": False})


def as_svg(figure: Figure) -> bytes:
    """Render a figure as SVG, with its letters as paths; equal figures give equal bytes."""
    content = BytesIO()
    with literal_names(), rc_context({"svg.hashsalt": "sparse-pathways", "svg.fonttype": "path"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def line_style(index: int, points: int) -> dict[str, Any]:
    """Return a line's colour and marker; every so often a marker where there are many points."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if index < len(COLOURS) else "--",
        "markersize": 4,
        "markevery": max(1, points // 12),
        "linewidth": 1.4,
    }


def finish_blocks(axes: Axes, label: str) -> None:
    """Label axes whose horizontal one runs over FFN blocks, with a legend, in place."""
    label_blocks(axes, label)
    axes.legend(fontsize=8, frameon=False)


def label_blocks(axes: Axes, label: str) -> None:
    """Label axes whose horizontal one runs over FFN blocks, in place."""
    axes.set_xlabel("FFN block, by depth")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100.0 * share:g}"))
    axes.grid(alpha=0.25)


def log_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers between two that spread evenly on a log axis."""
    steps: tuple[float, ...] = (1.0,)
    if high / low < 5.0:
        steps = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
    elif high / low < 1e4:
        steps = (1.0, 2.0, 5.0) if high / low < 200.0 else (1.0, 3.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def draw_map(axes: Axes, values: Any, norm: Normalize, form: str) -> Any:
    """Draw a map with its values in the cells, light on dark and dark on light; NaN is left out."""
    axes.set_facecolor("#E0E0E0")
    image = axes.imshow(values, cmap="cividis", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if float(norm(value)) < 0.55 else "black"
            text = form.format(value)
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return image


def label_map(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name a map's rows and columns, in place."""
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)


def tick_log(axis: Axis, low: float, high: float) -> None:
    """Put round figures on a logarithmic axis, in place."""
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def short_name(name: str) -> str:
    """Return a model's name without its folder."""
    return Path(name).name or "a model without a name"


def name_roles(figure: Figure, panels: list[Axes]) -> None:
    """Name each role that any panel shows, once, below the panels."""
    shown: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    names = ["other domains' pathways" if name == "other" else name for name in shown]
    handles = list(shown.values())
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)


def role_index(role: str) -> int:
    """Return the place of a role's colour and marker."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def hide_rest(grid: Any, used: int) -> None:
    """Hide the panels of a grid behind those that are used."""
    for axes in list(grid.flat)[used:]:
        axes.set_visible(False)
