"""Pictures of measured results: throughput by model, throughput and latency by batch, and the speed of whole jobs.

    python -m bench.plot bench/results/DEVICE-DATE/end_to_end.json

writes `throughput-PRECISION.svg`, `curve-PRECISION.svg` and `latency-PRECISION.svg` beside each file, or into
`--output`; of `pipeline.json`, `pipeline-PRECISION.svg`. A system that was not measured has no bar and no point.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .environment import Environment
from .report import save

Row = dict[str, Any]
Draw = Callable[[Any, Sequence[Row]], None]  # draws one model's rows into a panel

OURS = "clip_fast"
_OURS_COLOUR = "#d55e00"
_RIVAL_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#666666", "#332288", "#999933", "#882255")
_COLUMNS = 3  # of panels
_PANEL = (4.2, 2.8)  # inches


def pictures(document: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG, from a document of `bench.end_to_end` or `bench.pipeline`.

    Raises:
        ValueError: the document is another benchmark's, or nothing in it was measured.
        ModuleNotFoundError: matplotlib is not installed.
    """
    draw = {"end_to_end": _of_encoders, "pipeline": _of_jobs}.get(document.get("bench", ""))
    if draw is None:
        raise ValueError(f"expected results of 'end_to_end' or 'pipeline', got {document.get('bench')!r}")
    rows: list[Row] = [row for row in document["rows"] if "images_per_second" in row]
    if not rows:
        raise ValueError("nothing was measured in these results")
    return draw(rows, Environment(**document["environment"]).line())


def _of_encoders(rows: Sequence[Row], caption: str) -> dict[str, str]:
    colours = _colours(rows)

    def bars(axes: Any, of_model: Sequence[Row]) -> None:
        _throughput(axes, of_model, colours)

    def speeds(axes: Any, of_model: Sequence[Row]) -> None:
        _curves(axes, of_model, colours, "images per second", lambda row: row["images_per_second"])

    def latencies(axes: Any, of_model: Sequence[Row]) -> None:
        _curves(axes, of_model, colours, "ms", lambda row: row["seconds"] * 1e3)

    drawn: dict[str, str] = {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        these = [row for row in rows if row["precision"] == precision]
        throughput = f"Images per second, {precision}, at the batch that most systems were measured at"
        drawn[f"throughput-{precision}.svg"] = _figure(throughput, caption, these, bars)
        for name, title, draw in (
            ("curve", "Images per second by batch size", speeds),
            ("latency", "Milliseconds by batch size", latencies),
        ):
            drawn[f"{name}-{precision}.svg"] = _figure(f"{title}, {precision}", caption, these, draw)
    return drawn


def _of_jobs(rows: Sequence[Row], caption: str) -> dict[str, str]:
    """A panel for each job, which is a model and a kind of photographs."""
    colours = _colours(rows)

    def draw(axes: Any, of_job: Sequence[Row]) -> None:
        _bars(axes, of_job, colours)
        axes.set_title(of_job[0]["model"], loc="left", fontsize=9)

    drawn: dict[str, str] = {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        these = [row | {"model": f"{row['model']}, {row['kind']}"} for row in rows if row["precision"] == precision]
        title = f"Images per second from files to files, {precision}"
        drawn[f"pipeline-{precision}.svg"] = _figure(title, caption, these, draw)
    return drawn


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    rivals = [name for name in dict.fromkeys(row["system"] for row in rows) if name != OURS]
    return {OURS: _OURS_COLOUR} | {name: _RIVAL_COLOURS[i % len(_RIVAL_COLOURS)] for i, name in enumerate(rivals)}


def _figure(title: str, caption: str, rows: Sequence[Row], draw: Draw) -> str:
    """A panel for each model."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install clip-fast[bench]") from error
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = min(_COLUMNS, len(models))
    lines = -(-len(models) // columns)
    # Text is kept as text, which is small, and sharp at any size. With the salt the same picture is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines + 0.8), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes, model in zip(panels, models, strict=False):
            draw(axes, [row for row in rows if row["model"] == model])
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(models) :]:
            axes.set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:  # curves need a legend; bars are beside their names
            figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=7)
        figure.suptitle(title, fontsize=10)
        figure.supxlabel(textwrap.fill(caption, round(_PANEL[0] * columns * 22)), fontsize=5, color="#555555")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _bars(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """A bar for each system, the fastest on top."""
    rows = sorted(rows, key=lambda row: row["images_per_second"])
    names = [row["system"] for row in rows]
    speeds = [row["images_per_second"] for row in rows]
    bars = axes.barh(names, speeds, color=[colours[name] for name in names], height=0.7)
    axes.bar_label(bars, labels=[f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}" for speed in speeds], padding=2)
    axes.set_xlim(0, 1.12 * max(speeds))


def _throughput(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """Bars at the batch that most systems were measured at, the largest of several such batches, and the roofline."""
    systems = Counter(row["batch"] for row in rows)
    batch = max(systems, key=lambda batch: (systems[batch], batch))
    rows = [row for row in rows if row["batch"] == batch]
    _bars(axes, rows, colours)
    roofline = rows[0]["images_per_second"] / rows[0]["to_roofline"]
    axes.axvline(roofline, color="black", linestyle="--", linewidth=1)
    axes.text(roofline, len(rows) - 0.45, f"roofline {roofline:,.0f}", ha="right", va="bottom", fontsize=7)
    axes.set_xlim(0, 1.12 * max(*(row["images_per_second"] for row in rows), roofline))
    axes.set_title(f"{rows[0]['model']}, batch {batch}", loc="left", fontsize=9, pad=12)


def _curves(axes: Any, rows: Sequence[Row], colours: dict[str, str], unit: str, value: Callable[[Row], float]) -> None:
    """What a batch reaches against its size, on logarithmic axes."""
    for name in dict.fromkeys(row["system"] for row in rows):
        points = sorted((row["batch"], value(row)) for row in rows if row["system"] == name)
        ours = name == OURS
        axes.plot(
            *zip(*points, strict=True),
            color=colours[name], label=name, marker="o", markersize=3, linewidth=2 if ours else 1,
            zorder=3 if ours else 2,
        )  # fmt: skip
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=5)
    axes.set_xlabel("batch")
    axes.set_ylabel(unit)
    axes.set_title(rows[0]["model"], loc="left", fontsize=9)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON of `bench.end_to_end` or `bench.pipeline`")
    parser.add_argument("--output", type=Path, help="folder for the pictures; by default that of the results")
    options = parser.parse_args(arguments)
    for path in options.results:
        try:
            drawn = pictures(json.loads(path.read_text()))
        except (OSError, ValueError, ModuleNotFoundError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        for name, svg in drawn.items():
            target = (options.output or path.parent) / name
            save(target, svg)
            print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
