"""vLLM as a rollout engine. Nothing here is imported before a run asks for `rollout.engine=vllm`."""
