"""The tokens that end a response, and a chat template's text around an assistant's turn.

A base model's ``eos_token`` and the token that its chat template puts behind a turn often differ (``<|endoftext|>`` and
``<|im_end|>``). Both end a response: ``end_ids`` lists them for rollouts, masks and saved models; ``end_after`` is the
one for training text.
"""

import datetime
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError

DATE = datetime.datetime(2024, 7, 26)  # the default of Llama 3's template
# A macro in front of the template that replaces transformers' function; variables can only be plain data.
_FIXED_DAY = "{% macro strftime_now(format) %}{{ format"
_FIXED_DAY += "".join(
    f" | replace('%{code}', '{DATE.strftime(f'%{code}')}')" for code in (*"aAbBdmyYjHIMSpxXc", "-d", "-m", "e")
)
_FIXED_DAY += " }}{% endmacro %}"
_USER, _ASSISTANT = "\ue000", "\ue001"  # private-use characters: no template contains them


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict], generation: bool = False) -> str:
    """Render messages with the tokenizer's chat template; ``generation``: up to where an answer begins.

    A template that prints today's date gets ``DATE`` instead: otherwise the data would change every day, and a
    labelling could not be continued tomorrow. Raises ``InputError`` for messages that the template refuses.
    """
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DAY + template
        how: dict[str, Any] = {"chat_template": template, "tokenize": False, "add_generation_prompt": generation}
        return str(tokenizer.apply_chat_template(messages, **how))
    except Exception as error:  # a template is a program, which may raise any error
        raise InputError(f"the tokenizer's chat template refuses these messages: {error}") from None


def shared_start(first: str, second: str) -> str:
    """The common beginning of two texts."""
    parting = (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: next(parting, min(len(first), len(second)))]


@dataclass(frozen=True)
class Turn:
    """``opening``: the text in front of an assistant's answer; ``space``: the white space between it and the answer, if
    any; ``closing``: all text behind the answer; ``end_id``: the special token among it, or None."""

    opening: str
    space: str
    closing: str
    end_id: int | None


def assistant_turn(tokenizer: PreTrainedTokenizerFast) -> Turn | None:
    """How the tokenizer's chat template writes an assistant's turn; None without a template."""
    return _assistant_turn(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token)


@lru_cache(maxsize=8)
def _assistant_turn(tokenizer: PreTrainedTokenizerFast, template: str, eos: str) -> Turn | None:
    if not tokenizer.chat_template:
        return None
    user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
    try:
        asked, opened = render(tokenizer, [user]), render(tokenizer, [user], generation=True)
        answered = render(tokenizer, [user, assistant])
    except InputError:
        return None
    if not all(_USER in text for text in (asked, opened, answered)) or _ASSISTANT not in answered:
        return None
    between, _, closing = answered.rpartition(_USER)[2].rpartition(_ASSISTANT)
    asked, opened = (text.rpartition(_USER)[2] for text in (asked, opened))
    # A generation prompt may have a thinking tag that finished answers lack.
    opening = shared_start(opened, between)
    tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
    end_id = next((token for token in tokens if token in tokenizer.added_tokens_decoder), None)
    gap = between.removeprefix(opening)
    return Turn(opening.removeprefix(asked) or opening, gap if gap.isspace() else "", closing, end_id)


def end_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS first, then the chat template's end of a turn and those of
    the generation config beside the tokenizer.
    """
    turn = assistant_turn(tokenizer)
    of_template = () if turn is None or turn.end_id is None else (turn.end_id,)
    named = _named_ends(tokenizer, tokenizer.name_or_path)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *of_template, *named)))


@lru_cache(maxsize=8)
def _named_ends(tokenizer: PreTrainedTokenizerFast, path: str) -> tuple[int, ...]:
    """The generation config's ``eos_token_id``, one or several.

    A derived generation config has the default of a model's config, 2, which may be any token: it counts only if it is
    a special one.
    """
    if not path:
        return ()
    try:
        config = GenerationConfig.from_pretrained(path)
    except Exception:  # whatever a damaged file makes transformers raise
        return ()
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    is_derived = getattr(config, "_from_model_config", False)
    return tuple(
        id for id in ids if id in tokenizer.added_tokens_decoder or (id in range(len(tokenizer)) and not is_derived)
    )


def end_after(tokenizer: PreTrainedTokenizerFast, prompt: str) -> int:
    """The token that ends a whole response: the chat template's if the template rendered the prompt, else EOS."""
    turn = assistant_turn(tokenizer)
    if turn is None or turn.end_id is None or not prompt.endswith(turn.opening):
        return tokenizer.eos_token_id
    return turn.end_id
