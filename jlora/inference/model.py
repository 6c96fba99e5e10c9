"""The model that a command asks for: a base with an adapter, opened as the adapter's run had it."""

import argparse

import jax
import jax.numpy as jnp

from jlora.config import DataSection
from jlora.hf.pretrained import Pretrained, load_pretrained, open_adapter, open_pretrained, run_config
from jlora.model import quant
from jlora.model.adapter import Adapter


def open_model(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[Pretrained, Adapter, jnp.dtype, DataSection]:
    """Base, adapter, dtype and row format from the arguments, then from the adapter's run, then defaults."""
    run = run_config(args.adapter)
    chosen = {
        "format": args.format or (run.data.format if run else args.own_format),
        "prompt": args.prompt_style or (run.data.prompt if run else "stanford"),
        "chat_template": args.chat_template or (run.data.chat_template if run else None),
    }
    section = (run.data if run else DataSection(train="-")).model_copy(update=chosen)
    dtype = jnp.dtype(args.dtype or (run.model.dtype if run else "bfloat16"))
    tokenizer = args.tokenizer or (run.model.tokenizer if run else None)
    asked = args.quantization or (run.model.quantization if run else None)
    quantization = None if asked == "none" else asked
    quant.check_device(quantization, mesh.devices.flat[0])
    opened = open_pretrained(args.base, tokenizer, section.chat_template)
    pretrained = load_pretrained(opened, dtype, mesh, quantization)
    return pretrained, open_adapter(args.adapter, pretrained), dtype, section
