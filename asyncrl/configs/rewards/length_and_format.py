"""An example of a reward function in a file of its own: prefers answers of a wanted length, written in
sentences.

    asyncrl-launch --config quickstart.yaml data.path=prompts.jsonl \\
        "reward.functions=[{function: asyncrl.configs.rewards.length_and_format:length_and_format}]"

It needs no right answer, so it works with any prompts. It is called once for each prompt, with all its
completions, and returns one number a completion.
"""

WANTED_CHARACTERS = 80


def length_and_format(completions, log_metric, **_):
    """Between 0 and 1: half for the length, half for letters and spaces in place of other characters."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    scores = []
    for text in texts:
        length = max(0.0, 1.0 - abs(len(text) - WANTED_CHARACTERS) / WANTED_CHARACTERS)
        prose = sum(character.isalpha() or character == " " for character in text) / max(1, len(text))
        log_metric("characters", len(text))
        scores.append(0.5 * length + 0.5 * prose)
    return scores
