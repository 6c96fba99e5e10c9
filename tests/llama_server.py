"""`python llama_server.py FILE PORT ...`: llama.cpp's own HTTP server, by its wheel on PyPI (xllamacpp)."""

import argparse
import time

import xllamacpp


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("port", type=int)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lora")
    parser.add_argument("--template")
    parser.add_argument("--endless", action="store_true")
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.file
    params.model_alias = {"mine"}
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_ctx, params.n_parallel = args.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.use_jinja, params.fit_params, params.warmup = True, False, False
    if args.lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(args.lora, 1.0)]
    if args.template:
        with open(args.template, encoding="utf-8") as file:
            params.chat_template = file.read()
    params.sampling.ignore_eos = args.endless
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
