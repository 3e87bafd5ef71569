"""A generative reward model's task (RLMEC, Chen et al., 2024): rewrite an answer with few edits, given a good one."""

_TASK = """\
Below are a conversation, a good answer to it, and another answer. Rewrite the other answer so that it is right, with \
as few edits as possible; an answer that is right already stays as it is.

### Conversation
{prompt}

### Good answer
{reference}

### Other answer
{answer}

### Rewritten answer
"""


def rewriting_prompt(prompt: str, reference: str, answer: str) -> str:
    """What the model reads before the rewritten answer, or, where it judges, before the answer itself."""
    return _TASK.format(prompt=prompt.strip(), reference=reference.strip(), answer=answer.strip())
