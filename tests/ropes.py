"""Settings of rotary tables, and models with each."""

from typing import Any

from tiny import LLAMA3_ROPE

LINEAR_ROPE = {"rope_type": "linear", "factor": 2.5}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "attention_factor": 1.3,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 64,
    "rope_theta": 523.0,
}
# Of heads of ten dims; the rows of the tests are longer than the first context.
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.1, 2.0, 3.5, 6.0, 11.0],
    "original_max_position_embeddings": 20,
    "rope_theta": 523.0,
}
DYNAMIC = {
    "max_position_embeddings": 10,  # shorter than the tests' rows
    "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 523.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head_tied": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 523.0}},
    "linear_rope_tied": {"rope_parameters": LINEAR_ROPE | {"rope_theta": 523.0}, "tie_word_embeddings": True},
    "yarn_rope_tied": {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True},
    "dynamic_rope": DYNAMIC,
    "long_rope": {"rope_parameters": LONG_ROPE},
    "one_kv_head": {"num_key_value_heads": 1, "head_dim": 6},
}
