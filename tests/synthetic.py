"""Random checkpoints of Llama-2-7B's shape at any width, written a layer at a time; and what loading one costs."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


def write_llama(folder: Path, width: int, layers: int, vocab: int = 32_000) -> tuple[int, int]:
    """A sharded bfloat16 checkpoint with heads of 128 and Llama-2's proportions; bytes of all, and of the largest.

    Of width 4096 with 32 layers it is Llama-2-7B's.
    """
    ffn = 11008 * width // 4096
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width}
    config |= {"intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": width // 128}
    config |= {"vocab_size": vocab, "head_dim": 128, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    outer = {"model.embed_tokens": (vocab, width), "model.norm": (width,), "lm_head": (vocab, width)}
    block = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    block |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    block |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    files = [{f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(layers)]
    draw, weight_map, sizes = np.random.default_rng(0), {}, []
    for number, shapes in enumerate([*files, outer]):
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            # Any bits but an exponent of all ones: finite, and no two blocks alike.
            bits = draw.bytes(2 * math.prod(shape))
            tensors[f"{name}.weight"] = (
                (np.frombuffer(bits, np.uint16) & 0xBFFF).view(ml_dtypes.bfloat16).reshape(shape)
            )
            sizes.append(2 * math.prod(shape))
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes), max(sizes)


# Run in a process of its own: what a folder costs to load over a mesh, as one line of JSON. Warmed up on a small
# folder, so that JAX's own start is not counted.
MEASURE = """
import json, re, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jlora.config import MeshSection
from jlora.hf.source import open_source
from jlora.hf.load import load_base
from jlora.model.sharding import make_mesh
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
small, folder, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
mesh = make_mesh(MeshSection(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
dtype = jnp.dtype("bfloat16")
kind = sys.argv[4] if len(sys.argv) > 4 else None
jax.block_until_ready(jax.tree.leaves(load_base(open_source(Path(small)), small, dtype, mesh, kind)[0]))
source = open_source(Path(folder))
before, start, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
base, digest = load_base(source, folder, dtype, mesh, kind)
jax.block_until_ready(jax.tree.leaves(base))
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
shards = [shard.data.nbytes for leaf in jax.tree.leaves(base) for shard in leaf.addressable_shards]
print(json.dumps({"peak": status("VmHWM") - before, "devices": sum(shards), "seconds": seconds, "cpu_seconds": cpu,
    "hash": digest}))
"""
