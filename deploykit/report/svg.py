"""Draw one figure as SVG, and format its names and numbers.

Text stays text, so that the browser picks fonts with the glyphs, and lines use the page's colour, so that figures adapt
to dark mode.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable
from typing import Any

from deploykit.errors import MissingDependencyError
from deploykit.peak_memory import BENCH_EXTRA

NOTHING = "–"
INK, _FAINT = "#010203", "#010204"  # placeholders, replaced by the page's colours
COLOURS = (
    "#2f6fed",
    "#e8710a",
    "#12a150",
    "#c026d3",
    "#d93025",
    "#00a3a3",
    "#8a6d00",
    "#7c5cff",
    "#5f6b7a",
    "#e0407b",
    "#a3a800",
    "#b4714f",
)
_MARKERS = "osv^Dph<>X*"  # coprime to the number of colours, so that no two candidates share both
_RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": _FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a label may contain a dollar sign
    "xtick.color": INK,
    "ytick.color": INK,
}


def require_matplotlib() -> None:
    """Raise MissingDependencyError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingDependencyError("matplotlib, which draws the report, is not installed", BENCH_EXTRA) from None


def shown(text: str, most: int = 36) -> str:
    """Return a name fit for a figure: one line, not too long, without characters that XML cannot contain."""
    text = text.encode("utf-8", "replace").decode()
    text = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cn", "Co") else c for c in text).split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    text = text or "?"
    return f"\u200b{text}" if text.startswith("_") else text  # matplotlib hides names that begin with an underscore


def number(value: float | None) -> str:
    """Format to about three digits."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def fraction(value: float | None) -> str:
    """Format an accuracy, of 1 or of 100."""
    return NOTHING if value is None else f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def apart(html: str, name: str) -> str:
    """Return ``html`` with ``name`` before each of its ids, so that several figures can share a page."""
    return re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', f"{name}-", html)


def to_svg(name: str, draw: Callable[[Any], None], size: tuple[float, float] = (8.0, 4.6)) -> str:
    """Draw a figure. ``name`` makes its ids unique on the page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font is only used for measuring, so missing glyphs do not matter
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor").replace(_FAINT, "var(--faint)")
    svg = apart(svg, name)
    # At most as wide as drawn, so that text has one size on the whole page.
    fluid = f'<svg style="max-width: {size[0] * 120:.0f}px"'
    return re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2).replace("<svg", fluid, 1)


def add_legend(figure: Any) -> None:
    figure.legend(loc="outside upper left", ncols=2, fontsize=10, labelcolor=INK)


def colour_of(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def marker_of(i: int) -> str:
    return _MARKERS[i % len(_MARKERS)]


def locator(count: int) -> Any:
    """Return a locator of at most ``count`` intervals between ticks."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)
