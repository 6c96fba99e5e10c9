"""The section `data` of a run's configuration: rows, and how they become batches."""

import datetime
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, field_validator

from jlora.config.section import NonEmpty, Positive, Section

Format = Literal["alpaca", "completion", "text", "messages", "sharegpt", "preference"]
Prompt = Literal["stanford", "chat"]
Role = Literal["system", "developer", "user", "assistant", "tool", "ipython", "function"]
TrainOn = Literal["response", "last", "all"] | Annotated[list[Role], Field(min_length=1)]
TrainOnEos = Literal["turn", "last", "none"]
Reasoning = Literal["keep", "strip", "mask"]
# Fields of a turn that say how much its loss counts: as OpenAI, Axolotl, LLaMA-Factory, torchtune and verl name them.
TURN_WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask")


class Counted(NamedTuple):
    """What of a row the loss counts: the keys of `DataSection` of these names."""

    train_on: str | Sequence[str]
    train_on_eos: str
    reasoning: str


class DataSource(Section):
    """One source of a mixture; without weights, every row of every source comes once an epoch."""

    path: NonEmpty = Field(description="file, folder or hub data set")
    weight: Positive | None = Field(None, description="share of an epoch, of the weights' sum")


def _day(text: str) -> str:
    datetime.date.fromisoformat(text)
    return text


class DataSection(Section):
    """Rows, and how they become batches."""

    train: NonEmpty | Annotated[list[DataSource], Field(min_length=1)] = Field(
        description="json, jsonl, parquet, csv or txt file, a folder of them, or a hub data set; or a list of such, "
        "each {path, weight}, of which an epoch has shares by weight: see docs/data.md"
    )
    eval: NonEmpty | Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="held-out rows: another file or data set, or a fraction of train"
    )
    split: NonEmpty = Field(
        "train",
        description="split to read of a hub data set, or of a folder, where names of files tell it; or some of its "
        "rows, such as train[:1000], which serves for files too",
    )
    eval_split: NonEmpty | None = Field(None, description="split that data.eval reads; null: that of data.split")
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="what parts the fields of a csv file; null: what parts the names in its first line"
    )
    format: Format = Field(
        "alpaca",
        description="alpaca (instruction, input, output), completion (prompt, completion), text (text), "
        "messages (messages: role, content), sharegpt (conversations: from, value) or preference (prompt, chosen, "
        "rejected)",
    )
    columns: dict[str, NonEmpty] = Field(
        {},
        description="column of the format -> its name in the rows, such as {instruction: question, output: answer}; "
        "usual names are found without",
    )
    prompt: Prompt = Field(
        "stanford", description="how an alpaca row is written: Stanford's prompt, or the model's chat template"
    )
    chat_template: str | None = Field(
        None, description="llama2, chatml or a .jinja file; null takes the tokenizer's own"
    )
    date: Annotated[str, AfterValidator(_day)] | None = Field(
        None, description="day that a chat template with `strftime_now` writes, such as 2026-11-28; null: today"
    )
    max_length: Annotated[int, Field(ge=2, le=2**20)] = Field(
        1024,
        description="tokens in a row of a batch; the two sequences of a preference pair share a row, half of it each",
    )
    packing: bool = Field(True, description="several short rows in one row of a batch, isolated from each other")
    split_long: bool = Field(
        True, description="a text row longer than max_length becomes several sequences; false cuts it at its end"
    )
    train_on: TrainOn = Field(
        "response",
        description="which tokens the loss counts: the answers, the last answer, all, or the turns of a list of roles, "
        "such as [assistant, tool]",
    )
    train_on_eos: TrainOnEos = Field(
        "turn", description="whether the end of every answer is trained, of the last one, or of none"
    )
    reasoning: Reasoning = Field(
        "keep",
        description="reasoning of an answer (<think>, reasoning_content): trained as the chat template writes it; left "
        "out of turns before the last question (strip); or not trained (mask)",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be trained on stops the run, or is dropped and counted"
    )

    cache_dir: NonEmpty | None = Field(
        None,
        description="folder in which tokenised rows are kept, by the content of their files, and from which they are "
        "read as they are needed; null: none, and all tokens are in memory",
    )

    def conflicts(self) -> Iterator[str]:
        if self.train_on == "all" and self.train_on_eos != "turn":
            yield f"train_on=all trains every token; set train_on=response for train_on_eos={self.train_on_eos}"

    @field_validator("train", mode="before")
    @classmethod
    def _mixture(cls, value: Any) -> Any:
        """In words of a mixture, what pydantic would say of each type that `train` may be."""
        if not isinstance(value, list):
            return value
        trees = [entry.model_dump() if isinstance(entry, DataSource) else entry for entry in value]
        for tree in trees:
            if not isinstance(tree, dict) or not isinstance(tree.get("path"), str):
                raise ValueError(f"each source of a mixture is {{path: FILE, weight: NUMBER}}, not {tree!r:.200}")
            if unknown := sorted(map(str, tree.keys() - DataSource.model_fields.keys())):
                raise ValueError(f"a source of a mixture has path and weight, not '{unknown[0]}'")
        if len({tree.get("weight") is None for tree in trees}) > 1:
            raise ValueError("give every source of the mixture a weight, or none of them")
        return value

    @property
    def sources(self) -> list[DataSource]:
        """The sources of `train`; one without weight where it is no mixture."""
        return [DataSource(path=self.train)] if isinstance(self.train, str) else self.train

    @property
    def held_out(self) -> "DataSection":
        """As `eval` is read: with its own split."""
        return self.model_copy(update={"split": self.eval_split or self.split})

    @property
    def counted(self) -> Counted:
        """What of a row the loss counts."""
        return Counted(self.train_on, self.train_on_eos, self.reasoning)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: those of a row of a batch, or of half of it for a pair's."""
        return self.max_length // 2 if self.format == "preference" else self.max_length

    @property
    def one_segment(self) -> bool:
        """Whether no row of a batch holds more than one sequence: a pair's two share one, packed or not."""
        return not self.packing and self.format != "preference"
