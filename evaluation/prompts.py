"""Which prompts the user's models answer: a file of the user's own, or the held-out part of the training data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepspeed_chat_tlcr.data.preferences import load_preferences
from deepspeed_chat_tlcr.data.sources import place, read_records, suffix_of
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation.options import PolicyOptions, PromptOptions
from evaluation.policies import Question, Replies, answers_folder, answers_of, is_text

FIELDS = ("instruction", "prompt")


def prompt_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def read_prompts(options: PromptOptions, model: str) -> list[Question]:
    """The prompts, each once. ``model``: whose chat template applies where the data's records are messages.

    Raises ``InputError`` naming file and record.
    """
    if options.prompts:
        questions = prompts_of_file(options.prompts, options.temperature)
    elif options.data_path:
        tokenizer = load_tokenizer(model)
        pairs = load_preferences(
            options.data_path,
            "rl",
            "eval",
            options.data_split,
            options.data_seed,
            require_rejected=False,
            tokenizer=tokenizer,
        )
        questions = [Question(prompt_id(p.prompt), [p.prompt], options.temperature, raw=True) for p in pairs]
    else:
        raise InputError("--prompts FILE or --data_path DATA is missing: which prompts shall the models answer?")
    once = list({question.id: question for question in questions}.values())
    return once[: options.prompt_count or None]


def answer_prompts(models: Mapping[str, str], questions: Sequence[Question], options: PolicyOptions) -> Replies:
    """Every model's reply to each prompt, of at most ``--max_answer_seq_len`` tokens."""
    brief = replace(options, max_new_tokens=options.max_answer_seq_len)
    return answers_of(models, questions, brief, answers_folder(options.out, questions))


def prompts_of_file(path: str, temperature: float, for_models: bool = True) -> list[Question]:
    """A file's prompts. ``for_models``: refuse half of a surrogate pair, which cannot be tokenized.

    Raises ``InputError`` naming file and record.
    """
    file = Path(path)
    if not file.is_file() or not suffix_of(file):
        raise InputError(f"--prompts {path}: no such .jsonl, .json or .parquet file")
    questions = []
    for position, record in read_records(file, FIELDS):
        field = next((field for field in FIELDS if isinstance(record.get(field), str)), None)
        if field is None:
            raise InputError(f"--prompts {place(path, position)}: no text in 'instruction' or 'prompt'")
        text = record[field]
        if not text.strip():
            raise InputError(f"--prompts {place(path, position)}: {field!r} is empty")
        if for_models and not is_text(text):
            raise InputError(f"--prompts {place(path, position)}: half of a surrogate pair, not text")
        questions.append(Question(prompt_id(text), [text], temperature, raw=field == "prompt"))
    if not questions:
        raise InputError(f"--prompts {path}: no records")
    return questions
