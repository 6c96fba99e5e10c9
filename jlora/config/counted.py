"""What of a row the loss counts: the values of the keys for it."""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

Role = Literal["system", "developer", "user", "assistant", "tool", "ipython", "function"]
TrainOn = Literal["response", "last", "all"] | Annotated[list[Role], Field(min_length=1)]
TrainOnEos = Literal["turn", "last", "none"]
Reasoning = Literal["keep", "strip", "mask"]
# Fields of a turn that say how much its loss counts: as OpenAI, Axolotl, LLaMA-Factory, torchtune and verl name them.
TURN_WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask")


class Counted(NamedTuple):
    """The keys of `DataSection` of these names."""

    train_on: str | Sequence[str]
    train_on_eos: str
    reasoning: str
