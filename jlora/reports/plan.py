"""A plan and a search for layouts as tables on the terminal; and `plan --plot`, what one device would hold, as bars.

The picture needs matplotlib, and nothing of JAX.
"""

import io
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from jlora.errors import ConfigError, require_installed, with_extra
from jlora.files.atomic import write_bytes
from jlora.reports.figures import duration

GIB = 2**30
# Okabe and Ito's palette, told apart by colour-blind readers; the pale ones get the dark text.
COLOURS = {"base weights": "#0072B2", "adapter": "#009E73", "optimizer": "#F0E442", "batch": "#CC79A7"}
COLOURS |= {"temporaries": "#56B4E9", "gradients": "#D55E00"}
INK, GREY = "#222222", "#666666"
RIGHT = partial(Column, justify="right")


def print_plan(result: dict[str, Any]) -> None:
    """Tables for people: memory, then time and cost."""
    console = Console(highlight=False)
    word = "fits" if result["fits"] else "DOES NOT FIT"
    table = Table("GiB per device", RIGHT(), title=f"{result['topology']}: {word}", title_justify="left")
    for name in ("base", "adapter", "optimizer", "batch", "argument", "temp", "peak", "capacity", "offloaded"):
        if name == "offloaded" and not result["offloaded_bytes"]:
            continue
        table.add_row(name, _gib(result[f"{name}_bytes"]))
    console.print(table)
    if on_cpu := result["topology"].startswith("cpu:"):
        console.print("the peak is that of a step; the process takes more: Python, JAX with its compiler, the rows")
    naive = {name: _size(value) for name, value in result["naive"].items()}
    console.print(
        f"full fine-tuning would take {naive['total_min']} to {naive['total']} over all devices: weights "
        f"{naive['weights']}, gradients {naive['gradients']}, optimizer {naive['optimizer_min']} to "
        f"{naive['optimizer']}"
    )
    console.print(
        f"{result['naive']['weights'] // 2:,} parameters, {result['trainable_params']:,} trained; "
        f"{result['flops_per_step']:.3g} FLOPs and {result['tokens_per_step']:,} tokens a step; "
        f"attention {result['attention']}; remat {result['remat']}; compiled in {result['compile_seconds']:.0f} s"
    )
    if found := result["estimate"]:
        parts = {name: found[f"{name}_seconds"] / found["mid"] for name in ("compute", "memory", "link")}
        console.print(
            f"a step is estimated to take {found['mid']:.3g} s, {found['low']:.3g} to {found['high']:.3g}: "
            f"{found['tokens_per_second_per_device']:,.0f} tokens/s a device; "
            + ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
        )
    if result["seconds_per_epoch_at"]:
        console.print(time_table(result))
    elif not result["epoch_tokens"]:
        console.print("no time: the config's rows or their tokenizer are not here; give --tokens of an epoch")
    elif on_cpu:
        console.print("no time: no peak of a CPU is published; give a speed, as measured, with --tokens-per-second")


def time_table(result: dict[str, Any]) -> Table:
    """Time and dollars of an epoch, by how rows are batched: as estimated, and at which speed."""
    cost, counts = result["cost_usd_at"], result["data"]
    estimated, dollars = result["seconds_per_epoch"], result["cost_usd"]
    rows = f" of {counts['rows']:,} rows and {counts['tokens']:,} tokens" if counts else ""
    heads: list[Column | str] = ["batches", RIGHT("with padding"), "speed", RIGHT("time")]
    heads += [RIGHT("US dollars")] if cost else []
    table = Table(*heads, title=f"an epoch{rows} on {result['topology']}", title_justify="left")
    for name, times in result["seconds_per_epoch_at"].items():
        tokens = f"{result['epoch_tokens'][name]:,.0f}"
        if ends := estimated.get(name):
            row = [f"{duration(ends['low'])} to {duration(ends['high'])}"]
            row += [f"{dollars[name]['low']:,.2f} to {dollars[name]['high']:,.2f}"] if dollars else []
            table.add_row(name, tokens, "as estimated", *row)
        for at, seconds in times.items():
            how = at if "tokens" in at else f"{float(at):.0%} of the peak"
            table.add_row(name, tokens, how, duration(seconds), *([f"{cost[name][at]:,.2f}"] if cost else []))
    return table


