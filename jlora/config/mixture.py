"""What `data.train` may list: the sources of a mixture, each a path and a weight."""

from typing import Annotated, Any

from pydantic import Field

from jlora.config.section import NonEmpty, Section


class DataSource(Section):
    """One source of a mixture; without weights, every row of every source comes once an epoch."""

    path: NonEmpty = Field(description="file, folder or hub data set")
    weight: Annotated[float, Field(gt=0.0)] | None = Field(None, description="share of an epoch, of the weights' sum")


def check_mixture(entries: list[Any]) -> list[Any]:
    """The entries as they are, if they can be sources.

    Raises:
      ValueError: one cannot, or some have a weight and some have none.
    """
    trees = [entry.model_dump() if isinstance(entry, DataSource) else entry for entry in entries]
    for tree in trees:
        if not isinstance(tree, dict) or not isinstance(tree.get("path"), str):
            raise ValueError(f"each source of a mixture is {{path: FILE, weight: NUMBER}}, not {tree!r:.200}")
        if unknown := sorted(map(str, tree.keys() - DataSource.model_fields.keys())):
            raise ValueError(f"a source of a mixture has path and weight, not '{unknown[0]}'")
    if len({tree.get("weight") is None for tree in trees}) > 1:
        raise ValueError("give every source of the mixture a weight, or none of them")
    return entries
