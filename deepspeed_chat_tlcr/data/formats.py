"""How one record of each known data set becomes (prompt, chosen, rejected).

The names, their split names and the text forms are DeepSpeed-Chat's (and ``Dahoas/template-full-hh-rlhf`` is the TLCR
release's), so a prompt and response read here join to the text DeepSpeed-Chat trains on. docs/data.md has the table.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.turns import assistant_turn, render, shared_start

Triple = tuple[str | None, str | None, str | None]  # prompt, chosen, rejected; None where the record has none


@dataclass(frozen=True)
class DatasetFormat:
    """One data set that DeepSpeed-Chat knows by name."""

    name: str  # DeepSpeed-Chat looks for this string inside --data_path
    fields: tuple[str, ...]  # the record's keys that `read` looks at
    read: Callable[[dict], Triple]
    eval_split: str | None  # None: train and eval are a 9:1 split of the set's train split
    has_rejected: bool
    hub_id: str | None = None  # where it lives on the Hub when that is not the name
    hub_folder: str | None = None  # the configuration's folder in the Hub's Parquet export, where there are several


def _human(question: str | None) -> str | None:
    return None if question is None else f" Human: {question} Assistant:"


def _answer(text: str | None) -> str | None:
    return None if text is None else f" {text}"


def _first(items: list | None, key: str | None = None) -> str | None:
    if not items:
        return None
    return items[0] if key is None else items[0][key]


def _inst_template(row: dict) -> Triple:
    prompt = row["prompt"].replace("\n\nHuman:", "</s>[INST]").replace("\n\nAssistant:", "</s>[/INST]")
    return prompt[max(prompt.find("[INST]"), 0) :], row["chosen"], row["rejected"]


def _columns(prompt: str, chosen: str, rejected: str | None = None) -> Callable[[dict], Triple]:
    """Records of plain questions and answers in columns of these names."""

    def read(row: dict) -> Triple:
        return _human(row[prompt]), _answer(row[chosen]), _answer(row[rejected]) if rejected else None

    return read


def _reward_datasets(row: dict) -> Triple:
    def after_marker(text: str) -> str:
        return text.lstrip().removeprefix("Assistant:") if text.lstrip().startswith("Assistant:") else text

    return row["prompt"] + "Assistant:", after_marker(row["chosen"]), after_marker(row["rejected"])


def _webgpt(row: dict) -> Triple:
    def without_citations(text: str) -> str:
        return re.sub(r"[\(\[].*?[\)\]]", "", re.sub(r" [\(\[].*?[\)\]]", "", text))

    first_wins = float(row["score_0"]) >= float(row["score_1"])
    chosen, rejected = ("answer_0", "answer_1") if first_wins else ("answer_1", "answer_0")
    prompt = _human(row["question"]["full_text"])
    return prompt, _answer(without_citations(row[chosen])), _answer(without_citations(row[rejected]))


def _shp(row: dict) -> Triple:
    a_wins = int(row["labels"]) == 1
    chosen, rejected = ("human_ref_A", "human_ref_B") if a_wins else ("human_ref_B", "human_ref_A")
    return _human(row["history"]), _answer(row[chosen]), _answer(row[rejected])


def _sharegpt(row: dict) -> Triple:
    prompt = row["prompt"] and row["prompt"].replace("USER", "Human").replace("ASSISTANT", "Assistant")
    return prompt or None, _answer(row["label"] or None), None


def _miracl(row: dict) -> Triple:
    positive, negative = (_first(row[key], "text") for key in ("positive_passages", "negative_passages"))
    return _human(row["query"]), _answer(positive), _answer(negative)


def _hc3(row: dict) -> Triple:
    return _human(row["question"]), _answer(_first(row["human_answers"])), None


def _mkqa(language: str) -> Callable[[dict], Triple]:
    def read(row: dict) -> Triple:
        return _human(row["queries"][language]), _answer(_first(row["answers"][language], "text")), None

    return read


def _qag_jaquad(row: dict) -> Triple:
    return _human(_first(row["questions"])), _answer(row["paragraph"]), None


def _json_file(row: dict) -> Triple:
    prompt, chosen, rejected = own_strings(row)
    return _answer(prompt), _answer(chosen), _answer(rejected)


LOCAL_JSON = "local/jsonfile"
_PAIR = ("prompt", "chosen", "rejected")
_WEBGPT = ("question", "answer_0", "answer_1", "score_0", "score_1")
_PASSAGES = ("query", "positive_passages", "negative_passages")
_ZHIHU, _JAQUAD = ("INSTRUCTION", "RESPONSE"), ("question", "sentence")
_TEMPLATE_OF = "Dahoas/full-hh-rlhf"

# In DeepSpeed-Chat's order: the first name found in --data_path decides.
FORMATS = (
    DatasetFormat("Dahoas/rm-static", _PAIR, itemgetter(*_PAIR), "test", True),
    DatasetFormat("Dahoas/full-hh-rlhf", _PAIR, itemgetter(*_PAIR), "test", True),
    DatasetFormat("Dahoas/template-full-hh-rlhf", _PAIR, _inst_template, "test", True, hub_id=_TEMPLATE_OF),
    DatasetFormat("Dahoas/synthetic-instruct-gptj-pairwise", _PAIR, _columns(*_PAIR), None, True),
    DatasetFormat("yitingxie/rlhf-reward-datasets", _PAIR, _reward_datasets, "test", True),
    DatasetFormat("openai/webgpt_comparisons", _WEBGPT, _webgpt, None, True),
    DatasetFormat("stanfordnlp/SHP", ("history", "human_ref_A", "human_ref_B", "labels"), _shp, "validation", True),
    DatasetFormat("pvduy/sharegpt_alpaca_oa_vicuna_format", ("prompt", "label"), _sharegpt, "test", False),
    DatasetFormat("wangrui6/Zhihu-KOL", _ZHIHU, _columns(*_ZHIHU), None, False),
    DatasetFormat("Cohere/miracl-zh-queries-22-12", _PASSAGES, _miracl, "dev", True),
    DatasetFormat("Hello-SimpleAI/HC3-Chinese", ("question", "human_answers"), _hc3, None, False, hub_folder="all"),
    DatasetFormat("mkqa-Chinese", ("queries", "answers"), _mkqa("zh_cn"), None, False, hub_id="apple/mkqa"),
    DatasetFormat("mkqa-Japanese", ("queries", "answers"), _mkqa("ja"), None, False, hub_id="apple/mkqa"),
    DatasetFormat("Cohere/miracl-ja-queries-22-12", _PASSAGES, _miracl, "dev", True),
    DatasetFormat("lmqg/qg_jaquad", _JAQUAD, _columns(*_JAQUAD), "validation", False),
    DatasetFormat("lmqg/qag_jaquad", ("questions", "paragraph"), _qag_jaquad, "validation", False),
    DatasetFormat(LOCAL_JSON, _PAIR, _json_file, "eval", True),
)


def find_format(data_path: str) -> DatasetFormat | None:
    """The first known name that occurs inside ``data_path``, as in DeepSpeed-Chat; None if none does."""
    return next((known for known in FORMATS if known.name in data_path), None)


# ---- the user's own records ------------------------------------------------------------------------------------------

OWN_FIELDS = ("prompt", "chosen", "rejected", "messages")
_PROBE = "\ue000"  # a private-use character, which no template contains: it marks where a response begins
_WRITTEN_MESSAGES = re.compile(
    r"""\s*\[?\s*\{.*?(['"])(role|from)\1\s*:\s*(['"])(system|user|assistant|tool|human|gpt)\3""", re.DOTALL
)


def has_messages(row: dict) -> bool:
    """True where the record is a chat: its prompt, responses or ``messages`` are lists."""
    return any(isinstance(row.get(field), list) for field in OWN_FIELDS)


def own_strings(row: dict) -> Triple:
    """A record of three strings, taken as they are. ``rejected`` may be absent (SFT only).

    Raises ``InputError`` that names the key where something is missing, empty or of another type.
    """
    for field in ("prompt", "chosen", "rejected"):
        value = row.get(field)
        if value is None and field != "rejected":
            known = ", ".join(sorted(map(str, row))) or "none"
            raise InputError(f"no {field!r}; a record has prompt, chosen, rejected or chat messages (found: {known})")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{field!r} is of type {type(value).__name__}, expected a string")
        if value == "":
            raise InputError(f"{field!r} is empty")
        _refuse_written_messages(value, field)
    return row["prompt"], row["chosen"], row.get("rejected")


def _refuse_written_messages(value: object, field: str):
    if isinstance(value, str) and _WRITTEN_MESSAGES.match(value):
        raise InputError(
            f"{field!r} is a list of chat messages written as a string, which would be trained on as it stands; "
            "store the list itself (json.loads or ast.literal_eval gives it)"
        )


class ChatRecords:
    """Renders chat records with a tokenizer's chat template: prompt, chosen, rejected, and the conversation in the form
    that the external model sees.

    The prompt is rendered with ``add_generation_prompt=True``. A response is the rest of the whole conversation's
    rendering, without the token that ends the turn, because tokenisation appends it (``turns.end_after``). BOS at the
    start is left out if the tokenizer adds it.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"the records are chat messages but the tokenizer {tokenizer.name_or_path} has no chat template; "
                "use one that has, or give prompt, chosen and rejected as strings"
            )
        self.tokenizer = tokenizer
        bos = tokenizer.bos_token
        adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.own_bos = bos if adds_bos else ""
        turn = assistant_turn(tokenizer)
        self.closing = turn.closing if turn else ""
        end = turn.end_id if turn else None
        self.end = tokenizer.eos_token if end is None else tokenizer.added_tokens_decoder[end].content

    def __call__(self, row: dict) -> tuple[str, str, str | None, str]:
        prompt, *turns = split_conversations(row)
        texts = [None if turn is None else self._render(prompt + [turn]) for turn in turns]
        header = self._render(prompt, generation=True)
        if not all(text is None or text.startswith(header) for text in texts):
            # Some templates add a thinking tag to the generation prompt that finished answers do not have. A response
            # that cannot resemble such a tag shows where the two differ.
            probed = self._render(prompt + [{"role": "assistant", "content": _PROBE}])
            header = shared_start(header, probed)
        chosen, rejected = (None if text is None else self._response(text, header) for text in texts)
        return header.removeprefix(self.own_bos), chosen, rejected, conversation(prompt)

    def prompt(self, messages: list[dict]) -> str:
        """The text behind which the model answers these messages, to be tokenised as any prompt."""
        return self._render(messages, generation=True).removeprefix(self.own_bos)

    def _render(self, messages: list[dict], generation: bool = False) -> str:
        return render(self.tokenizer, messages, generation)

    def _response(self, text: str, header: str) -> str:
        if not text.startswith(header):
            raise InputError("the tokenizer's chat template does not render the prompt as the beginning of the whole")
        response = text[len(header) :]
        words, end, rest = response.rpartition(self.end)
        if end and not rest.replace(self.tokenizer.eos_token, "").strip():
            return words
        # The template ends turns with ordinary text: EOS replaces it.
        return response.removesuffix(self.closing) if self.closing.strip() else response


def conversation(messages: list[dict]) -> str:
    """Messages as ``###Human: …`` / ``###Assistant: …`` lines, the form that the external model sees.

    >>> conversation([{"role": "user", "content": "Hi"}])
    '###Human: Hi'
    """
    speakers = {"user": "Human"}
    return "\n".join(
        f"###{speakers.get(message['role'], message['role'].capitalize())}: {message['content'].strip()}"
        for message in messages
        if message["content"].strip()
    )


def split_conversations(row: dict) -> tuple[list[dict], dict, dict | None]:
    """Prompt messages, the chosen and (if any) the rejected assistant message of a chat record.

    Accepted: ``prompt`` (messages, or one user string) with ``chosen`` / ``rejected`` (messages or strings);
    ``chosen`` / ``rejected`` as whole conversations that share all but the last message; ``messages`` alone.
    Raises ``InputError`` that says what does not fit.
    """
    if row.get("chosen") is None:
        if row.get("messages") is None:
            raise InputError("no 'chosen' and no 'messages'")
        messages = _messages(row["messages"], "messages")
        return messages[:-1], *_last_turns(messages[:-1], messages, None)
    prompt = row.get("prompt")
    if isinstance(prompt, str) and isinstance(row["chosen"], str):
        raise InputError("strings, while the first record has chat messages; use one form per data set")
    chosen = _messages(row["chosen"], "chosen", "assistant")
    rejected = None if row.get("rejected") is None else _messages(row["rejected"], "rejected", "assistant")
    if prompt is not None and chosen[0]["role"] == "assistant":
        shared = _messages(prompt, "prompt", "user")
        whole = [None if turns is None else shared + turns for turns in (chosen, rejected)]
    else:  # the responses are whole conversations; a prompt beside them repeats their beginning
        if isinstance(prompt, list) and chosen[: len(prompt)] != _messages(prompt, "prompt"):
            raise InputError("'chosen' begins neither with the assistant's answer nor with the messages of 'prompt'")
        shared = chosen[:-1]
        whole = [chosen, rejected]
        if isinstance(prompt, str) and not any(prompt.strip() in (m["content"], m["content"].strip()) for m in shared):
            raise InputError("'prompt' is none of the messages in front of the answer; leave it out, or mend it")
    return shared, *_last_turns(shared, *whole)


def _messages(value: object, field: str, role_of_string: str | None = None) -> list[dict]:
    _refuse_written_messages(value, field)
    if isinstance(value, str) and role_of_string:
        value = [{"role": role_of_string, "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{field!r} is {_kind(value)}, expected a list of messages")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise InputError(f"{field!r}, message {number} is {_kind(message)}, expected role and content")
        for key in ("role", "content"):
            may_be_empty = key == "content" and message.get("role") == "system"
            value = message.get(key)
            if not isinstance(value, str) or not (value or may_be_empty):
                raise InputError(f"{field!r}, message {number}: {key!r} is {_kind(value)}, expected a string")
        messages.append({key: part for key, part in message.items() if part is not None})
    return messages


def _last_turns(shared: list[dict], *conversations: list[dict] | None) -> Any:
    """The last message of each conversation, which has to be the assistant's and all that follows ``shared``."""
    if not shared:
        raise InputError("the prompt is empty: a conversation needs a message before the assistant's answer")
    turns: list[dict | None] = []
    for conversation in conversations:
        if conversation is not None and conversation[:-1] != shared:
            raise InputError("chosen and rejected have to be equal up to their last message, one answer each")
        if conversation is not None and conversation[-1]["role"] != "assistant":
            raise InputError(f"the last message is the {conversation[-1]['role']}'s, expected the assistant's answer")
        turns.append(None if conversation is None else conversation[-1])
    return turns


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    return "empty" if value in ("", [], {}) else f"of type {type(value).__name__}"
