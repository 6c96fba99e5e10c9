"""A plan and a search for layouts as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(result: dict[str, Any]) -> None:
    """Tables for people: memory, then time and cost."""
    console = Console(highlight=False)
    word = "fits" if result["fits"] else "DOES NOT FIT"
    table = Table(title=f"{result['topology']}: {word}", title_justify="left")
    table.add_column("GiB per device")
    table.add_column("", justify="right")
    for name in ("base", "adapter", "optimizer", "batch", "argument", "temp", "peak", "capacity", "offloaded"):
        if name == "offloaded" and not result["offloaded_bytes"]:
            continue
        table.add_row(name, _gib(result[f"{name}_bytes"]))
    console.print(table)
    naive_gb = {name: value / 1e9 for name, value in result["naive"].items()}
    console.print(
        f"full fine-tuning would take {naive_gb['total_min']:,.0f}-{naive_gb['total']:,.0f} GB over all devices: "
        f"weights {naive_gb['weights']:,.0f}, gradients {naive_gb['gradients']:,.0f}, optimizer "
        f"{naive_gb['optimizer_min']:,.0f}-{naive_gb['optimizer']:,.0f}"
    )
    console.print(
        f"{result['trainable_params']:,} trained of {result['frozen_params'] + result['trainable_params']:,} "
        f"parameters; {result['flops_per_step']:.3g} FLOPs and {result['tokens_per_step']:,} tokens a step; "
        f"attention {result['attention']}; remat {result['remat']}; compiled in {result['compile_seconds']:.0f} s"
    )
    if result["seconds_per_epoch_at"]:
        console.print(time_table(result))


def time_table(result: dict[str, Any]) -> Table:
    """Hours and dollars of an epoch, by how rows are batched and at which speed."""
    cost, counts = result["cost_usd_at"], result["data"]
    rows = f" of {counts['rows']:,} rows and {counts['tokens']:,} tokens" if counts else ""
    table = Table(title=f"an epoch{rows} on {result['topology']}", title_justify="left")
    table.add_column("batches")
    table.add_column("tokens with padding", justify="right")
    table.add_column("speed")
    table.add_column("hours", justify="right")
    if cost:
        table.add_column("US dollars", justify="right")
    for name, times in result["seconds_per_epoch_at"].items():
        for at, seconds in times.items():
            tokens = f"{result['epoch_tokens'][name]:,.0f}"
            how = at if "tokens" in at else f"{float(at):.0%} of the peak"
            table.add_row(name, tokens, how, f"{seconds / 3600:,.2f}", *([f"{cost[name][at]:,.2f}"] if cost else []))
    return table


def print_search(found: dict[str, Any]) -> None:
    """A table of what was compiled, and the overrides of the fastest that fits."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{found['topology']}: {len(found['tried'])} of {found['layouts']} layouts compiled")
    for name in ("data", "fsdp", "tensor", "remat", "batch", "accum."):
        table.add_column(name, justify="left" if name == "remat" else "right")
    for name in ("quantization", "peak GiB", "tokens/s per device"):
        table.add_column(name, justify="right")
    for tried in sorted(found["tried"], key=lambda tried: (not tried["fits"], -_speed(tried), tried["peak_bytes"])):
        values = [override.partition("=")[2] for override in tried["overrides"]]
        speed = "too large" if not tried["fits"] else f"{_speed(tried):,.0f}" if tried["estimate"] else "-"
        best = tried["fits"] and tried["overrides"] == found["overrides"]
        table.add_row(*values, _gib(tried["peak_bytes"]), speed, style="bold" if best else None)
    console.print(table)
    if not found["fits"]:
        return
    console.print(
        "Tokens per second are an estimate, for ranking: FLOPs counted from the step, weights and temporaries "
        "through memory, and the collectives of the compiled program, each at its published peak, nothing overlapped."
        if found["best"]["estimate"]
        else "No peak is published for this hardware: fewest FLOPs and fewest bytes sent count as fastest."
    )
    if not found["batch_size_kept"]:
        console.print("No layout fits with training.batch_size as configured, so the fastest changes it.")
    console.print(f"fastest that fits: {' '.join(found['overrides'])}")


def _speed(tried: dict[str, Any]) -> float:
    return tried["estimate"]["tokens_per_second_per_device"] if tried["estimate"] else 0.0


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:,.2f}"
