"""From panels to pictures: layout, colours that follow the reader's light or dark theme, files.

Figures are drawn in the light palette. In the page, every colour of the palette becomes a CSS
variable, so one SVG serves both themes, and text stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# CSS variable: (light, dark)
PALETTE = {
    "ink": ("#1c2126", "#e6e9ec"),
    "muted": ("#626b75", "#9aa4ae"),
    "grid": ("#e2e6ea", "#30363d"),
    "blue": ("#1f6fb5", "#6db3f2"),
    "orange": ("#c8501e", "#ff9a66"),
    "green": ("#23836a", "#5fd0ae"),
    "purple": ("#7d55b0", "#b99bee"),
    "gold": ("#a0740f", "#e0b64a"),
    "pink": ("#b03a6d", "#f08ab5"),
    "teal": ("#3f7f96", "#8cc4da"),
    "olive": ("#69801e", "#b5cc5a"),
}
COLOUR = {name: light for name, (light, _) in PALETTE.items()}
# In the order in which series take them; with the dash pattern, two runs of colours stay apart.
CYCLE = ("blue", "orange", "green", "purple", "gold", "pink", "teal", "olive")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

WIDE, NARROW = 7.2, 3.45  # inches; one inch is about 100 CSS pixels where the page has room
_LEFT, _RIGHT, _BOTTOM = 0.48, 0.14, 0.42
_TITLE, _LEGEND_ROW, _ROW, _TALL_ROW = 0.27, 0.19, 0.22, 0.33
_STYLE = {
    "font.size": 8.5,
    "text.color": COLOUR["ink"],
    "axes.edgecolor": COLOUR["muted"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOUR["muted"],
    "ytick.color": COLOUR["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.7,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.3,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "legend.labelspacing": 0.3,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: `draw(axes, narrow)` fills it; `height` is that of the axes in inches."""

    title: str
    draw: Callable[[Axes, bool], None]
    height: float = 2.2


@dataclass(frozen=True)
class Table:
    """Data of a figure. Cells are texts, or numbers that are shown as they are."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure with everything a page needs to show it.

    `caption` says what it is and what to look for; `alt` what a reader who can't see it should
    know. `rows` names the rows of a plot that has one row per thing: its panels then stand side by
    side where there is room, and share the names.
    """

    key: str
    title: str
    caption: str
    alt: str
    panels: tuple[Panel, ...]
    tables: tuple[Table, ...] = ()
    rows: tuple[str, ...] = ()


def build(plot: Plot, narrow: bool = False) -> Figure:
    """The matplotlib figure of a plot. No global state is left changed."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1, 1))
        FigureCanvasAgg(figure)
        axes = []
        for panel in plot.panels:
            axes.append(figure.add_axes((0, 0, 1, 1), label=f"panel {len(axes)}"))
            panel.draw(axes[-1], narrow)
        if plot.rows:
            _lay_out_rows(figure, plot, axes, narrow)
        else:
            _lay_out_stack(figure, plot, axes, narrow)
    return figure


def to_svg(plot: Plot, narrow: bool = False) -> str:
    """An <svg> element for the page: themed by CSS variables, with ids of its own."""
    key = f"{plot.key}-{'narrow' if narrow else 'wide'}"
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        text = io.StringIO()
        build(plot, narrow).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(text.getvalue(), key)


def save(plot: Plot, path: Path) -> None:
    """Write the plot as a .png or .svg file, on white."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": plot.key}):
        build(plot).savefig(path, dpi=200, facecolor="white")


