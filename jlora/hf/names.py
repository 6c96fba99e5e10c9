"""The name table: Hugging Face tensor <-> leaf of the `Decoder`, and the layout between them.

Hugging Face keeps a projection as [out, in] and one tensor a layer; jlora keeps the input dims first,
dims apart (heads, head dim), layers stacked.
"""

from dataclasses import dataclass

import numpy as np

from jlora.model.llama import ModelConfig, block_weights, outer_weights, projection_shapes

OUTER = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
BLOCK = {
    "input_layernorm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}
BLOCK |= {f"{leaf}_bias": name.replace(".weight", ".bias") for leaf, name in BLOCK.items() if leaf.endswith("_proj")}


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor: where it belongs and its two shapes.

    Attributes:
      leaf: attribute of the `Decoder` (layer None) or of its `Block`.
      layer: index into the stacked leaf.
      hf_shape: shape in the file.
      shape: shape of one layer's leaf.
      transposed: the file has the output dim first.
    """

    leaf: str
    layer: int | None
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool


def name_table(cfg: ModelConfig) -> dict[str, Entry]:
    """Hugging Face tensor name -> entry, for every tensor of the model."""
    table = {
        OUTER[leaf]: Entry(leaf, None, weight.shape, weight.shape, False) for leaf, weight in outer_weights(cfg).items()
    }
    projections = projection_shapes(cfg)
    for layer in range(cfg.num_hidden_layers):
        for leaf, weight in block_weights(cfg).items():
            hf_shape = weight.shape
            if leaf in projections:
                inputs, outputs = projections[leaf]
                hf_shape = (int(np.prod(outputs)), int(np.prod(inputs)))
            elif leaf.endswith("_bias"):
                hf_shape = (int(np.prod(weight.shape)),)
            name = f"model.layers.{layer}.{BLOCK[leaf]}"
            table[name] = Entry(leaf, layer, hf_shape, weight.shape, leaf in projections)
    return table


def to_hf(entry: Entry, array: np.ndarray) -> np.ndarray:
    """One layer's leaf in the file's layout."""
    return array.reshape(entry.hf_shape[::-1]).T if entry.transposed else array.reshape(entry.hf_shape)
