"""The rows of a run as its model would see them, and what is wrong with them; on a page, and on a terminal."""

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.text import Text

from jlora.config import Config
from jlora.data.checks import Check, Level, check, check_overlap, check_run, count_batches, describe, scan
from jlora.data.encoding import read_data, tokenize
from jlora.data.near import check_near
from jlora.data.packing import plan_steps
from jlora.data.preview import Piece, Shown, show_rows
from jlora.data.tokens import Tokenizer
from jlora.errors import ConfigError, DataError
from jlora.files.text import clean, counted
from jlora.hf.pretrained import open_tokenizer, stop_tokens, tokenizer_of
from jlora.hf.shapes import SHAPES
from jlora.reports import page
from jlora.reports.answers import Card, Cell, marked
from jlora.reports.charts import Chart, chart

Table = tuple[list[str], list[list[str]]]
COUNTS = {
    "rows": "rows read", "examples": "sequences", "tokens": "tokens", "trained_tokens": "trained tokens",
    "truncated": "rows cut off", "duplicates": "exact copies",
}  # fmt: skip
LENGTHS = {"min": "shortest", "median": "median", "p90": "90 % at most", "max": "longest"}

# How strong the colour of a token is whose loss hardly counts, in per cent of that of the one which counts most.
FAINT = 25
# Of checks, the worst first.
LEVELS = get_args(Level)

STYLES = {"context": "", "trained": "bold green", "cut": "strike red", "gap": "italic dim"}
# Of tools and of reasoning, trained or not.
COLOURS = {"tool": "cyan", "thought": "magenta"}
# Where there is no colour, what is trained and what is cut off stands in brackets.
BRACKETS = {"trained": "⟦⟧", "cut": "✂✂"}
BAR = 40


@dataclass(frozen=True)
class Seen:
    """What was found.

    Attributes:
      report: the JSON, but for the rows. rows: the first ones.
    """

    report: dict[str, Any]
    rows: list[Shown]

    @property
    def errors(self) -> list[str]:
        """The sentences for which the command fails."""
        return [found["sentence"] for found in self.report["checks"] if found["level"] == "error"]


