"""What the external model is asked, and how its answer is read (paper section 4.1 and Appendix A).

The question shows the conversation, the preferred and the non-preferred response between tags; the answer holds the
reasoning and the modified response between tags. Other programs may rely on this layout.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference

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

_TURN = re.compile(r"\s*\n\n(Human|Assistant): ?|^ ?(Human|Assistant): ?")
_TAG_LIKE = re.compile(
    r"<[\s/]*\|[^<>\n]{0,60}>|<[^<>\n]{0,60}\|>"  # <|…|>, <|…>, <…|>, </|…|>
    r"|<\|\s*(start|end)\b"
    r"|[<\[*]\s*/?\s*(start|end)\s+(of\s+)?(reasoning|context|(modified|(non-)?preferred)\s+response)\b",
    re.IGNORECASE,
)
_MARKED_TURN = re.compile(r"(?:^|\n)\s*###\s*(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of an answer. ``modified`` is None where the answer does not mark a modified response."""

    reasoning: str
    modified: str | None
    complete: bool  # the modified response's end tag is there


def load_template(path: str | Path) -> str:
    """A user's own instruction. Raises ``InputError`` where a placeholder or the tag that marks the answer lacks."""
    try:
        template = Path(path).read_text(encoding="utf-8")
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
        "context": context_of(preference.prompt),
        "chosen": preference.chosen.strip(),
        "rejected": preference.rejected.strip(),
    }
    # One pass over the template: braces in the texts themselves stay as they are.
    text = re.sub(r"\{(" + "|".join(PLACEHOLDERS) + r")\}", lambda match: parts[match[1]], template)
    return [{"role": "user", "content": text}]


def context_of(prompt: str) -> str:
    """The conversation as ``###Human: …`` / ``###Assistant: …`` lines, ending with the human's turn.

    >>> context_of("\\n\\nHuman: Hi\\n\\nAssistant: Hello!\\n\\nHuman: Who are you?\\n\\nAssistant:")
    '###Human: Hi\\n###Assistant: Hello!\\n###Human: Who are you?'
    """
    pieces = _TURN.split(prompt)
    turns = [(pieces[i] or pieces[i + 1], pieces[i + 2].strip()) for i in range(1, len(pieces), 3)]
    if pieces[0].strip() or not turns:  # not (only) the Human / Assistant form: one human turn
        return f"###Human: {prompt.strip()}"
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    return "\n".join(f"###{speaker}: {text}" for speaker, text in turns)


def prompt_of(context: str) -> str:
    """The prompt that ``context_of`` shows, in the form of HH-RLHF.

    >>> prompt_of("###Human: Hi\\n###Assistant: Hello!\\n###Human: Who are you?")
    '\\n\\nHuman: Hi\\n\\nAssistant: Hello!\\n\\nHuman: Who are you?\\n\\nAssistant:'
    """
    pieces = _MARKED_TURN.split(context)
    turns = list(zip(pieces[1::2], pieces[2::2], strict=True)) or [("Human", context)]
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    return "".join(f"\n\n{speaker}: {text.strip()}" for speaker, text in turns) + "\n\nAssistant:"


def parse_answer(text: str, rejected: str = "") -> Answer:
    """Read an answer: tags in any capitals ("of" and "Of"), end tags missing, code fences, talk before and after.

    The last modified response counts. It gets the white space around it from ``rejected``, and loses a code fence or a
    speaker's name in front that ``rejected`` does not have: such things are the answer's wrapping, not edits.
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    starts = list(_tag("start", "modified response").finditer(text))
    reasoning_part = text[: starts[-1].start()] if starts else text
    after_start = _tag("start", "reasoning").split(reasoning_part)[-1]
    reasoning = _unfenced(_tag("end", "reasoning").split(after_start)[0].strip())
    if not starts:
        return Answer(reasoning, None, False)
    modified, *rest = _tag("end", "modified response").split(text[starts[-1].end() :])
    modified = modified.strip()
    if "```" not in rejected:
        modified = _unfenced(modified)
    if not _speaker(rejected):
        modified = modified[_speaker(modified) :]
    return Answer(reasoning, with_white_space_of(rejected, modified), bool(rest))


def with_white_space_of(rejected: str, modified: str) -> str:
    """``modified`` between the white space that ``rejected`` begins and ends with (a blank ``rejected``: one space)."""
    if not rejected.strip():
        return f" {modified.strip()}"
    start = len(rejected) - len(rejected.lstrip())
    end = len(rejected.rstrip())
    return rejected[:start] + modified.strip() + rejected[end:]


def has_stray_tag(modified: str, rejected: str) -> bool:
    """Whether ``modified`` has one of the prompt's tags, perhaps misspelt, or a chat template's token, and ``rejected``
    does not: the rest of a wrapping that was not understood, which would be labelled as an edit.
    """
    return any(found[0] not in rejected for found in _TAG_LIKE.finditer(modified))


def _tag(edge: str, name: str) -> re.Pattern:
    words = r"\s+".join([edge, "of", *name.split()])
    return re.compile(rf"<\|\s*{words}\s*\|>", re.IGNORECASE)


def _unfenced(text: str) -> str:
    """Without a code fence around it, or the one fence that is left of a pair around the whole answer."""
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
