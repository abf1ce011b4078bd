"""`coalm data stats`: what a set holds, as a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coalm_nemo.data.shards import ShardSet, read_manifest


def stats_command(directory: Path, picture: Path | None, as_json: bool) -> None:
    """Print the table and write the PNG. Raises UserError where `directory` is not a set."""
    manifest = read_manifest(directory)
    if as_json:
        print(json.dumps(manifest, ensure_ascii=False))
        return
    print_table(manifest)
    path = picture or Path(f"{str(directory).rstrip('/')}.png")
    draw(ShardSet.load(directory), path)
    print(f"picture: {path}")


def print_table(manifest: dict[str, Any]) -> None:
    """Sources with their rows, tokens, targets, shares and drops; then the set."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("source", "rows", "tokens", "a row", "supervised", "in the blend", "rows %", "tokens %", "targets %"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, source in manifest["sources"].items():
        blend = manifest["blend"][name]
        shares = [f"{100 * blend[f'share_of_{what}']:.1f}" for what in ("rows", "tokens", "supervised")]
        table.add_row(*_figures(name, source), f"{blend['rows']:,}", *shares)
    table.add_row(*_figures("all, blended", manifest), f"{manifest['rows']:,}", "100.0", "100.0", "100.0", style="bold")
    console.print(table)
    for line in _notes(manifest):
        console.print(line)


def _figures(name: str, of: dict[str, Any]) -> tuple[str, ...]:
    rows, tokens = of["rows"], of["tokens"]
    return name, f"{rows:,}", f"{tokens:,}", f"{tokens / rows:.1f}", f"{of['supervised_tokens'] / tokens:.1%}"


def _notes(manifest: dict[str, Any]) -> list[str]:
    packing = manifest["packing"]
    lines = [
        f"{packing['packs']:,} packs of {packing['seq_len_tokens']:,} tokens, {manifest['fill']:.2%} full; "
        f"template {manifest['template']}; sum of squared lengths {manifest['sum_of_squared_lengths']:,}"
    ]
    for name, source in manifest["sources"].items():
        known = ("rows", "tokens", "supervised_tokens", "dropped", "parts")
        counts = {**source["parts"], **{k: v for k, v in source.items() if k not in known}}
        if counts:
            lines.append(f"{name}: " + ", ".join(f"{what} {n:,}" for what, n in counts.items()))
        if source["dropped"]:
            lines.append(f"{name}, dropped: " + ", ".join(f"{why} {n:,}" for why, n in source["dropped"].items()))
    if manifest.get("contamination"):
        figures = ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in manifest["contamination"].items())
        lines.append(f"contamination guard: {figures}")
    return lines


def draw(rows: ShardSet, path: Path) -> None:
    """Three panels: row lengths by source, shares of rows, tokens and targets, and how full the packs are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (lengths, shares, fill) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _draw_lengths(rows, lengths)
    _draw_shares(rows.manifest, shares)
    _draw_fill(rows, fill)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_lengths(rows: ShardSet, axes: Any) -> None:
    import numpy as np

    lengths, sources = rows.positions() + 1, rows.sources()
    edges = np.geomspace(max(8, lengths.min()), lengths.max() + 1, 41)
    names = rows.source_names()
    axes.hist([lengths[sources == i] for i in range(len(names))], bins=edges, stacked=True, label=names)
    axes.set(xscale="log", xlabel="tokens a row", ylabel="rows", title="Row lengths")
    ticks = [t for t in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384) if edges[0] <= t <= edges[-1]]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)


def _draw_shares(manifest: dict[str, Any], axes: Any) -> None:
    left = [0.0, 0.0, 0.0]
    kinds = ("share_of_rows", "share_of_tokens", "share_of_supervised")
    for name, blend in manifest["blend"].items():
        widths = [100 * blend[kind] for kind in kinds]
        axes.barh(("rows", "tokens", "targets"), widths, left=left, label=name)
        for y, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 4:
                axes.text(start + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlabel="%", xlim=(0, 100), title="What an epoch is made of")
    axes.invert_yaxis()


def _draw_fill(rows: ShardSet, axes: Any) -> None:
    import numpy as np

    packing = rows.manifest["packing"]
    packs = rows.packs(packing["seq_len_tokens"], packing["multiple"])
    assert packs is not None
    held = np.add.reduceat(rows.positions()[packs.rows], packs.offsets[:-1])
    share = 100 * np.sort(held / packing["seq_len_tokens"])
    axes.plot(np.linspace(0, 100, len(share)), share)
    axes.set(xlabel="% of packs", ylabel="% of the pack that is tokens", ylim=(0, 102))
    axes.set_title(f"{len(share):,} packs, {rows.manifest['fill']:.2%} full")