def dashboard_png(panels: Sequence[Panel], title: str, subtitle: str) -> bytes:
    """A PNG of panels in rows of three under a title."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    cell_width, cell_height, head, margin = 4.6, 3.3, 0.95, 0.2
    width, height = columns * cell_width + margin, rows * cell_height + head
    lines = textwrap.fill(subtitle, round(11.5 * width))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        left = (margin + 0.02) / width
        figure.text(left, 1 - 0.38 / height, title, size=13, weight="bold")
        figure.text(left, 1 - 0.5 / height, lines, size=9, color=COLOUR["muted"], va="top")
        for i, panel in enumerate(panels):
            axes = figure.add_axes((0, 0, 1, 1), label=f"panel {i}")
            panel.draw(axes, True)
            names = [label.get_text() for label in axes.get_yticklabels()]
            indent = _label_width(names) if axes.yaxis_inverted() else _LEFT
            x = margin + (i % columns) * cell_width
            y = height - head - (i // columns + 1) * cell_height
            box = (
                x + indent,
                y + _BOTTOM,
                cell_width - indent - 0.25,
                cell_height - _BOTTOM - _head(axes, panel.title, 2) - 0.15,
            )
            _place(figure, axes, panel.title, box, 2, (width, height), title_x=x)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    return png.getvalue()


# ------------------------------------------------------------------------ layout


def _lay_out_stack(figure: Figure, plot: Plot, axes: list[Axes], narrow: bool) -> None:
    width, columns = (NARROW, 2) if narrow else (WIDE, 4)
    heads = [_head(a, p.title, columns) for a, p in zip(axes, plot.panels, strict=True)]
    height = sum(heads) + sum(p.height for p in plot.panels) + _BOTTOM * len(axes)
    figure.set_size_inches(width, height)
    limits = [a.get_xlim() for a in axes]
    top = height
    for a, panel, head in zip(axes, plot.panels, heads, strict=True):
        a.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        if a is not axes[-1]:
            a.set_xlabel(None)
        top -= head + panel.height
        box = (_LEFT, top, width - _LEFT - _RIGHT, panel.height)
        _place(figure, a, panel.title, box, columns, (width, height), title_x=0.02)
        top -= _BOTTOM


def _lay_out_rows(figure: Figure, plot: Plot, axes: list[Axes], narrow: bool) -> None:
    """Side by side with the names on the left; if narrow, stacked with each name above its row."""
    heads = [_head(a, p.title, 2) for a, p in zip(axes, plot.panels, strict=True)]
    for a in axes:
        a.set_ylim(len(plot.rows) - 0.4, -0.6)
        a.set_yticks(range(len(plot.rows)), ["" for _ in plot.rows])
        a.grid(axis="y", visible=False)
        a.spines["left"].set_visible(False)
    if narrow:
        axes_height = _TALL_ROW * len(plot.rows)
        height = sum(heads) + (axes_height + _BOTTOM) * len(axes)
        figure.set_size_inches(NARROW, height)
        top = height
        for a, panel, head in zip(axes, plot.panels, heads, strict=True):
            for i, name in enumerate(plot.rows):
                a.text(0, i - 0.37, name, transform=a.get_yaxis_transform(), va="center", size=8)
            top -= head + axes_height
            box = (0.1, top, NARROW - 0.1 - _RIGHT, axes_height)
            _place(figure, a, panel.title, box, 2, (NARROW, height), title_x=0.02)
            top -= _BOTTOM
        return
    names = [end_of(row, 30) for row in plot.rows]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].tick_params(axis="y", labelcolor=COLOUR["ink"])
    left, gap = _label_width(names), 0.3
    axes_height = _ROW * len(names) + 0.1
    height = max(heads) + axes_height + _BOTTOM
    figure.set_size_inches(WIDE, height)
    each = (WIDE - left - _RIGHT - gap * (len(axes) - 1)) / len(axes)
    for i, (a, panel) in enumerate(zip(axes, plot.panels, strict=True)):
        x = left + i * (each + gap)
        box = (x, _BOTTOM, each, axes_height)
        _place(figure, a, panel.title, box, 2, (WIDE, height), title_x=x)


def _head(axes: Axes, title: str, columns: int) -> float:
    """Inches above the axes for its title and legend."""
    entries = len(axes.get_legend_handles_labels()[0])
    lines = title.count("\n")
    return _TITLE + 0.14 * lines + _LEGEND_ROW * -(-entries // columns)


def _place(figure, axes, title: str, box, columns: int, size, title_x: float) -> None:
    """Axes at `box` (left, bottom, width, height in inches), its legend and title above it."""
    width, height = size
    x, y, w, h = box
    axes.set_position((x / width, y / height, w / width, h / height))
    handles, labels = axes.get_legend_handles_labels()
    at = y + h + 0.08
    if handles:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 0.07 / h + 1), ncols=columns
        )
        at += _LEGEND_ROW * -(-len(handles) // columns)
    figure.text(title_x / width, at / height, title, weight="bold", va="bottom", size=8.5)


def _label_width(labels: Sequence[str]) -> float:
    return 0.18 + 0.068 * max((len(label) for label in labels), default=0)


def end_of(text: str, length: int) -> str:
    """At most `length` characters, the last ones: layers differ at the end of their names."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


# ------------------------------------------------------------------------ svg


def _for_page(svg: str, key: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    viewbox = re.search(r'viewBox="[^"]+"', svg)[0]
    svg = f'<svg {viewbox} aria-hidden="true" focusable="false">' + svg[svg.index(">") + 1 :]
    svg = re.sub(r"(font: |font-family: )[^\";]*", _font, svg)
    for name, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{name})")
    referenced = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    names = {a or b for a, b in referenced}
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in names else "", svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{key}-', svg)
    svg = re.sub(r"<[^>]+>", lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", m[0]), svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _font(match: re.Match) -> str:
    """Keep weight and size, leave the family to the page."""
    if match[1] == "font-family: ":
        return "font-family: inherit"
    size = re.search(r"([\d.]+)px", match[0])[1]
    weight = "; font-weight: 600" if re.search(r"bold|700", match[0]) else ""
    return f"font-size: {size}px{weight}"
