"""`plan --plot`: what one device would hold, as bars against what it has. Needs matplotlib, and nothing of JAX."""

import importlib.util
import io
from pathlib import Path
from typing import Any

from jlora.errors import ConfigError
from jlora.files.atomic import write_bytes

GIB = 2**30
# Okabe and Ito's palette, told apart by colour-blind readers; the pale ones get the dark text.
OURS = {"base weights": "#0072B2", "adapter": "#009E73", "optimizer": "#F0E442", "batch": "#CC79A7"}
OURS_REST = ("temporaries", "#56B4E9")
FULL = {"weights": "#0072B2", "gradients": "#D55E00", "optimizer": "#F0E442"}
INK, GREY = "#222222", "#666666"


def require_matplotlib(what: str = "--plot") -> None:
    """Refuse to draw without matplotlib.

    Raises:
      ConfigError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{what} needs matplotlib, which is not installed; pip install 'jlora[plot]'")


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
    _legend(figure)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=110, facecolor="white")
    write_bytes(path, file.getvalue())
    pyplot.close(figure)


def _ours(result: dict[str, Any]) -> dict[str, float]:
    held = [result[f"{name}_bytes"] / GIB for name in ("base", "adapter", "optimizer", "batch")]
    return dict(zip(OURS, held, strict=True)) | {OURS_REST[0]: result["peak_bytes"] / GIB - sum(held)}


def _full(result: dict[str, Any]) -> dict[str, float]:
    return {name: result["naive"][name] / GIB / result["devices"] for name in FULL}


def _stack(axes: Any, row: int, parts: dict[str, float]) -> None:
    colours = OURS | dict([OURS_REST]) if OURS_REST[0] in parts else FULL
    start = 0.0
    for name, size in parts.items():
        # White seams, so that neighbours part without colour too; of a thin part they would leave nothing.
        seam = 0.6 if size > 0.02 * sum(parts.values()) else 0.0
        axes.barh(row, size, left=start, height=0.46, color=colours[name], edgecolor="white", linewidth=seam, zorder=2)
        start += size


def _write_beside(left: Any, right: Any, row: int, result: dict[str, Any]) -> None:
    """The figures under each bar, since adapter and optimizer are thin."""
    capacity, peak = result["capacity_bytes"] / GIB, result["peak_bytes"] / GIB
    word = "fits" if result["fits"] else f"{peak - capacity:,.1f} too much"
    parts = ", ".join(f"{name} {_short(size)}" for name, size in _ours(result).items())
    style = {"va": "center", "fontsize": 8.5, "color": GREY, "zorder": 4}
    left.text(0, row + 0.345, parts, **style)
    left.text(
        0, row - 0.345, f"{peak:,.1f} of {capacity:,.1f} GiB: {word}", **style | {"color": INK, "fontweight": "bold"}
    )
    total = sum(_full(result).values())
    right.text(0, row - 0.345, f"{total:,.0f} GiB", **style | {"color": INK, "fontweight": "bold"})
    right.text(0, row + 0.345, ", ".join(f"{name} {_short(size)}" for name, size in _full(result).items()), **style)


def _short(size: float) -> str:
    return f"{size:,.1f}" if size >= 10 else f"{size:.2g}" if size >= 0.01 else "<0.01"


def _name(result: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    devices = result["devices"]
    return f"{result['topology']}\n{devices} device{'s' * (devices > 1)}{', ' + mesh if mesh else ''}"


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = OURS | dict([OURS_REST]) | {"gradients": FULL["gradients"]}
    handles: list[Any] = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    handles.append(Line2D([], [], color=INK, linewidth=2, label="what a device has"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5)
