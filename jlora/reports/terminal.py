"""The data on a terminal. Knows nothing of how figures are found."""

from typing import Any

from rich.console import Console
from rich.text import Text

from jlora.data.preview import Piece, Shown
from jlora.files.text import clean, counted

STYLES = {"context": "", "trained": "bold green", "cut": "strike red", "gap": "italic dim"}
# Of tools and of reasoning, trained or not.
COLOURS = {"tool": "cyan", "thought": "magenta"}
# Where there is no colour, what is trained and what is cut off stands in brackets.
BRACKETS = {"trained": "⟦⟧", "cut": "✂✂"}
BAR = 40


def print_report(report: dict[str, Any], rows: list[Shown], console: Console) -> None:
    """Figures, warnings and notes, and the first rows."""

    def say(text: str = "") -> None:
        console.print(clean(text), markup=False, highlight=False, soft_wrap=True)

    for name in ("train", "eval"):
        if report[name] is not None:
            _print_set(name, report[name], say)
    for found in report["checks"]:
        if found["level"] != "error":
            say(f"{found['level']}: {found['sentence']}")
    for pair in report["near"]:
        say(f"  about {pair['share']:.0%} alike, around where they part:")
        for place, text in zip(pair["places"], pair["texts"], strict=True):
            say(f"    {place}: {' '.join(text.split())}")
    errors, warnings = (sum(found["level"] == level for found in report["checks"]) for level in ("error", "warning"))
    verdict = "would train wrongly" if errors else counted(warnings, "warning") if warnings else "nothing found wrong"
    say(f"{counted(report['steps'], 'optimizer step')}; {verdict}")
    if rows:
        plain = console.color_system is None
        legend = Text("\nthe first rows: ")
        for part, words in (("context", "not trained"), ("trained", "trained"), ("cut", "cut off")):
            marks = BRACKETS.get(part, "  ") if plain else "  "
            legend.append(f"{marks[0]}{words}{marks[1]}".strip(), STYLES[part]).append("  ")
        kinds = {piece.kind for row in rows for sequence in row.sequences for piece in sequence}
        for kind, words in (("tool", "tools"), ("thought", "reasoning")):
            if kind in kinds and not plain:
                legend.append(words, COLOURS[kind]).append("  ")
        console.print(legend)
        for row in rows:
            _print_row(row, plain, console)


def _print_set(name: str, found: dict[str, Any], say: Any) -> None:
    lengths = found["lengths"]
    held_out = f" ({found['held_out']:,} of them held out)" if "held_out" in found else ""
    say(
        f"{name}: {found['rows']:,} rows{held_out}, {found['examples']:,} sequences, {found['tokens']:,} tokens, "
        f"{found['trained_tokens']:,} of them trained ({found['trained_tokens'] / found['tokens']:.1%})"
    )
    say(
        f"  cut {found['truncated']:,}, dropped {sum(found['dropped'].values()):,}, "
        f"exact copies {found['duplicates']:,}; tokens a sequence: {lengths['min']:,} to {lengths['max']:,}, "
        f"median {lengths['median']:,}, 90 % at most {lengths['p90']:,}, 99 % at most {lengths['p99']:,}"
    )
    for source in found["sources"]:
        weight = "" if source["weight"] is None else f"weight {source['weight']:g}, "
        say(
            f"  {source['path']}: {weight}{source['read']:,} rows, {source['examples']:,} sequences, "
            f"{source['first_epoch']:,} of them in the first epoch"
        )
    if batches := found.get("batches"):
        for kind in ("packed", "padded"):
            full = batches["tokens"] / batches[f"{kind}_tokens"]
            say(f"  {kind}: {batches[kind]:,} batches an epoch, {full:.1%} of their tokens are not padding")
    most = max(count for *_, count in found["histogram"])
    last = f"{found['histogram'][-1][1] - 1:,}"
    for low, high, count in found["histogram"]:
        if not count:
            continue
        bar = "█" * -(-count * BAR // most)
        say(f"  {low:>{len(last)},} to {high - 1:>{len(last)},} tokens {bar} {count:,}")


def _print_row(row: Shown, plain: bool, console: Console) -> None:
    cut = f", {row.cut:,} cut off" if row.cut else ""
    what = row.bad or f"{row.tokens:,} tokens, {row.trained:,} trained{cut}"
    console.print(Text(clean(f"\n── {row.where}: {what}"), "dim"))
    for pieces in row.sequences:
        text, before = Text(), "context"
        for piece in pieces:
            if plain and piece.part != before:
                text.append(BRACKETS.get(before, "  ")[1].strip() + BRACKETS.get(piece.part, "  ")[0].strip())
            before = piece.part
            words = f"[… {piece.text} …]" if piece.part == "gap" else piece.text
            text.append(words, _style(piece) + " reverse" * piece.special)
        if plain:
            text.append(BRACKETS.get(before, "  ")[1].strip())
        console.print(text, soft_wrap=True)


def _style(piece: Piece) -> str:
    """How a piece looks: what counts less is not bold."""
    if piece.part not in ("context", "trained"):
        return STYLES[piece.part]
    style = STYLES[piece.part].replace("bold", "bold" if piece.weight >= 1.0 else "")
    return style.replace("green", COLOURS[piece.kind]) if piece.kind and style else COLOURS.get(piece.kind, style)
