"""The section of a run's configuration that says what its adapter is; an adapter folder's options are one, too."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jlora.config.section import Positive, Section, Share, nearest

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS
# What some models have in place of several: one weight with all their outputs.
FUSED_PROJECTIONS = {"qkv_proj": ATTENTION_PROJECTIONS[:3], "gate_up_proj": MLP_PROJECTIONS[:2]}
ALL_PROJECTIONS = (*PROJECTIONS, *FUSED_PROJECTIONS)

MOST_RANKS = 2**17  # more than any projection has


class LoraSection(Section):
    """The adapter."""

    rank: Annotated[int, Field(gt=0, le=MOST_RANKS)] = Field(16, description="rank R of the A/B factors")
    alpha: Positive = Field(32.0, description="the product BA is scaled by alpha / rank")
    dropout: Share = Field(0.0, description="dropout probability on the adapter's input")
    target_modules: list[str] | Literal["all-linear"] = Field(
        list(ATTENTION_PROJECTIONS),
        description="projections that get an adapter, of " + ", ".join(PROJECTIONS) + "; or all-linear; a model that "
        "has qkv_proj or gate_up_proj in place of some is given an adapter there where all of those are named",
    )
    init_from: str | None = Field(None, description="PEFT adapter folder to start from")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    use_dora: bool = Field(
        False, description="DoRA: a trained magnitude for each output of W + BA, by its direction (arXiv:2402.09353)"
    )
    init_lora_weights: (
        Literal[True, "gaussian", "pissa", "olora"] | Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]*$")]
    ) = Field(
        True,
        description="A and B at the start: true (Kaiming-uniform, 0), gaussian, pissa (arXiv:2404.02948), "
        "pissa_niter_N (a quicker SVD of N iterations) or olora (arXiv:2406.01775)",
    )
    rank_pattern: dict[str, Annotated[int, Field(gt=0, le=MOST_RANKS)]] = Field(
        {}, description="ranks that differ from rank, by regular expression for the end of a module's name"
    )
    alpha_pattern: dict[str, Positive] = Field({}, description="as rank_pattern, for alpha")
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="numbers of the layers that get an adapter, from 0; null: all"
    )
    modules_to_save: list[Literal["embed_tokens", "lm_head"]] = Field(
        [], description="trained in full beside the adapter, and exported with it: embed_tokens, lm_head"
    )
    trainable_tokens: list[Annotated[int, Field(ge=0)] | str] | Literal["new"] = Field(
        [],
        description="tokens, by text or id, whose rows of the embedding, and of a head of its own, are trained beside "
        "the adapter (PEFT's trainable_token_indices); new: those that model.resize_embeddings gives rows",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases that are trained too, where the base has any: all, or those of target_modules"
    )

    def conflicts(self) -> Iterator[str]:
        if not self.target_modules:
            yield "target_modules is empty; name at least one projection"
        for name in self.target_modules if isinstance(self.target_modules, list) else ():
            if name not in ALL_PROJECTIONS:
                yield f"target_modules holds '{name}'{nearest(name, ALL_PROJECTIONS)}"
        if self.init_from is not None and self.init_lora_weights is not True:
            yield (
                f"init_from={self.init_from} has the A and B to start from, which "
                f"init_lora_weights={self.init_lora_weights} would make anew; leave one of them out"
            )
        if self.trainable_tokens and self.modules_to_save:
            yield "trainable_tokens are rows of what modules_to_save trains whole; leave one of them out"
        if self.layers_to_transform == []:
            yield "layers_to_transform is empty; name at least one layer, or null for all"
        if self.layers_to_transform is not None and self.bias == "lora_only":
            yield "bias=lora_only trains biases of all layers; leave layers_to_transform out"
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"the pattern '{pattern}' is not a regular expression ({error})"

    def transforms(self, projection: str, layer: int) -> bool:
        """Whether a projection of a layer gets an adapter."""
        return self.means(projection) and (self.layers_to_transform is None or layer in self.layers_to_transform)

    def token_rows(self, tied: bool) -> dict[str, tuple[int, ...]]:
        """The rows that are trained of the embedding and of a head that is not tied to it; ids, ascending.

        `trainable_tokens` are ids by now; see `jlora.hf.trained_tokens`.
        """
        ids = tuple(sorted({int(token) for token in self.trainable_tokens}))
        return dict.fromkeys(("embed_tokens",) if tied else ("embed_tokens", "lm_head"), ids) if ids else {}

    @property
    def takes_from_base(self) -> bool:
        """Whether A and B start as a part of the base's weights."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    @property
    def starts_as_base(self) -> bool:
        """Whether a new adapter adds nothing to what the base computes, to the bit; a magnitude or a copy may round."""
        own = self.use_dora or self.modules_to_save or self.trainable_tokens or self.bias != "none"
        return self.init_from is None and not self.takes_from_base and not own

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that are named, in a model's own order."""
        chosen = PROJECTIONS if self.target_modules == "all-linear" else self.target_modules
        return tuple(name for name in ALL_PROJECTIONS if name in chosen)

    def means(self, projection: str) -> bool:
        """Whether a projection is targeted: by its own name, or by those of all that it stands for."""
        parts = FUSED_PROJECTIONS.get(projection)
        return projection in self.targets or (parts is not None and {*parts} <= {*self.targets})
