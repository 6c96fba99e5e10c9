"""The name table: Hugging Face tensor <-> leaf of the `Decoder`, and the layout between them.

Hugging Face keeps a projection as [out, in] and one tensor a layer; jlora keeps the input dims first,
dims apart (heads, head dim), layers stacked.
"""

from dataclasses import dataclass

import numpy as np

from jlora.model.config import ModelConfig, ModuleNames, block_weights, module_path, outer_weights, projection_shapes


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor: where it belongs and its two shapes.

    Attributes:
      leaf: attribute of the `Decoder` (layer None) or of its `Block`.
      layer: index into the stacked leaf.
      hf_shape: shape in the file.
      shape: shape of one layer's leaf.
      transposed: the file has the output dim first.
      input_first: the file has the input dim first after all, and `Source` turns what it reads.
    """

    leaf: str
    layer: int | None
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool
    input_first: bool = False

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the tensor as files keep it."""
        return self.hf_shape[::-1] if self.input_first else self.hf_shape


def tensor_name(names: ModuleNames, leaf: str, layer: int | None) -> str:
    """Hugging Face's name of a leaf of the `Decoder` (layer None), or of one layer's."""
    module = module_path(names, leaf.removesuffix("_bias"), layer)
    return f"{module}.{'bias' if leaf.endswith('_bias') else 'weight'}"


def name_table(cfg: ModelConfig) -> dict[str, Entry]:
    """Hugging Face tensor name -> entry, for every tensor of the model."""
    table = {
        tensor_name(cfg.names, leaf, None): Entry(leaf, None, weight.shape, weight.shape, False)
        for leaf, weight in outer_weights(cfg).items()
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
            name = tensor_name(cfg.names, leaf, layer)
            turned = leaf in projections
            table[name] = Entry(leaf, layer, hf_shape, weight.shape, turned, turned and cfg.names.input_first)
    return table


def to_hf(entry: Entry, array: np.ndarray) -> np.ndarray:
    """One layer's leaf in the file's layout."""
    return array.reshape(entry.hf_shape[::-1]).T if entry.transposed else array.reshape(entry.hf_shape)
