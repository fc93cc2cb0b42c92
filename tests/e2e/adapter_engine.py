"""Greedy answers of a vLLM engine in this process, with their log-probs: `adapter_engine.py MODEL OUT [ADAPTER]`.

OUT gets those of the model, and with an adapter those with it besides.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

PROMPTS = [[(7 * i * i + 3 * i + 5 * n) % 251 for i in range(12 + n)] for n in range(4)]
RANK = 8
"""vLLM's smallest."""


def main(model: str, out: str, adapter: str | None = None) -> None:
    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=16 << 20,
        enable_lora=adapter is not None,
        max_lora_rank=RANK,
        enable_chunked_prefill=False,
        max_num_batched_tokens=2048,
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
    )
    requests = [None, LoRARequest("trained", 1, adapter)] if adapter else [None]
    Path(out).write_text(json.dumps([greedy(engine, request) for request in requests]))


def greedy(engine: LLM, request: LoRARequest | None) -> list[dict[str, list[float]]]:
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0.0, max_tokens=24, logprobs=0, ignore_eos=True),
        lora_request=request,
        use_tqdm=False,
    )
    return [
        {"tokens": list(o.token_ids), "logprobs": [p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)]}
        for o in (answer.outputs[0] for answer in answers)
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
