"""Draw the trials that a choice was made from: parts kept in fp32, and settings of a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.metric_titles import title_of
from deploykit.report.svg import INK, add_legend, colour_of, locator, marker_of, shown, to_svg

Record = Mapping[str, Any]


def search(searches: Mapping[str, Record], limits: Mapping[str, tuple[float, float]]) -> str:
    """Draw each metric of ``limits`` (the checkpoint's, and the lowest allowed) against the parts in fp32."""

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(1, len(limits), squeeze=False)[0]
        for axes, (metric, (reference, least)) in zip(all_axes, limits.items()):
            named = axes is all_axes[0]  # one legend for all panels
            axes.axhline(reference, color="grey", linewidth=1.2, label="checkpoint" if named else None)
            axes.axhline(least, color="grey", linestyle=":", linewidth=1.2, label="least allowed" if named else None)
            for i, (engine, found) in enumerate(searches.items()):
                trials = sorted(found["trials"], key=lambda trial: trial["kept"])
                points = [trial["kept"] for trial in trials], [trial["metrics"][metric] for trial in trials]
                axes.plot(*points, f"-{marker_of(i)}", color=colour_of(i), label=shown(engine) if named else None)
            axes.xaxis.set_major_locator(locator(8))
            axes.set(xlabel="parts left in fp32", ylabel=title_of(metric))
        add_legend(figure)

    return to_svg("search", draw)


def frontier(tuning: Record) -> str:
    """Draw the highest rate within the limit against memory, a mark for each trial.

    The chosen settings are a star, the present ones have a ring, settings without a rate within the limit are crosses.
    The line joins the settings that no other setting beats in both.
    """
    trials = [trial for trial in tuning["trials"] if trial["memory_mb"] is not None]
    graphs = list(dict.fromkeys((trial["engine"], trial["precision"]) for trial in trials))
    chosen, present = (tuning["trials"][tuning[key]] for key in ("chosen", "present"))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, graph in enumerate(graphs):
            of_graph = [t for t in trials if (t["engine"], t["precision"]) == graph]
            for holds, style in ((True, marker_of(i)), (False, "x")):
                points = [t for t in of_graph if t["holds"] is holds]
                label = shown(" ".join(graph) + ("" if holds else ", outside the limits")) if points else None
                x, y = [t["memory_mb"] for t in points], [t["rate_per_s"] or 0.0 for t in points]
                axes.plot(x, y, style, color=colour_of(i), markersize=7, label=label, clip_on=False)
        best: list[Record] = []
        for trial in sorted((t for t in trials if t["holds"]), key=lambda t: (t["memory_mb"], -t["rate_per_s"])):
            if not best or trial["rate_per_s"] > best[-1]["rate_per_s"]:
                best.append(trial)
        line = [t["memory_mb"] for t in best], [t["rate_per_s"] for t in best]
        axes.step(*line, where="post", color="grey", linewidth=1.2, label="frontier", zorder=1)
        if present["memory_mb"] is not None:
            at = [present["memory_mb"]], [present["rate_per_s"] or 0.0]
            ring = {"color": INK, "markersize": 15, "markerfacecolor": "none", "clip_on": False}
            axes.plot(*at, "o", label="served at present", **ring)
        at = [chosen["memory_mb"]], [chosen["rate_per_s"]]
        axes.plot(*at, "*", color=colour_of(len(graphs)), markersize=17, label="chosen", clip_on=False)
        if tuning["max_memory_mb"] is not None:
            axes.axvline(
                tuning["max_memory_mb"], color="grey", linestyle=":", linewidth=1.4, label="most memory allowed"
            )
        axes.set_ylim(bottom=0)
        slo = tuning["slo"]
        title = f"requests per second, {slo['figure']} within {slo['limit_ms']:g} ms"
        axes.set(xlabel="memory of the server, MB", ylabel=title)
        axes.margins(x=0.08)
        add_legend(figure)

    return to_svg("frontier", draw, (8.0, 5.2))
