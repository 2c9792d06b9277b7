"""vLLM's server, as `python -m vllm.entrypoints.openai.api_server` is, in a process forked from one that has
imported vLLM. Its engine's process is forked from it in turn; all else is vLLM's own."""

import os


def main(arguments: list[str]) -> None:
    """arguments: of its command line, where it finds them itself."""
    import torch._dynamo
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.platforms.cpu import CpuPlatform

    # It has read its variable when it was imported.
    torch._dynamo.config.disable = os.environ["TORCH_COMPILE_DISABLE"] == "1"
    check = CpuPlatform.check_and_update_config

    def check_and_fork(config):
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # it is now `spawn`

    CpuPlatform.check_and_update_config = staticmethod(check_and_fork)
    entry.main()
