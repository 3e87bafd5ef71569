"""The question for the external model, and how its answer is read (paper section 4.1 and Appendix A).

The question has the conversation, the preferred and the non-preferred response between tags; the answer has the
reasoning and the modified response between tags. Other programs may rely on this layout.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference, require_file

TEMPLATE = """\
Below are a conversation between a human and an assistant and two candidate responses for the assistant's next turn. \
People preferred one of them to the other. Do two things, in this order.

1. Reason: compare the two responses in the light of the conversation and say why the non-preferred response is worse.
2. Modify: turn the non-preferred response into one that people would like as much as the preferred response, with as \
few edits as possible. Add, delete or replace only the words that make it worse and keep every other word as it is. \
Do not write a new response and do not copy the preferred one.

<|Start of Context|>
{context}
<|End of Context|>

<|Start of Preferred Response|>
{chosen}
<|End of Preferred Response|>

<|Start of Non-Preferred Response|>
{rejected}
<|End of Non-Preferred Response|>

Answer in exactly this format and write nothing else:
<|Start of Reasoning|>
(your reasoning)
<|End of Reasoning|>
<|Start of Modified Response|>
(the modified non-preferred response)
<|End of Modified Response|>
"""

PLACEHOLDERS = ("context", "chosen", "rejected")

# How a prompt's turns begin, in HH-RLHF's form and in common chat templates (ChatML, Llama 3, Gemma, Phi and Zephyr,
# Llama 2 and Mistral). Chat data needs no such guess: its records have a context.
_TURN = re.compile(r"\s*\n\n(Human|Assistant): ?|^ ?(Human|Assistant): ?")
_TEMPLATE_TURN = re.compile(
    r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|)(system|user|assistant|model)\b"
    r"(?:<\|end_header_id\|>|\|>)?|(\[/?INST\])"
)
_SPEAKERS = {"user": "Human", "[INST]": "Human", "system": "System"}
_TAG_LIKE = re.compile(
    r"<[\s/]*\|[^<>\n]{0,60}>|<[^<>\n]{0,60}\|>"  # <|…|>, <|…>, <…|>, </|…|>
    r"|<\|\s*(start|end)\b"
    r"|\b(start|end)\s+of\s+(modified|(non-?)?preferred)\s+response\b"
    r"|[<\[*]\s*/?\s*(start|end)\s+(of\s+)?(reasoning|context|(modified|(non-?)?preferred)\s+response)\b",
    re.IGNORECASE,
)
# Other forms of the characters of tags, one for one: full-width ones, other bars and dashes.
_LOOK_ALIKES = str.maketrans("｜¦│＜〈＞〉＊＃（）［］：‐‑‒–—―－", "|||<<>>*#()[]:-------")
# Markdown around a tag, on its line.
_DECORATION = r"(?:[#*_`~=>|<()\[\]{}/:\- \t]|&[lg]t;)*"
_FIRST_TOKEN = re.compile(r"^\s*(?:<s>|<bos>|<\|begin_of_text\|>)")
_BEFORE = re.compile(r"\s*(?:<think>.*?</think>\s*)?", re.DOTALL)
_LAST_TOKEN = re.compile(r"(?:<\|[a-z_]{1,30}\|>|</s>|<end_of_turn>|<eos>)\Z")
_MARKS = ("***", "**", "*", "__", "_", "`", '"', "'", "“”", "‘’", "„“", "«»", "「」", "()")
_LABEL = re.compile(
    r"""[#*_>\s"'`]*(?:here(?:['’]s|\s+is)\s+)?(?:(?:the|a|my)\s+)?"""
    r"(?:(?:modified|revised|edited|corrected|improved|rewritten|updated)\s+(?:non-?preferred\s+)?"
    r"(?:response[*_`]*\s*(?::|-+|\n)|(?:answer|version|text)[*_`]*\s*:)|(?:response|answer)[*_`]*\s*:)[*_`]*\s*",
    re.IGNORECASE,
)
_RULE = r"[-*=_]{3,}[ \t]*"
_MARKED_TURN = re.compile(r"(?:^|\n)\s*###\s*(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an answer. ``modified`` is None if the answer does not mark a modified response."""

    reasoning: str
    modified: str | None
    complete: bool  # whether the modified response has its end tag


def load_template(path: str | Path) -> str:
    """A user's own instruction. Raises ``InputError`` if a placeholder or the tag of the answer is missing."""
    try:
        template = require_file(path).read_text(encoding="utf-8")
    except InputError as error:
        raise InputError(f"--prompt_file {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file {path}: cannot be read as UTF-8 text ({error})") from None
    missing = [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in template]
    if missing:
        raise InputError(f"--prompt_file {path}: the placeholder {', '.join(missing)} is missing")
    if not _tag("start", "modified response").search(template):
        raise InputError(
            f"--prompt_file {path}: it must ask for the modified response between "
            "<|Start of Modified Response|> and <|End of Modified Response|>, which is how the answer is read"
        )
    return template


def build_messages(preference: Preference, template: str = TEMPLATE) -> list[dict]:
    """The chat messages of one question: a single user message, which every model's chat template accepts."""
    parts = {
        "context": preference.context or context_of(preference.prompt),
        "chosen": _framed(preference.chosen)[1],
        "rejected": _framed(preference.rejected)[1],
    }
    # One pass over the template: braces in the texts themselves stay as they are.
    text = re.sub(r"\{(" + "|".join(PLACEHOLDERS) + r")\}", lambda match: parts[match[1]], template)
    return [{"role": "user", "content": text}]


def context_of(prompt: str) -> str:
    """The conversation as ``###Human: …`` / ``###Assistant: …`` lines, ending with the human's turn.

    >>> context_of("\\n\\nHuman: Hi\\n\\nAssistant: Hello!\\n\\nHuman: Who are you?\\n\\nAssistant:")
    '###Human: Hi\\n###Assistant: Hello!\\n###Human: Who are you?'
    """
    turns = _turns(_TURN, prompt)
    if not turns:
        written = _turns(_TEMPLATE_TURN, _FIRST_TOKEN.sub("", prompt))
        turns = [(_SPEAKERS.get(name, "Assistant"), _without_last_tokens(text)) for name, text in written]
    if not turns:  # not (only) turns: one human turn
        return f"###Human: {prompt.strip()}"
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    return "\n".join(f"###{speaker}: {text}" for speaker, text in turns)


def _turns(beginning: re.Pattern, prompt: str) -> list[tuple[str, str]]:
    """(speaker, text) of each turn; none if the prompt does not begin with a turn."""
    before, *pieces = beginning.split(prompt)
    if before.strip():
        return []
    return [(pieces[i] or pieces[i + 1], pieces[i + 2].strip()) for i in range(0, len(pieces), 3)]


def prompt_of(context: str) -> str:
    """The inverse of ``context_of``: the prompt in HH-RLHF's form.

    >>> prompt_of("###Human: Hi\\n###Assistant: Hello!\\n###Human: Who are you?")
    '\\n\\nHuman: Hi\\n\\nAssistant: Hello!\\n\\nHuman: Who are you?\\n\\nAssistant:'
    """
    pieces = _MARKED_TURN.split(context)
    turns = list(zip(pieces[1::2], pieces[2::2], strict=True)) or [("Human", context)]
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    return "".join(f"\n\n{speaker}: {text.strip()}" for speaker, text in turns) + "\n\nAssistant:"


def parse_answer(text: str, rejected: str = "") -> Answer:
    """Read an answer. Tags may be in any case, without bars, in Markdown or full-width characters, or lack their end;
    there may be other text before and after.

    The last modified response counts. None of these is an edit: it loses a wrapping that ``rejected`` does not have (a
    code fence, bold type, quotes, a heading or a speaker's name in front), is written like ``rejected`` where the two
    look alike, and gets the text that ``rejected`` has around its words.
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    *before, after = _split("start", "modified response", text)
    reasoning = _split("start", "reasoning", "\n".join(before) if before else text)[-1]
    reasoning = _unfenced(_split("end", "reasoning", reasoning)[0].strip())
    if not before:
        return Answer(reasoning, None, False)
    modified, *rest = _split("end", "modified response", after)
    if "&lt;|" in text and "&lt;" not in rejected:  # the tags are escaped, so the words are
        modified = html.unescape(modified)
    return Answer(reasoning, framed_as(rejected, _unwrapped(modified, rejected)), bool(rest))


def framed_as(rejected: str, modified: str) -> str:
    """``modified`` in the convention of ``rejected``, with the text that ``rejected`` has around its words (one space
    in front if ``rejected`` is blank).
    """
    from labeling.convention import in_convention_of  # late: PLAN=1 reads TEMPLATE without packages

    before, words, after = _framed(rejected)
    return f"{before if words else ' '}{in_convention_of(words, _framed(modified)[1])}{after if words else ''}"


def _framed(text: str) -> tuple[str, str, str]:
    """A response in three parts: the text before its words, the words, the text behind them.

    Around the words are white space, thoughts of a thinking model, and tokens that end a turn. The external model does
    not see these, so it cannot edit them.
    """
    begin = _BEFORE.match(text).end()
    words = _without_last_tokens(text[begin:])
    return text[:begin], words, text[begin + len(words) :]


def _without_last_tokens(text: str) -> str:
    text = text.rstrip()
    while token := _LAST_TOKEN.search(text, max(0, len(text) - 40)):
        text = text[: token.start()].rstrip()
    return text


def has_stray_tag(modified: str, rejected: str) -> bool:
    """Whether ``modified`` has a tag of the prompt, perhaps misspelt, or a chat template's token that ``rejected`` does
    not have: the rest of an unknown wrapping, which would be labelled as an edit.
    """
    modified, rejected = modified.translate(_LOOK_ALIKES), rejected.translate(_LOOK_ALIKES)
    return any(tag[0] not in rejected for tag in _TAG_LIKE.finditer(modified))


def _tag(edge: str, name: str) -> re.Pattern:
    words = r"\s+".join([edge, "of", *name.split()]).replace("modified", r"modified(?:\s+non-?preferred)?")
    return re.compile(
        rf"^{_DECORATION}{words}{_DECORATION}$|(?:^{_DECORATION})?(?:<|&lt;)\s*\|?\s*{words}\s*\|?\s*(?:>|&gt;)",
        re.IGNORECASE | re.MULTILINE,
    )


def _split(edge: str, name: str, text: str) -> list[str]:
    """The pieces of a text between the tags of one kind."""
    pieces, end = [], 0
    for tag in _tag(edge, name).finditer(text.translate(_LOOK_ALIKES)):
        pieces.append(text[end : tag.start()])
        end = tag.end()
    return [*pieces, text[end:]]


def _unwrapped(text: str, rejected: str) -> str:
    """A modified response without the layers around it that ``rejected`` does not have."""
    rejected, wrapped = _framed(rejected)[1], None
    while text != wrapped:
        text, wrapped = _peeled(text.strip(), rejected), text
    return text


def _peeled(text: str, rejected: str) -> str:
    """The text without its outermost layers."""
    if "```" not in rejected:
        text = _unfenced(text)
    if not _speaker(rejected):
        text = text[_speaker(text) :]
    for form in (_LABEL, re.compile(rf"{_RULE}\n")):
        plain, begins_so = text.translate(_LOOK_ALIKES), form.match(rejected.translate(_LOOK_ALIKES))
        if not begins_so and (layer := form.match(plain)) and layer.end() < len(text):
            text = text[layer.end() :]
    if not re.search(rf"\n{_RULE}$", rejected):
        text = re.sub(rf"\n{_RULE}$", "", text)
    lines = text.splitlines()
    if lines and all(line.startswith(">") for line in lines if line.strip()) and not rejected.startswith(">"):
        text = "\n".join(line.removeprefix(">").removeprefix(" ") for line in lines)
    for mark in _MARKS:
        first, last = (mark[0], mark[1]) if len(set(mark)) == 2 else (mark, mark)
        inner = text[len(first) : -len(last)]
        is_wrapping = text == first + inner + last and inner.strip() and not rejected.startswith(first)
        # If there are other quotes within than in the rejected response, the outer two may not be a pair.
        same_within = all(inner.count(one) in (0, rejected.count(one)) for one in (first, last))
        if is_wrapping and same_within and not rejected.endswith(last):
            return inner
    return text


def _unfenced(text: str) -> str:
    """The text without a code fence around it, or without one fence left from a pair around the whole answer."""
    fenced = re.fullmatch(r"```[\w-]*[ \t]*\n(.*?)\n?```", text, re.DOTALL)
    if fenced:
        return fenced[1].strip()
    if text.count("```") == 1:
        return re.sub(r"^```[\w-]*[ \t]*\n|\n?```$", "", text).strip()
    return text


def _speaker(text: str) -> int:
    """Length of a leading ``###Assistant:`` or ``Assistant:``."""
    match = re.match(r"\s*(###)?\s*Assistant:\s*", text)
    return match.end() if match else 0
