"""Which request fields an endpoint takes for a model, learnt from its refusals.

Models, gateways and years differ in the field that limits the answer, in temperature, top_p and seed, in the efforts of
reasoning and in lengths. So the first request is sent alone, and what its refusals say holds for all that follow.
"""

import re
from dataclasses import asdict, dataclass, field

from deepspeed_chat_tlcr.asking.models import EFFORTS

LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
SAMPLING_FIELDS = ("temperature", "top_p", "seed")
LOWEST = "lowest"  # of the efforts that the model has

_UNKNOWN_FIELD = re.compile(
    r"unsupported|not (be )?support|unknown|unrecogni[sz]ed|unexpected|extra (inputs|fields)|not permitted|not allowed"
    r"|does not (accept|take|have)|no longer|deprecated|incompatible|supported values|input should be|invalid value"
    r"|must be one of|use '?max",
    re.IGNORECASE,
)
_EFFORT_WORDS = re.compile(rf"['\"`‘’“”]({'|'.join(EFFORTS)})['\"`‘’“”]")
_CONTEXT = re.compile(r"(?:maximum|max) (?:model |context )+(?:length|window|len)\D{0,20}?(\d{3,8})", re.IGNORECASE)
_MOST_OUTPUT = re.compile(
    r"(?:at most|maximum(?: value)?(?: of| is)?|<=|less than or equal to) (\d{2,8})", re.IGNORECASE
)
# Codes and messages about the content of one request.
OF_ONE_REQUEST = re.compile(
    r"content[_ ](management )?(filter|policy)|context[_ ]length|string_above_max_length|prompt is too long"
    r"|invalid_prompt|flagged|moderation|safety|maximum (context|model|prompt) len|too many (input )?tokens|too long",
    re.IGNORECASE,
)


class EffortRefused(Exception):
    """The model does not have the effort that was asked for by name; it has ``choices``."""

    def __init__(self, choices: list[str]):
        super().__init__(", ".join(choices))
        self.choices = choices


@dataclass
class Dialect:
    """``effort``: the ``reasoning_effort`` that is sent; None: none is. Sizes are tokens; None: not known."""

    limit_field: str = "max_tokens"
    effort: str | None = None
    lowest: bool = False  # whether the lowest effort of the model was asked for
    left_out: list[str] = field(default_factory=list)  # fields that the endpoint does not take
    context: int | None = None  # of prompt and answer together
    most_output: int | None = None
    refusals: int = 0  # requests from whose refusal this was learnt

    def as_dict(self) -> dict:
        """The form in run.json."""
        sent = {"limit_field": self.limit_field, "reasoning_effort": self.effort, "left_out": sorted(self.left_out)}
        return sent | {"context": self.context, "refused_requests": self.refusals}

    def fields(self, limit: int, **sampling) -> dict:
        """The request's fields besides model and messages; ``sampling`` that is None or not taken is left out."""
        wanted = {self.limit_field: limit, "reasoning_effort": self.effort, **sampling}
        return {name: value for name, value in wanted.items() if value is not None and name not in self.left_out}

    def learn(self, status: int, code: str, param: str, message: str, sent: dict) -> bool:
        """Whether a refusal of ``sent`` says how to ask instead; then the same can be asked again, with other fields.

        Raises ``EffortRefused`` if the model does not have the effort that was asked for by name.
        """
        if status not in (400, 422):
            return False
        before = asdict(self)
        self._take_in(code, param, message, sent)
        learnt = before != asdict(self)
        self.refusals += learnt
        return learnt

    def _take_in(self, code: str, param: str, message: str, sent: dict):
        if length := _CONTEXT.search(message):
            self.context = min(self.context or 10**9, int(length[1]))
            return
        if OF_ONE_REQUEST.search(f"{code} {message}"):
            return
        name = self._field(param, message, sent)
        if name in LIMIT_FIELDS:
            most = _MOST_OUTPUT.search(message)
            if most and int(most[1]) < sent[name]:
                self.most_output = int(most[1])
            elif self._says_unknown(code, message):
                # Once refused, a name is not tried again; where both are refused, none is sent.
                self.left_out.append(name)
                self.limit_field = next((other for other in LIMIT_FIELDS if other not in self.left_out), name)
        elif name == "reasoning_effort" and self._says_unknown(code, message):
            self._other_effort(code, message, sent)
        elif name and self._says_unknown(code, message):
            self.left_out.append(name)

    def _field(self, param: str, message: str, sent: dict) -> str:
        """The field of ``sent`` that a refusal is about, "" where it names none."""
        known = [name for name in (*LIMIT_FIELDS, "reasoning_effort", *SAMPLING_FIELDS) if name in sent]
        if param.split(".")[-1] in known:
            return param.split(".")[-1]
        # The first that is named: "'max_tokens' is not supported with this model, use 'max_completion_tokens'".
        places = {name: found.start() for name in known if (found := re.search(rf"\b{name}\b", message))}
        if not places and "reasoning_effort" in known and re.search(r"reasoning[ .]effort", message):
            return "reasoning_effort"
        return min(places, key=places.__getitem__, default="")

    @staticmethod
    def _says_unknown(code: str, message: str) -> bool:
        return bool(_UNKNOWN_FIELD.search(f"{code} {message}"))

    def _other_effort(self, code: str, message: str, sent: dict):
        named = {word for word in _EFFORT_WORDS.findall(message) if word != sent["reasoning_effort"]}
        choices = [effort for effort in EFFORTS if effort in named]
        if not choices:
            self.effort = None
            self.left_out.append("reasoning_effort")
        elif not self.lowest:
            raise EffortRefused(choices)
        else:
            self.effort = choices[0]
            if self.effort != "none" and "unsupported_value" in code:
                # OpenAI's own words: its models take no sampling fields while they think.
                self.left_out += [name for name in SAMPLING_FIELDS[:2] if name not in self.left_out]
