"""Running vLLM servers that somebody else operates, as one rollout engine. Nothing that needs aiohttp is
imported before a run asks for `rollout.engine=http`."""
