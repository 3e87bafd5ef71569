"""The user's models: their names and folders, and their answers to questions, kept on disk and never written twice."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from deepspeed_chat_tlcr.arguments import Dtype
from deepspeed_chat_tlcr.asking.journal import cut_torn_line, replace_file
from deepspeed_chat_tlcr.data.formats import ChatRecords
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.generation import Answer, Decoding, answers
from deepspeed_chat_tlcr.models import embedding_rows, load_causal_lm
from deepspeed_chat_tlcr.records import read_json, read_jsonl
from deepspeed_chat_tlcr.runtime import TORCH_DTYPES, resolve_dtype
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from deepspeed_chat_tlcr.turns import assistant_turn
from deepspeed_chat_tlcr.workers import processes_of, spread
from evaluation.options import PolicyOptions

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Question:
    """``turns``: what a user says, one after another. ``raw``: the only turn is a whole prompt, markers included."""

    id: int | str
    turns: Sequence[str]
    temperature: float = 1.0
    raw: bool = False


@dataclass(frozen=True)
class Reply:
    """A model's answers, one for each turn, with their ``tokens``, EOS included, and whether the model ended them."""

    turns: list[str]
    tokens: list[int]
    ended: list[bool]


Replies = dict[str, dict[int | str, Reply]]
"""By model, then by question."""


