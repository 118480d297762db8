"""One HTML page to look at images in: maps, neighbours and lists, with everything it needs inside."""

import base64
import colorsys
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from bokeh import palettes
from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    ColumnDataSource,
    CustomJS,
    DataTable,
    Div,
    HoverTool,
    HTMLTemplateFormatter,
    Range1d,
    Select,
    TableColumn,
    Toggle,
)
from bokeh.plotting import figure
from bokeh.resources import INLINE
from PIL import Image

from . import Found
from .findings import finest, layout, lists, nearest

QUALITY = 70  # of pictures, WebP
UNKNOWN = "#bbbbbb"
NAMED = 20  # categories that the legend names
WIDTH = 560  # px of a map
# The page may load nothing: what is in it is all that there is.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:"
)
SCRIPT = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")


def thumbnail(tile: np.ndarray) -> str:
    """A picture [side, side, 3] uint8 as a data URI."""
    kept = io.BytesIO()
    Image.fromarray(tile).save(kept, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(kept.getvalue()).decode()}"


def by_category(values: Sequence[str | None]) -> tuple[list[str], str]:
    """A colour for each value, the commonest ones' first, and the legend."""
    counts = Counter(value for value in values if value is not None)
    few = palettes.Category10[10] if len(counts) <= 10 else palettes.Category20[20]
    many = [colorsys.hsv_to_rgb(i * 0.618 % 1, 0.5 + i % 3 / 4, 0.9 - i % 2 / 4) for i in range(len(counts))]
    wheel = few if len(counts) <= NAMED else ["#" + "".join(f"{round(255 * c):02x}" for c in rgb) for rgb in many]
    colours = {name: wheel[i] for i, (name, _) in enumerate(counts.most_common())}
    named = [
        f'<span style="white-space:nowrap;margin-right:1em"><span style="color:{colours[name]}">&#9632;</span> '
        f"{html.escape(name)} ({count:,})</span>"
        for name, count in counts.most_common(NAMED)
    ]
    more = [f"and {len(counts) - NAMED} more"] if len(counts) > NAMED else []
    return [colours.get(value, UNKNOWN) for value in values], " ".join(named + more)


def by_distance(distances: np.ndarray, labels: np.ndarray) -> tuple[list[str], str]:
    """A colour for each distance by its rank, and the legend."""
    known = labels >= 0
    ranks = np.zeros(len(distances))
    ranks[known] = distances[known].argsort().argsort() / max(1, known.sum() - 1)
    ramp = palettes.Viridis256
    colours = [ramp[round(255 * rank)] if there else UNKNOWN for rank, there in zip(ranks, known, strict=True)]
    shown = "".join(f'<span style="color:{ramp[i]}">&#9632;</span>' for i in range(0, 256, 17))
    return colours, f"near its cluster's centre {shown} far from it"


def colourings(found: Found) -> dict[str, tuple[list[str], str]]:
    """By what images may be coloured: each one's colours and legend."""
    made = {}
    if found.classes:
        made["class"] = by_category(found.classes)
    for k, (labels, _) in sorted(found.clusters.items()):
        named = [None if label < 0 else f"cluster {label}" for label in labels.tolist()]
        made[f"cluster, k = {k}"] = by_category(named)
    if found.clusters:
        k = finest(found.clusters, len(found.paths))
        labels, distances = found.clusters[k]
        made[f"distance from the cluster's centre, k = {k}"] = by_distance(distances, labels)
    return made or {"nothing": ([palettes.Category10[10][0]] * len(found.paths), "")}


def drawn(side: int, name: str, source: ColumnDataSource, chosen: ColumnDataSource) -> tuple[figure, ColumnDataSource]:
    """A map of the images, and the source of the pictures on it."""
    x, y = f"x{side}", f"y{side}"
    edges = [(values.min(), values.max()) for values in (source.data[x], source.data[y])]
    ranges = [Range1d(low - 0.04 * (high - low), high + 0.04 * (high - low)) for low, high in edges]
    made = figure(title=name, width=WIDTH, height=WIDTH, x_range=ranges[0], y_range=ranges[1],
                  tools="pan,wheel_zoom,box_zoom,reset", active_scroll="wheel_zoom")  # fmt: skip
    made.axis.visible = made.grid.visible = False
    made.toolbar.logo = None
    laid = ColumnDataSource({"x": [], "y": [], "url": [], "colour": []})
    points = made.scatter(x, y, source=source, size=6, color="colour", alpha=0.7, line_color=None)
    made.scatter("x", "y", source=laid, size=32, marker="square", color="colour")
    made.image_url("url", "x", "y", 26, 26, source=laid, anchor="center", w_units="screen", h_units="screen")
    made.scatter(x, y, source=chosen, size=36, marker="square", fill_color=None, line_color="black", line_width=3)
    told = [label for label in ("path", "class", "cluster") if label in source.data]
    words = "".join(f"<div>@{label}</div>" for label in told)
    about = f'<div><img src="@thumb{{safe}}" style="width:96px;height:96px">{words}</div>'
    made.add_tools(HoverTool(renderers=[points], tooltips=about, limit=1))
    return made, laid


