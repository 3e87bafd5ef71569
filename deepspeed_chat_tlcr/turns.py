"""Which tokens end a response, and what a chat template writes around an assistant's turn.

A base model's ``eos_token`` and the token that its chat template puts behind a turn often differ (``<|endoftext|>`` and
``<|im_end|>``). Both end a response: ``end_ids`` names them for rollouts, masks and saved models, ``end_after`` the one
that training text gets.
"""

import datetime
from dataclasses import dataclass
from functools import lru_cache

from transformers import GenerationConfig, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError

DATE = datetime.datetime(2024, 7, 26)  # the day that Llama 3's template writes where it is told none
# In front of a template, whose variables may be plain data only: a macro in the place of transformers' function.
_FIXED_DAY = "{% macro strftime_now(format) %}{{ format"
_FIXED_DAY += "".join(
    f" | replace('%{code}', '{DATE.strftime(f'%{code}')}')" for code in (*"aAbBdmyYjHIMSpxXc", "-d", "-m", "e")
)
_FIXED_DAY += " }}{% endmacro %}"
_USER, _ASSISTANT = "\ue000", "\ue001"  # private-use characters: no template contains them


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict], generation: bool = False) -> str:
    """The messages as the tokenizer's chat template writes them; ``generation``: up to where an answer begins.

    A template that prints today's date gets ``DATE`` instead: else the data would be other data tomorrow, and a
    labelling that was begun today could not go on. Raises ``InputError`` for messages that the template refuses.
    """
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DAY + template
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=generation
            )
        )
    except Exception as error:  # the template is a program of the model's author: any error may come out of it
        raise InputError(f"the tokenizer's chat template refuses these messages: {error}") from None


def shared_start(first: str, second: str) -> str:
    """What two texts have in common up to their first difference."""
    parting = (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: next(parting, min(len(first), len(second)))]


@dataclass(frozen=True)
class Turn:
    """``opening``: the text in front of an assistant's answer; ``end_id``: the token that the template puts behind it,
    None where it puts no token of its own; ``closing``: all text that it puts there; ``space``: the white space between
    the opening and the answer, if any."""

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
    # A generation prompt may go on where finished answers do not, with a thinking tag.
    opening = shared_start(opened, between)
    tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
    end_id = next((token for token in tokens if token in tokenizer.added_tokens_decoder), None)
    gap = between.removeprefix(opening)
    return Turn(opening.removeprefix(asked) or opening, gap if gap.isspace() else "", closing, end_id)


def end_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every token that ends a response, the tokenizer's EOS first: its own, the chat template's end of a turn, and
    those that the generation config beside the tokenizer names.
    """
    turn = assistant_turn(tokenizer)
    of_template = () if turn is None or turn.end_id is None else (turn.end_id,)
    named = _named_ends(tokenizer, tokenizer.name_or_path)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *of_template, *named)))


@lru_cache(maxsize=8)
def _named_ends(tokenizer: PreTrainedTokenizerFast, path: str) -> tuple[int, ...]:
    """The generation config's ``eos_token_id``, one or several.

    One that was derived from a model's config counts only where it stands for no text: by default that says 2,
    whatever token of the vocabulary this is.
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
    """The token that ends a whole response to this prompt: the chat template's where the template wrote the prompt,
    else the tokenizer's EOS.
    """
    turn = assistant_turn(tokenizer)
    if turn is None or turn.end_id is None or not prompt.endswith(turn.opening):
        return tokenizer.eos_token_id
    return turn.end_id
