"""What a server says beside what was trained, as a page: `jlora verify --html`. Knows nothing of servers or models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.data.speakers import Turn
from jlora.files.text import counted
from jlora.reports.answers import Card, Cell, marked, whole
from jlora.reports.page import render, write_page

TRAINED = "As trained"
# Rows on the page; the first that differ come first.
MOST_CARDS = 24


class ServedAnswer(NamedTuple):
    """A row's prompt and answers.

    Attributes:
      said: who -> text, and whether it goes on; `TRAINED` is what others are compared with.
    """

    where: str
    turns: Sequence[Turn]
    reference: str | None
    said: dict[str, tuple[str, bool]]

    @property
    def differs(self) -> bool:
        """Whether a server's text is not the trained model's."""
        wanted = self.said[TRAINED][0]
        return any(text != wanted for name, (text, _) in self.said.items() if name.startswith("Server"))


def write_served(path: Path, result: dict[str, Any], answers: Sequence[ServedAnswer]) -> None:
    """Write the page whole or not at all.

    Args:
      result: as `jlora verify --json` prints it.

    Raises:
      ConfigError: it cannot be written there.
    """
    differing = [each for each in answers if each.differs]
    ordered = differing + [each for each in answers if not each.differs]
    lead = f"{counted(result['rows'], 'row')}, {counted(result['tokens'], 'token')} compared by {result['compared']}; "
    lead += f"{len(differing)} answered in other words than the trained model's."
    page = render(
        "served.html",
        title=f"{result['model']}, as it is served",
        lead=lead,
        passed=result["passed"],
        faults=[(fault["fault"].replace("_", " "), fault["says"]) for fault in result["faults"]],
        notes=result["notes"],
        figures=_figures(result),
        facts={"Server": result["endpoint"], "Model": result["model"], "Run": result["run"]},
        cards=[_card(each) for each in ordered[:MOST_CARDS]],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, page)


def _figures(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table."""

    def nats(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    rows = [
        ["Difference from what was trained, nats a token", nats(result["difference"])],
        ["Difference from the base alone", nats(result["difference_from_base"])],
        ["Allowed (--bound)", nats(result["bound"])],
        [
            "Tokens that the trained model would say, too",
            "–" if result["agreeing"] is None else f"{result['agreeing']:.1%}",
        ],
    ]
    if (loss := result["loss"]) is not None:
        kept = "" if loss["gain_kept"] is None else f" ({loss['gain_kept']:.0%} of the gain kept)"
        rows.append(["Loss of the rows by the server", f"{loss['server']:.4f}{kept}"])
        rows.append(["The same as trained, and of the base", f"{loss['trained']:.4f}, {loss['base']:.4f}"])
    return rows


def _card(each: ServedAnswer) -> Card:
    wanted = each.said[TRAINED][0]
    cells = [] if each.reference is None else [Cell("Reference", whole(each.reference), apart=True)]
    for name, (text, cut) in each.said.items():
        if name == TRAINED:
            cells.append(Cell(name, whole(text), cut=cut, wanted=True))
        else:
            note = "the same text" if text == wanted else ""
            cells.append(Cell(name, marked(text, wanted), note, cut=cut))
    return Card(each.where, each.turns, cells)
