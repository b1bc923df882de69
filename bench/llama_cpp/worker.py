"""A process that decodes when it is told to, and waits asleep otherwise; one for each contender.

    python bench/llama_cpp/worker.py llama.cpp '{"file": ..., "threads": 2, "context": 8192}'
    python bench/llama_cpp/worker.py ours '{"file": ..., "dtype": ..., "threads": 2, "context": 8192}'

Each line of standard input is {"prompt": [ids], "new_tokens": N, "fresh": bool}; the answer is one line, {"prompt_s",
"decode_s", "tokens"}. Without `fresh` the prompt's cache is kept from the time before, and `prompt_s` means nothing.
Greedy, end-of-sequence ignored. It imports what its contender needs alone: llama.cpp may be in another environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Answer = dict[str, Any]
Run = Callable[[Sequence[int], int, bool], Answer]


def llama_cpp(file: str, threads: int, context: int) -> Run:
    """llama.cpp by its Python binding: one token at a time, the likeliest."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(
        model_path=file,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )

    def best() -> int:
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),)).argmax())

    def run(prompt: Sequence[int], new_tokens: int, fresh: bool) -> Answer:
        model.n_tokens = 0 if fresh else len(prompt) - 1  # what is cached beyond it is dropped by `eval`
        begin = time.perf_counter()
        model.eval(list(prompt)[model.n_tokens :])
        tokens = [best()]
        first = time.perf_counter()
        while len(tokens) < new_tokens:
            model.eval([tokens[-1]])
            tokens.append(best())
        return {"prompt_s": first - begin, "decode_s": time.perf_counter() - first, "tokens": tokens}

    return run


def ours(file: str, threads: int | None, context: int, dtype: str) -> Run:
    """`ar` on the same weights."""
    import pyramid_rt

    pyramid = pyramid_rt.load(file, device="cpu", dtype=dtype, max_seq=context, threads=threads)

    def run(prompt: Sequence[int], new_tokens: int, fresh: bool) -> Answer:
        if fresh:
            for tier in pyramid.tiers:
                tier.reset()
        result = pyramid.generate(list(prompt), method="ar", max_new_tokens=new_tokens, ignore_eos=True)
        first = result.stats.time_to_first_token or 0.0
        return {"prompt_s": first, "decode_s": result.stats.seconds - first, "tokens": result.tokens}

    return run


CONTENDERS: dict[str, Callable[..., Run]] = {"llama.cpp": llama_cpp, "ours": ours}


def main() -> None:
    """Serve standard input."""
    run = CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["prompt"], asked["new_tokens"], asked["fresh"])), flush=True)


if __name__ == "__main__":
    main()