def write(out: Path, title: str, found: Found) -> None:
    """Write the page.

    Args:
        out: the file.
        title: what is shown, for its head.
        found: the images.
    """
    units = [torch.nn.functional.normalize(rows, dim=1) for rows in found.sides.values()]
    places: list[np.ndarray] = []
    for unit in units:
        places.append(layout(unit, places[-1] if places else None))
    near = [nearest(unit) for unit in units]
    colours = colourings(found)
    columns = {"thumb": [thumbnail(tile) for tile in found.tiles], "path": found.paths}
    if found.classes:
        columns["class"] = [name or "" for name in found.classes]
    if found.clusters:
        every = sorted(found.clusters.items())
        of_each = zip(*(labels.tolist() for _, (labels, _) in every), strict=True)
        columns["cluster"] = [
            "cluster " + ", ".join(f"{label} of {k}" for label, (k, _) in zip(labels, every, strict=True) if label >= 0)
            for labels in of_each
        ]
    for side, place in enumerate(places):
        columns |= {f"x{side}": place[:, 0], f"y{side}": place[:, 1]}
    columns |= {f"colour by {name}": shown for name, (shown, _) in colours.items()}
    source = ColumnDataSource(columns | {"colour": next(iter(colours.values()))[0]}, name="images")
    chosen = ColumnDataSource({name: [] for side in range(len(units)) for name in (f"x{side}", f"y{side}")})
    maps = [drawn(side, name, source, chosen) for side, name in enumerate(found.sides)]
    found_lists = lists(found, *near[-1])
    show = HTMLTemplateFormatter(template='<% if (value) { %><img src="<%= value %>" height="48"><% } %>')
    names = {"thumb": "image", "path": "path", "class": "class", "other": "other image", "other_path": "its path",
             "score": "score", "note": ""}  # fmt: skip
    rows = ColumnDataSource({name: [] for name in ("index", *names)})
    pictured = {"formatter": show, "width": 60}
    table = DataTable(
        source=rows, width=2 * WIDTH, height=420, row_height=52, index_position=None, reorderable=False,
        columns=[TableColumn(field=name, title=words, **(pictured if name in ("thumb", "other") else {}))
                 for name, words in names.items()],
    )  # fmt: skip
    named = {
        "colour_by": Select(title="colour by", options=list(colours), value=next(iter(colours))),
        "with_pictures": Toggle(label="pictures on the map", active=True, align="end"),
        "legend": Div(width=2 * WIDTH),
        "panel": Div(width=2 * WIDTH, name="panel"),
        "which": Select(title="list", options=list(found_lists), value=next(iter(found_lists))),
        "told": Div(width=2 * WIDTH),
        "save": Button(label="save this list as a table", align="end", name="save"),
        "table": table,
    }
    head = Div(width=2 * WIDTH, text=(
        f"<h2>{html.escape(title)}</h2>{len(found.paths):,} images. Each point is one; images whose features are alike "
        "lie together, while distances between groups mean little (t-SNE). Scroll to zoom, which shows more pictures; "
        "click an image for its nearest neighbours."
    ))  # fmt: skip
    page = column(
        head,
        row(named["colour_by"], named["with_pictures"]),
        named["legend"],
        row(*(made for made, _ in maps)),
        named["panel"],
        row(named["which"], named["save"]),
        named["told"],
        table,
    )
    behaviour = CustomJS(code=SCRIPT, args={
        **named,
        "source": source,
        "chosen": chosen,
        "maps": [made for made, _ in maps],
        "laid": [laid for _, laid in maps],
        "near": [indices.ravel().astype(np.int32) for indices, _ in near],
        "names": list(found.sides),
        "legends": {name: words for name, (_, words) in colours.items()},
        "lists": {name: vars(one) for name, one in found_lists.items()},
    })  # fmt: skip
    document = Document()
    document.add_root(page)
    document.js_on_event("document_ready", behaviour)
    text = file_html(document, INLINE, title)
    policy = f'<head>\n    <meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    out.write_text(text.replace("<head>", policy, 1), encoding="utf-8")
