"""Serve a GGUF file by llama.cpp on loopback, until standard input ends: a process of its own.

Of its own, because llama.cpp ends its process where it cannot go on. Prints the address of llama.cpp's HTTP server.
"""

import sys

import xllamacpp


def main(path: str, threads: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.port = 0  # any that is free
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.warmup = False
    params.fit_params = False
    # llama.cpp's defaults here round keys and values to float16; the proof compares in float32
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