def look(cfg: Config, num_rows: int) -> Seen:
    """Read a run's data as `train` does, and check them.

    Raises:
      UserError: as `train`; but rows that cannot be used, and would end it, are an error among the checks.
    """
    tokenizer, stops, positions = _tokenizer(cfg)
    checks: list[Check] = []
    try:
        train_data, eval_data = read_data(cfg, tokenizer)
    except DataError as error:
        if cfg.data.on_bad_row == "skip":
            raise
        section = cfg.data.model_copy(update={"on_bad_row": "skip"})
        try:
            train_data, eval_data = read_data(cfg.model_copy(update={"data": section}), tokenizer)
        except DataError:  # of what is left, which is not what is wrong first
            raise error from None
        num_bad = sum(sum(each.dropped.values()) for each in (train_data, eval_data) if each)
        checks.append(Check("bad_rows", "error", num_bad, _bad_rows(cfg, tokenizer, error)))
    report: dict[str, Any] = {"train": None, "eval": None, "near": []}
    hashes = {}
    for name, dataset in (("train", train_data), ("eval", eval_data)):
        if dataset is None:
            continue
        found = scan(dataset, cfg.data.longest, tokenizer.bos_id, stops)
        report[name], hashes[name] = describe(dataset, found), found.hashes
        checks += check(dataset, found, cfg, name)
    report["train"]["batches"] = count_batches(train_data, cfg)
    if eval_data is not None and isinstance(cfg.data.eval, float):  # a part of the rows that were read
        report["train"]["held_out"] = len(eval_data.examples)
        report["eval"]["truncated"] = None  # those of all rows are counted in `train`
    if eval_data is not None:
        exact = np.isin(hashes["eval"], hashes["train"])
        warned, report["near"] = check_near(train_data, eval_data, exact, tokenizer.decode)
        checks += check_overlap(eval_data, exact) + warned
    _, num_steps = plan_steps(cfg, train_data)
    report["steps"] = num_steps
    checks += check_run(cfg, num_steps, positions, tokenizer.chat_template is not None)
    report["checks"] = [asdict(found) for found in checks]
    each = -(-num_rows // len(cfg.data.sources))  # the first rows of every source
    rows = [row for source in cfg.data.sources for row in show_rows(source.path, each, tokenizer, cfg.data)]
    return Seen(report, rows[:num_rows])


def _bad_rows(cfg: Config, tokenizer: Tokenizer, first: DataError) -> str:
    """What is wrong with the rows of every source; `train` would tell the first source's alone."""
    sources = [(source.path, cfg.data) for source in cfg.data.sources]
    sources += [(cfg.data.eval, cfg.data.held_out)] if isinstance(cfg.data.eval, str) else []
    if len(sources) == 1:
        return str(first)
    says = []
    for path, section in sources:
        try:
            tokenize(path, tokenizer, section)
        except DataError as error:
            says.append(str(error))
    return "; and ".join(says)


def _tokenizer(cfg: Config) -> tuple[Tokenizer, list[int], Any]:
    """The run's tokenizer, the ids at which generation stops, and the base's positions, if it says them."""
    if cfg.model.path not in SHAPES:
        base = cfg.model
        tokenizer, config = tokenizer_of(base.path, base.tokenizer, cfg.data.chat_template, base.resize_embeddings)
        return tokenizer, stop_tokens(tokenizer, config), config.get("max_position_embeddings")
    if cfg.model.tokenizer is None:
        raise ConfigError(f"model.path={cfg.model.path} is a shape alone; set model.tokenizer to see the data")
    tokenizer = open_tokenizer(cfg.model.tokenizer, cfg.data.chat_template)
    return tokenizer, [tokenizer.eos_id], None


def render(title: str, report: dict[str, Any], rows: list[Shown]) -> str:
    """The page of a report (`Seen`) and its first rows.

    Args:
      title: such as the config's name.
    """
    sets = {name: report[name] for name in ("train", "eval") if report[name] is not None}
    shown = [piece for row in rows for sequence in row.sequences for piece in sequence]
    most = max([1.0, *(piece.weight for piece in shown)])
    runs = [[_runs(sequence, most) for sequence in row.sequences] for row in rows]
    return page.render(
        "data.html",
        name=title,
        checks=sorted(report["checks"], key=lambda found: LEVELS.index(found["level"])),
        near=[_near(**pair) for pair in report["near"]],
        train=report["train"],
        held_out=report["eval"],
        charts=[_lengths(f"data.{name}", found) for name, found in sets.items()],
        rows=_rows(sets),
        sources=_sources(report["train"]["sources"]),
        batches=_batches(report["train"]["batches"]),
        kinds={piece.kind for piece in shown},
        weighted=any(piece.weight not in (0.0, most) for piece in shown),
        first=list(zip(rows, runs, strict=True)),
    )


def _runs(sequence: list[Piece], most: float) -> list[tuple[str, int, list[Piece]]]:
    """Pieces that look alike and follow each other: their classes, and how strong their colour is, in per cent."""

    def look(piece: Piece) -> tuple[str, int]:
        shade = FAINT + (100 - FAINT) * piece.weight / most if piece.part == "trained" else 100
        return f"{piece.part} {piece.kind}".strip(), round(shade)

    return [(*looks, list(run)) for looks, run in groupby(sequence, look)]


def _near(places: list[str], share: float, texts: list[str]) -> Card:
    """A held-out sequence and a training one, with the words marked that are not in both."""
    pairs = zip(places, texts, reversed(texts), strict=True)
    return Card(f"about {share:.0%} alike", [], [Cell(place, marked(text, other)) for place, text, other in pairs])


def _rows(sets: dict[str, dict[str, Any]]) -> Table:
    reasons = sorted({reason for found in sets.values() for reason in found["dropped"]})
    counts = ((name, [found[key] for found in sets.values()]) for key, name in COUNTS.items())
    rows = [[name, *("" if count is None else f"{count:,}" for count in each)] for name, each in counts]
    if "held_out" in sets["train"]:
        rows.insert(1, ["of them held out", f"{sets['train']['held_out']:,}", *[""] * (len(sets) - 1)])
    rows += [[f"tokens, {k}", *(f"{found['lengths'][key]:,}" for found in sets.values())] for key, k in LENGTHS.items()]
    rows += [[f"bad rows: {k}", *(f"{found['dropped'].get(k, 0):,}" for found in sets.values())] for k in reasons]
    return ["", *(f"data.{name}" for name in sets)], rows


def _sources(sources: list[dict[str, Any]]) -> Table:
    rows = []
    for each in sources:
        weight = "–" if each["weight"] is None else f"{each['weight']:g}"
        rows.append([each["path"], weight, *(f"{each[key]:,}" for key in ("read", "examples", "first_epoch"))])
    return ["source", "weight", "rows", "sequences", "in epoch 1"], rows


def _batches(counts: dict[str, int]) -> Table:
    kinds = ("packed", "padded")
    rows = [["batches", *(f"{counts[kind]:,}" for kind in kinds)]]
    rows.append(["tokens worked through", *(f"{counts[f'{kind}_tokens']:,}" for kind in kinds)])
    rows.append(["of them not padding", *(f"{counts['tokens'] / counts[f'{kind}_tokens']:.1%}" for kind in kinds)])
    return ["", *kinds], rows


def _lengths(name: str, found: dict[str, Any]) -> Chart:
    """The histogram of lengths: sequences over tokens."""
    bars = [(low, high, count, f"{low:,} to {high - 1:,} tokens: {count:,}") for low, high, count in found["histogram"]]
    title, end = f"{name}: {found['examples']:,} sequences", found["histogram"][-1][1]
    return chart(title, "sequences", [], (0, end), across="tokens in a sequence", bars=bars)


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
    stops = any(found["name"] == "bad_rows" for found in report["checks"])
    wrong = "train would stop at the bad rows" if stops else "would train wrongly"
    verdict = wrong if errors else counted(warnings, "warning") if warnings else "nothing found wrong"
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
    cut = "" if found["truncated"] is None else f"cut {found['truncated']:,}, "
    say(
        f"  {cut}bad rows {sum(found['dropped'].values()):,}, "
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
