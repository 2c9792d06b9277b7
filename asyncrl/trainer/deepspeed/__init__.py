"""The trainer on DeepSpeed: one process a GPU, by ZeRO. Nothing here is imported before it is asked for."""
