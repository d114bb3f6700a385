"""From panels to pictures: layout, colours that follow the reader's light or dark theme, files.

Figures are drawn in the light palette. In the page, every colour of the palette becomes a CSS
variable, so one SVG serves both themes, and text stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnexp.report.mpl import Axes, Figure, FigureCanvasAgg, Line2D, matplotlib

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

WIDE, NARROW = 7.2, 3.45  # inches; one inch is about 100 CSS pixels where the page has room
_LEFT, _RIGHT, _BOTTOM = 0.48, 0.14, 0.42
_TITLE, _LEGEND_ROW, _ROW, _TALL_ROW = 0.27, 0.19, 0.22, 0.33
_END_ROW, _END_SAMPLE = 0.15, 0.55  # of the names at the ends of lines
_OF_PICTURES = (
    "agg.", "axes.", "figure.", "font.", "grid.", "legend.", "lines.", "markers.", "mathtext.",
    "patch.", "path.", "savefig.", "svg.", "text.", "xtick.", "ytick.",
)  # fmt: skip
# Over matplotlib's own defaults, so that no one's matplotlibrc changes the pictures.
_STYLE = {
    **{k: v for k, v in matplotlib.rcParamsDefault.items() if k.startswith(_OF_PICTURES)},
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
    "legend.handlelength": 3.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.3,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "legend.labelspacing": 0.3,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Look:
    """How a line looks. Any two are told apart by dash or marker, whatever becomes of colour."""

    colour: str
    dash: str | tuple[int, tuple[float, ...]]
    marker: str
    hollow: bool = False


_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.3, 1.3)),
    (0, (6, 1.5, 1.3, 1.5)),
    (0, (10, 3)),
)
_COLOURS = ("blue", "orange", "green", "purple", "gold", "pink", "teal", "olive")
LOOKS = tuple(
    Look(_COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)], "so^vDPX<>*d"[i % 11])
    for i in range(55)
)


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
    """The matplotlib figure of a plot. No global state is left changed.

    Lines bear their names at their right ends where there is room, else in a legend.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1, 1))
        FigureCanvasAgg(figure)
        axes: list[Axes] = []
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
            handles, labels = axes.get_legend_handles_labels()
            legend = dict(zip(labels, handles, strict=True))
            names = [label.get_text() for label in axes.get_yticklabels()]
            indent = _label_width(names) if axes.yaxis_inverted() else _LEFT
            x = margin + (i % columns) * cell_width
            y = height - head - (i // columns + 1) * cell_height
            box = (
                x + indent,
                y + _BOTTOM,
                cell_width - indent - 0.25,
                cell_height - _BOTTOM - _head(legend, panel.title, 2) - 0.15,
            )
            _place(figure, axes, panel.title, box, 2, (width, height), title_x=x, legend=legend)
        png = io.BytesIO()
        # Packed fast: a sixth larger, a quarter of the time.
        packing = {"compress_level": 1}
        figure.savefig(png, format="png", dpi=150, facecolor="white", pil_kwargs=packing)
    return png.getvalue()


# ------------------------------------------------------------------------ layout


def _lay_out_stack(figure: Figure, plot: Plot, axes: list[Axes], narrow: bool) -> None:
    width = NARROW if narrow else WIDE
    ends = [
        [] if narrow else _lines_to_name(a, p.height)
        for a, p in zip(axes, plot.panels, strict=True)
    ]
    legends: list[dict[str, Any]] = []
    for a, named in zip(axes, ends, strict=True):
        shown = {line.get_label() for line in named} | {k for legend in legends for k in legend}
        handles, labels = a.get_legend_handles_labels()
        legends.append({k: h for k, h in zip(labels, handles, strict=True) if k not in shown})
    longest = max((len(label) for legend in legends for label in legend), default=0)
    columns = (1 if longest > 15 else 2) if narrow else (3 if longest > 15 else 4)
    heads = [_head(e, p.title, columns) for e, p in zip(legends, plot.panels, strict=True)]
    height = sum(heads) + sum(p.height for p in plot.panels) + _BOTTOM * len(axes)
    figure.set_size_inches(width, height)
    limits = [a.get_xlim() for a in axes]
    names = [end_of(str(line.get_label()), 26) for named in ends for line in named]
    right = _END_SAMPLE + _label_width(names) if names else _RIGHT
    top = height
    for a, panel, head, legend, named in zip(axes, plot.panels, heads, legends, ends, strict=True):
        a.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
        if a is not axes[-1]:
            a.set_xlabel("")
        top -= head + panel.height
        box = (_LEFT, top, width - _LEFT - right, panel.height)
        _place(figure, a, panel.title, box, columns, (width, height), title_x=0.02, legend=legend)
        _name_ends(figure, a, named, box)
        top -= _BOTTOM


def _lines_to_name(axes: Axes, height: float) -> list[Line2D]:
    """The labelled lines, if their names fit beside axes of this height."""
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return lines if len(lines) <= height / _END_ROW else []


def _name_ends(figure: Figure, axes: Axes, lines: Sequence[Line2D], box) -> None:
    """Beside the axes, as high as each line ends or as near as there is room: look and name."""
    x, y, w, h = box
    to_axes = axes.transData - axes.transAxes
    ends = [
        (float(to_axes.transform(np.asarray(line.get_xydata())[-1])[1]), line) for line in lines
    ]
    ends = sorted(((y + h * min(max(end, 0.0), 1.0), line) for end, line in ends), key=_first)

    def like(line: Line2D, xs: list[float], ys: list[float], **changes: Any) -> None:
        copy = Line2D(xs, ys)
        copy.update_from(line)
        copy.set(transform=figure.dpi_scale_trans, clip_on=False, **changes)
        figure.add_artist(copy)

    heights = spread([end for end, _ in ends], _END_ROW, y, y + h)
    for (end, line), height in zip(ends, heights, strict=True):
        start, middle = x + w + 0.14, x + w + 0.34
        like(line, [x + w, start], [end, height], linestyle="-", linewidth=0.6, marker="")
        like(line, [start, middle, x + w + 0.54], [height] * 3, markevery=[1])
        text = end_of(str(line.get_label()), 26)
        where = figure.dpi_scale_trans
        figure.text(x + w + 0.6, height, text, va="center", size=8, transform=where)


def _first(pair: tuple[float, Any]) -> float:
    return pair[0]


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending positions near the `wanted` ascending ones, at least `apart` from each other,
    within low and high where they fit."""
    found: list[float] = []
    for position in wanted:
        found.append(max(position, found[-1] + apart if found else low))
    for i in reversed(range(len(found))):
        found[i] = min(found[i], high - apart * (len(found) - 1 - i))
        if i + 1 < len(found):
            found[i] = min(found[i], found[i + 1] - apart)
    return found


def _lay_out_rows(figure: Figure, plot: Plot, axes: list[Axes], narrow: bool) -> None:
    """Side by side with the names on the left; if narrow, stacked with each name above its row."""
    heads = [_head({}, panel.title, 2) for panel in plot.panels]
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
                where = a.get_yaxis_transform()
                a.text(0, i - 0.37, end_of(name, 48), transform=where, va="center", size=8)
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


def _head(legend: Mapping[str, Any], title: str, columns: int) -> float:
    """Inches above the axes for their title and legend."""
    return _TITLE + 0.14 * title.count("\n") + _LEGEND_ROW * -(-len(legend) // columns)


def _place(
    figure: Figure, axes: Axes, title: str, box, columns: int, size, title_x: float, legend=None
) -> None:
    """Axes at `box` (left, bottom, width, height in inches), their legend and title above them."""
    width, height = size
    x, y, w, h = box
    axes.set_position((x / width, y / height, w / width, h / height))
    at = y + h + 0.08
    if legend:
        axes.legend(
            legend.values(),
            [end_of(label, 40) for label in legend],
            loc="lower left",
            bbox_to_anchor=(0, 0.07 / h + 1),
            ncols=columns,
        )
        at += _LEGEND_ROW * -(-len(legend) // columns)
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
    viewbox = svg[svg.index('viewBox="') :].split('"')[1]
    svg = (
        f'<svg viewBox="{viewbox}" aria-hidden="true" focusable="false">'
        + svg[svg.index(">") + 1 :]
    )
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
    size = match[0].partition("px")[0].split()[-1]
    weight = "; font-weight: 600" if re.search(r"bold|700", match[0]) else ""
    return f"font-size: {size}px{weight}"