def parse_models(entries: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` entries. Raises ``InputError`` for a bad or repeated name, or a folder that holds no model."""
    models: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or not path or not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"--models {entry}: expected NAME=FOLDER, the name of letters, digits and . + - _")
        if name in models:
            raise InputError(f"--models: {name} is named twice")
        looks_local = path.startswith(("/", ".", "~")) or Path(path).exists()
        if looks_local and not (Path(path) / "config.json").is_file():
            raise InputError(f"--models {entry}: no model in {path} (no config.json)")
        models[name] = path
    if not models:
        raise InputError("--models: name at least 1 as NAME=FOLDER")
    return models


def is_text(value: object) -> bool:
    """A string that can be written: JSON can spell half of a surrogate pair, which is not text."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def torch_dtype(name: Dtype) -> torch.dtype:
    return TORCH_DTYPES[resolve_dtype(name)]


# ---- from a dialogue to a prompt -------------------------------------------------------------------------------------


def prompt_text(tokenizer: PreTrainedTokenizerFast, question: Question, replies: Sequence[str]) -> str:
    """The prompt for the turn of ``question`` that comes after ``replies``.

    It is made by the model's chat template; without one in HH-RLHF's form, on which the paper's models are trained.
    """
    turns = question.turns[: len(replies) + 1]
    if question.raw:
        return turns[-1]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": turns[0]}]
        for reply, turn in zip(replies, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": turn}]
        return ChatRecords(tokenizer).prompt(messages)
    text = f"{HUMAN} {turns[0]}{ASSISTANT}"
    for reply, turn in zip(replies, turns[1:], strict=True):
        text += f" {reply}{HUMAN} {turn}{ASSISTANT}"
    return text


def in_context(tokenizer: PreTrainedTokenizerFast, question: Question, text: str) -> str:
    """A stripped answer as it stands behind ``prompt_text``: with the space that the dialogue's form has there."""
    turn = assistant_turn(tokenizer)
    space = " " if turn is None else turn.space
    return text if question.raw or (space and text.startswith(space)) else f"{space}{text}"


def prompt_ids(tokenizer: PreTrainedTokenizerFast, question: Question, replies: Sequence[str]) -> list[int]:
    return tokenize_prompt(tokenizer, prompt_text(tokenizer, question, replies))


def clean(text: str, raw: bool) -> str:
    """An answer without the white space around it and without any human's turn that the model invented after it.

    Answers to ``raw`` prompts stay as they are: rewards are given to exactly their tokens.
    """
    return text if raw else text.split(HUMAN)[0].strip()


# ---- answers ---------------------------------------------------------------------------------------------------------


class Policy:
    """A model that answers. It is loaded for the first question without an answer on disk."""

    def __init__(self, name: str, path: str, options: PolicyOptions):
        self.name, self.path, self.options = name, path, options
        self.tokenizer: PreTrainedTokenizerFast | None = None
        self.model: PreTrainedModel | None = None

    def load(self):
        if self.model is None:
            self.tokenizer = load_tokenizer(self.path, rows=embedding_rows(self.path))
            dtype = torch_dtype(self.options.dtype)
            model = load_causal_lm(self.path, dtype, attention=self.options.attn_implementation)
            self.model = model.to(device()).eval()
            self.room = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30

    def answer(self, prompts: Sequence[list[int]], temperature: float) -> Iterator[Answer]:
        """Answers in order. A prompt that leaves room for less than ``max_new_tokens`` is answered on its own, in that
        room; one that fills the model's positions gets an empty answer.
        """
        decoding = Decoding(self.options.max_new_tokens, temperature)
        roomy = [prompt for prompt in prompts if len(prompt) + decoding.max_new_tokens <= self.room]
        together = answers(self.model, self.tokenizer, roomy, decoding, max(len(roomy), 1))
        for prompt in prompts:
            left = self.room - len(prompt)
            if left >= decoding.max_new_tokens:
                yield next(together)
            elif left > 0:
                alone = replace(decoding, max_new_tokens=left)
                yield next(answers(self.model, self.tokenizer, [prompt], alone, 1))
            else:
                yield Answer(prompt, [], "", False)

    def reply(self, questions: Sequence[Question]) -> list[Reply]:
        """All turns of questions that have equal temperature and number of turns."""
        self.load()
        replies = [Reply([], [], []) for _ in questions]
        for _ in questions[0].turns:
            prompts = [
                prompt_ids(self.tokenizer, question, reply.turns)
                for question, reply in zip(questions, replies, strict=True)
            ]
            written = self.answer(prompts, questions[0].temperature)
            for question, reply, answer in zip(questions, replies, list(written), strict=True):
                reply.turns.append(clean(answer.text, question.raw))
                reply.tokens.append(len(answer.response_ids))
                reply.ended.append(answer.ended)
        return replies

    def ready(self) -> Callable[[tuple[int, Sequence[Question]]], list[Reply]]:
        """Load the model; the function returned answers a numbered batch, whose number seeds its sampling."""
        self.load()
        return self.reply_to_batch

    def reply_to_batch(self, batch: tuple[int, Sequence[Question]]) -> list[Reply]:
        number, questions = batch
        set_seed(self.options.seed + number)
        return self.reply(questions)


def answer_all(policy: Policy, questions: Sequence[Question], folder: Path) -> dict[int | str, Reply]:
    """Every question's reply: read from ``folder/NAME.jsonl`` where it is there, else written to it.

    The file has FastChat's ``model_answer`` form. Neither an interruption nor the number of processes changes the
    batches or their seeds, so they do not change the answers. Raises ``InputError`` where the file holds answers of
    other weights, questions or settings.
    """
    require_writable(folder)
    path = folder / f"{policy.name}.jsonl"
    bind(path, settings_of(policy, questions))
    cut_torn_line(path)
    done = dict(read_replies(path)) if path.exists() else {}
    batches = enumerate(batched(questions, policy.options.generation_batch_size))
    left = [(number, batch) for number, batch in batches if any(question.id not in done for question in batch)]
    written = spread(policy.ready, left, processes_of(policy.options.num_processes))
    bar = tqdm(total=len(questions), desc=f"answers of {policy.name}", mininterval=1.0)
    bar.update(len(questions) - sum(len(batch) for _, batch in left))
    for (_, batch), replies in zip(left, written, strict=True):
        fresh = {q.id: r for q, r in zip(batch, replies, strict=True) if q.id not in done}
        with path.open("a", encoding="utf-8") as file:
            file.writelines(answer_line(policy.name, id, reply) for id, reply in fresh.items())
            file.flush()
            os.fsync(file.fileno())
        done |= fresh
        bar.update(len(batch))
    bar.close()
    return {question.id: done[question.id] for question in questions}


def answers_of(
    models: Mapping[str, str], questions: Sequence[Question], options: PolicyOptions, folder: Path
) -> Replies:
    """The replies of every model (``answer_all``)."""
    return {name: answer_all(Policy(name, path, options), questions, folder) for name, path in models.items()}


def answers_folder(out: str | Path, questions: Sequence[Question]) -> Path:
    """The folder of answers to these questions, shared by all parts, so that they are written once.

    A file of the same name beside it has the prompts, for evaluation/human/make.py.
    """
    folder = Path(out) / "answers" / f"{len(questions)}-prompts-{questions_hash(questions)[:6]}"
    require_writable(folder)
    records = ({"prompt" if question.raw else "instruction": question.turns[0]} for question in questions)
    replace_file(folder.with_suffix(".jsonl"), (json.dumps(record) + "\n" for record in records))
    return folder


def questions_hash(questions: Sequence[Question]) -> str:
    asked = [[question.id, list(question.turns), question.temperature, question.raw] for question in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def batched(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of one temperature and number of turns, in the order of the questions."""
    groups: dict[tuple[float, int], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.temperature, len(question.turns)), []).append(question)
    for group in groups.values():
        yield from (group[begin : begin + size] for begin in range(0, len(group), size))


def answer_line(name: str, id: int | str, reply: Reply) -> str:
    choice = {"index": 0, "turns": reply.turns, "tokens": reply.tokens, "ended": reply.ended}
    answer_id = hashlib.sha256(json.dumps([name, id, reply.turns]).encode()).hexdigest()[:22]
    record = {"question_id": id, "answer_id": answer_id, "model_id": name, "choices": [choice], "tstamp": time.time()}
    return json.dumps(record) + "\n"


def read_replies(path: Path) -> Iterator[tuple[int | str, Reply]]:
    for number, record in read_jsonl(path):
        try:
            choice = record["choices"][0]
            turns = choice["turns"]
            tokens = choice.get("tokens", [0] * len(turns))
            ended = choice.get("ended", [True] * len(turns))
            if not turns or not all(isinstance(turn, str) for turn in turns):
                raise TypeError("no turns, or turns that are not texts")
            if not len(turns) == len(tokens) == len(ended) or not isinstance(record["question_id"], int | str):
                raise TypeError("question_id, tokens or ended of another kind")
            yield record["question_id"], Reply(turns, tokens, ended)
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}:{number}: not an answer in FastChat's form ({error!r})") from None


def settings_of(policy: Policy, questions: Sequence[Question]) -> dict:
    """What an answer depends on."""
    return {
        "weights": fingerprint(policy.path),
        "questions": questions_hash(questions),
        "max_new_tokens": policy.options.max_new_tokens,
        "generation_batch_size": policy.options.generation_batch_size,
        "dtype": policy.options.dtype,
        "attn_implementation": policy.options.attn_implementation,
        "seed": policy.options.seed,
    }


def bind(path: Path, settings: dict) -> None:
    """Tie an answer file to its settings, which stand in a ``.json`` beside it."""
    beside = path.with_suffix(".json")
    # Files of earlier versions do not name the attention, which was always sdpa.
    before = {"attn_implementation": "sdpa", **read_json(beside)} if beside.exists() else None
    if before is None or not path.exists():
        write_json(beside, settings)
    elif different := [name for name in settings if before.get(name) != settings[name]]:
        changes = ", ".join(f"{name} was {before.get(name)!r}, is {settings[name]!r}" for name in different)
        raise InputError(f"{path} holds answers made with other settings ({changes}): remove it or change --out")


def fingerprint(path: str) -> str:
    """Tells checkpoints apart by the size of every file of weights and 16 pieces of it; a hub's model by its name."""
    digest = hashlib.sha256()
    files = sorted(file for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for piece in range(16):
                data.seek(size * piece // 16)
                digest.update(data.read(65536))
    return digest.hexdigest()[:16] if files else path