def print_search(found: dict[str, Any]) -> None:
    """A table of what was compiled, and the overrides of the fastest that fits."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{found['topology']}: {len(found['tried'])} of {found['layouts']} layouts compiled")
    settings = ("data", "fsdp", "tensor", "context", "remat", "batch", "accum.", "quantization")
    for name in (*settings, "peak GiB", "tokens/s per device"):
        table.add_column(name, justify="left" if name == "remat" else "right")
    for tried in sorted(found["tried"], key=lambda tried: (not tried["fits"], -_speed(tried), tried["peak_bytes"])):
        values = [override.partition("=")[2] for override in tried["overrides"]]
        speed = "too large" if not tried["fits"] else f"{_speed(tried):,.0f}" if tried["estimate"] else "-"
        best = tried["fits"] and tried["overrides"] == found["overrides"]
        table.add_row(*values, _gib(tried["peak_bytes"]), speed, style="bold" if best else None)
    console.print(table)
    if not found["fits"]:
        return
    console.print(
        "Tokens per second are estimated from the compiled program, operation by operation, at rates that such devices "
        "were measured to reach; docs/planner.md says how far off that may be."
        if found["best"]["estimate"]
        else "No peak is published for this hardware: fewest FLOPs and fewest bytes sent count as fastest."
    )
    if not found["batch_size_kept"]:
        console.print("No layout fits with training.batch_size as configured, so the fastest changes it.")
    console.print(f"fastest that fits: {' '.join(found['overrides'])}")


def _speed(tried: dict[str, Any]) -> float:
    return tried["estimate"]["tokens_per_second_per_device"] if tried["estimate"] else 0.0


def _size(value: int) -> str:
    """Bytes in GB, or in MB below one."""
    if value < 1e9:
        return f"{value / 1e6:,.{int(value < 1e7)}f} MB"
    return f"{value / 1e9:,.{int(value < 1e10)}f} GB"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:,.2f}"


def require_matplotlib(what: str = "--plot") -> None:
    """Refuse to draw without matplotlib.

    Raises:
      ConfigError: it is not installed.
    """
    require_installed(what, ("matplotlib",), with_extra("plot"))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """One row a result: the run's bar of a device at the left, full fine-tuning over the same devices at the right.

    Args:
      results: what `jlora.planning.compiled.plan` gives, one for each topology.
      path: of the picture; its ending says which format.

    Raises:
      ConfigError: the ending is none that matplotlib writes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    height = 1.75 + 0.95 * len(results)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, height), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    kind = path.suffix.lstrip(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ConfigError(f"--plot {path}: unsupported image format '{path.suffix}'; end the name in .png")
    for row, result in enumerate(results):
        capacity = result["capacity_bytes"] / GIB
        _stack(left, row, _ours(result))
        _stack(right, row, _full(result))
        for axes in (left, right):
            for colour, width in (("white", 4.5), (INK, 2)):  # seen on a dark bar, too
                axes.plot([capacity, capacity], [row - 0.25, row + 0.25], color=colour, linewidth=width, zorder=3)
    most = max(max(result["peak_bytes"], result["capacity_bytes"]) / GIB for result in results)
    left.set_xlim(0, most * 1.04)
    right.set_xlim(0, max(sum(_full(result).values()) for result in results) * 1.2)
    for row, result in enumerate(results):
        _write_beside(left, right, row, result)
    left.set_yticks(range(len(results)), [_name(result) for result in results])
    left.set_ylim(len(results) - 0.45, -0.65)
    left.set_title("this run, compiled", loc="left", fontsize=11, color=INK)
    right.set_title("full fine-tuning, split evenly", loc="left", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel("GiB per device", color=GREY)
        axes.tick_params(axis="both", length=0, colors=GREY)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    handles: list[Any] = [Patch(facecolor=colour, label=name) for name, colour in COLOURS.items()]
    handles.append(Line2D([], [], color=INK, linewidth=2, label="what a device has"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=110, facecolor="white")
    write_bytes(path, file.getvalue())
    pyplot.close(figure)


def _ours(result: dict[str, Any]) -> dict[str, float]:
    held = {"base weights": result["base_bytes"] / GIB}
    held |= {name: result[f"{name}_bytes"] / GIB for name in ("adapter", "optimizer", "batch")}
    return held | {"temporaries": result["peak_bytes"] / GIB - sum(held.values())}


def _full(result: dict[str, Any]) -> dict[str, float]:
    return {name: result["naive"][name] / GIB / result["devices"] for name in ("weights", "gradients", "optimizer")}


def _stack(axes: Any, row: int, parts: dict[str, float]) -> None:
    colours = COLOURS | {"weights": COLOURS["base weights"]}
    start = 0.0
    for name, size in parts.items():
        # White seams, so that neighbours part without colour too; of a thin part they would leave nothing.
        seam = 0.6 if size > 0.02 * sum(parts.values()) else 0.0
        axes.barh(row, size, left=start, height=0.46, color=colours[name], edgecolor="white", linewidth=seam, zorder=2)
        start += size


def _write_beside(left: Any, right: Any, row: int, result: dict[str, Any]) -> None:
    """The figures under each bar, since adapter and optimizer are thin."""
    capacity, peak, full = result["capacity_bytes"] / GIB, result["peak_bytes"] / GIB, _full(result)
    word = "fits" if result["fits"] else f"{peak - capacity:,.1f} too much"
    ours = f"{peak:,.1f} of {capacity:,.1f} GiB: {word}"
    style = {"va": "center", "fontsize": 8.5, "color": GREY, "zorder": 4}
    for axes, head, parts in (left, ours, _ours(result)), (right, f"{sum(full.values()):,.0f} GiB", full):
        axes.text(0, row + 0.345, ", ".join(f"{name} {_short(size)}" for name, size in parts.items()), **style)
        axes.text(0, row - 0.345, head, **style | {"color": INK, "fontweight": "bold"})


def _short(size: float) -> str:
    return f"{size:,.1f}" if size >= 10 else f"{size:.2g}" if size >= 0.01 else "<0.01"


def _name(result: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    devices = result["devices"]
    return f"{result['topology']}\n{devices} device{'s' * (devices > 1)}{', ' + mesh if mesh else ''}"
