"""Datasets, chat templates, tokenised prompts. This package imports neither torch nor transformers."""
