"""Greedy generation by llama.cpp (through xllamacpp). One JSON object on stdout at the end.

Rates are llama.cpp's own: its server measures the prompt and the decoding of each request. Everything that is not
said here is at llama.cpp's default: the warm-up run at loading, flash attention, 16-bit keys and values.
"""

import argparse
import json
import sys
import time

import xllamacpp as xlc


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-ids", required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    params = xlc.CommonParams()
    params.model.path = args.model
    params.n_ctx, params.n_parallel = args.context, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.sampling.temp, params.sampling.top_k = 0.0, 1
    server = xlc.Server(params)
    loaded_at = time.monotonic()
    first_token_at = None

    def piece(_):
        nonlocal first_token_at
        first_token_at = first_token_at or time.monotonic()

    body = {
        "prompt": [int(i) for i in args.prompt_ids.split(",")],
        "n_predict": args.max_new_tokens,
        "temperature": 0.0,
        "cache_prompt": False,
    }
    if args.max_new_tokens == 1:
        # streamed, to see when the first token comes
        server.handle_completions({**body, "stream": True}, piece)
        timings = None
    else:
        timings = server.handle_completions(body)["timings"]
    out = {"timings": timings, "loaded_at": loaded_at, "first_token_at": first_token_at}
    print(json.dumps({**out, "system": xlc.get_system_info()}))
    sys.stdout.flush()


main()
