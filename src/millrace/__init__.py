"""Millrace: post-training of large language models on Megatron-Core and vLLM."""
