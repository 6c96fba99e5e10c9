"""Several adapters of one base as one adapter: PEFT's `add_weighted_adapter`, `linear`, `cat` and `svd`.

Knows nothing of files or of the base; runs on the host, a layer at a time.
"""

import jax.numpy as jnp
import numpy as np

from jlora.config import LoraSection
from jlora.errors import ConfigError, ModelError
from jlora.model.adapter import Adapter, Lora, new_lora
from jlora.model.config import ModelConfig, projection_shapes

# A [in, R], B [R, out] and what their product is multiplied by, the adapter's weight included.
Factors = tuple[np.ndarray, np.ndarray, float]


def combine_adapters(
    adapters: dict[str, Adapter], weights: list[float], how: str, rank: int | None, model: ModelConfig
) -> tuple[Adapter, LoraSection]:
    """One adapter of scale 1, and its options. Where an adapter has nothing, the others count alone.

    linear adds factors, each by the root of its weight: cheap, and not the sum of the products. cat sets the factors
    side by side: exactly the weighted sum, at the sum of the ranks. svd is the sum's best approximation of its rank.

    Args:
      adapters: by what the user calls them.
      rank: of svd; the largest of the adapters' without it.

    Raises:
      ConfigError: linear for adapters of different ranks.
      ModelError: an adapter that is more than low-rank factors.
    """
    for name, adapter in adapters.items():
        if any(not isinstance(part, Lora) or part.magnitude is not None for part in adapter.values()):
            raise ModelError(
                f"{name}: has DoRA's magnitudes, or weights and biases of its own, which cannot be added to others'; "
                "merge it into the base instead"
            )
    parts = [{name: part for name, part in one.items() if isinstance(part, Lora)} for one in adapters.values()]
    ranks = [max(lora.lora_b.shape[1] for lora in one.values()) for one in parts]
    if how == "linear" and len(set(ranks)) > 1:
        listed = ", ".join(f"{name} has {rank}" for name, rank in zip(adapters, ranks, strict=True))
        raise ConfigError(f"--combination linear adds factors of one rank, but {listed}; take cat or svd")
    rank = sum(ranks) if how == "cat" else rank if how == "svd" and rank else max(ranks)
    targets = [name for name in projection_shapes(model) if any(name in one for one in parts)]
    num_layers = model.num_hidden_layers

    def at(name: str, layer: int) -> list[Factors]:
        held = zip(parts, weights, strict=True)
        factors = [_at(one[name], layer, weight) for one, weight in held if name in one]
        return [part for part in factors if part[2]]

    found = {name: [at(name, layer) for layer in range(num_layers)] for name in targets}
    adapted = [any(found[name][layer] for name in targets) for layer in range(num_layers)]
    section = LoraSection(
        rank=rank,
        alpha=float(rank),
        target_modules=targets,
        layers_to_transform=None if all(adapted) else [layer for layer, has in enumerate(adapted) if has],
    )
    combined: Adapter = {}
    for name in targets:
        example = next(one[name] for one in parts if name in one)
        inputs, outputs = example.lora_a.shape[1:-1], example.lora_b.shape[2:]
        a, b = np.zeros((num_layers, *inputs, rank), np.float32), np.zeros((num_layers, rank, *outputs), np.float32)
        for layer, factors in enumerate(found[name]):
            if factors:
                left, right = _combined(factors, how, rank)
                a[layer, ..., : len(right)] = left.reshape(*inputs, -1)
                b[layer, : len(right)] = right.reshape(-1, *outputs)
        combined[name] = new_lora(section, name, (jnp.asarray(a), jnp.asarray(b)), model, 0.0)
    return combined, section


def _at(lora: Lora, layer: int, weight: float) -> Factors:
    """One layer's factors; multiplied by 0 where it has no adapter."""
    kept = lora.lora_b.shape[1] if lora.ranks is None else lora.ranks[layer]
    scale = float(lora.scale[layer])
    a, b = np.asarray(lora.lora_a[layer], np.float32), np.asarray(lora.lora_b[layer], np.float32)
    rank = a.shape[-1]
    return a.reshape(-1, rank)[:, : kept or rank], b.reshape(rank, -1)[: kept or rank], scale * weight


def _combined(parts: list[Factors], how: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of one layer, of `rank` or less."""
    if how == "cat":
        return np.concatenate([a * times for a, _, times in parts], axis=1), np.concatenate([b for _, b, _ in parts])
    if how == "svd":
        left, values, right = np.linalg.svd(sum(times * (a @ b) for a, b, times in parts), full_matrices=False)
        # Singular values with the output's side, as PEFT has them.
        return left[:, :rank], values[:rank, None] * right[:rank]
    width = max(a.shape[1] for a, _, _ in parts)
    total_a = np.zeros((len(parts[0][0]), width), np.float32)
    total_b = np.zeros((width, parts[0][1].shape[1]), np.float32)
    for a, b, times in parts:
        root = np.sqrt(abs(times))
        total_a[:, : a.shape[1]] += np.sign(times) * root * a
        total_b[: b.shape[0]] += root * b
    return total_a, total_b
