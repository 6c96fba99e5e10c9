"""LoRA fine-tuning of Llama models in JAX and Flax.

Letters used in array annotations and einsum equations, in every module:
B batch, T query length, S key/value length, D embed, N query heads, K key/value heads, G = N / K,
H head dim, F mlp, V vocab, L layers, R rank.
"""

__version__ = "0.1.0"
