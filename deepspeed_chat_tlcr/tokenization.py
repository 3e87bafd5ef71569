"""From text to tokens: the only place that combines ids, the response's start and the token that ends it."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.model_folders import check_folder, loading
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.turns import end_after, end_ids


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """A prompt and its response as tokens.

    ``input_ids``: all tokens; a whole response ends with ``turns.end_after``. ``response_start``: index of the
    response's first token. ``targets`` of ``input_ids[response_start:]``: 0.0 negative, 0.5 neutral, 1.0 positive.
    """

    input_ids: list[int]
    response_start: int
    targets: list[float] | None = None

    @property
    def response_ids(self) -> list[int]:
        return self.input_ids[self.response_start :]


def load_tokenizer(path: str | Path, eot_token: str | None = None, rows: int | None = None) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer that can end a response; without a pad token of its own it pads with EOS.

    Masks come from lengths, so pad = EOS is harmless. ``eot_token`` becomes the end-of-sequence token (DeepSpeed-Chat's
    ``--add_eot_token``). ``rows``: the size of the models' embeddings (``models.embedding_rows``), if they do not grow
    for new tokens. Raises ``InputError`` if there is no tokenizer, only a slow one, or no EOS token with an embedding.
    """
    check_folder(path, "tokenizer")
    with loading("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_home(path), trust_remote_code=False)
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {str(path)!r} is slow: token labels need a fast one, which has offsets")
    if eot_token is not None:
        tokenizer.add_special_tokens({"eos_token": eot_token})
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {str(path)!r} has no EOS token, so no response could end; set eos_token")
    if rows is not None and tokenizer.eos_token_id >= rows:
        raise InputError(
            f"{path}: {tokenizer.eos_token!r}, token {tokenizer.eos_token_id}, has no embedding in a model of {rows} "
            "rows; train the models with it first (--add_eot_token in steps 1 and 2)"
        )
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[return-value] # it is fast


def _tokenizer_home(path: str | Path) -> str | Path:
    """Where a model's tokenizer is: with the model, or for DeepSpeed-Chat's folders with the base model.

    Those folders have vocabulary files without special tokens, and the base model's name in config.json.
    """
    folder = Path(path)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return path
    try:
        base = read_json(folder / "config.json").get("_name_or_path")
    except (OSError, ValueError):
        return path
    return base or path


def tokenize_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of a prompt before a response: with BOS if the tokenizer adds it, never with EOS."""
    encoding = tokenizer(prompt, return_offsets_mapping=True)
    return _without_final_specials(encoding["input_ids"], encoding["offset_mapping"])


def tokenize_response(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> TokenizedExample:
    """Tokenise ``prompt + response`` once, append the token that ends it, and find where the response starts.

    Nothing is appended if the text ends with such a token already. A token that straddles the boundary belongs to the
    response, which decides it. Nothing is cut; see ``truncate``.
    """
    ids, _, start = tokenize_with_offsets(tokenizer, prompt, response)
    if start == len(ids) or ids[-1] not in end_ids(tokenizer):
        ids = [*ids, end_after(tokenizer, prompt)]
    return TokenizedExample(ids, start)


def tokenize_with_offsets(
    tokenizer: PreTrainedTokenizerFast, prompt: str, response: str
) -> tuple[list[int], list[tuple[int, int]], int]:
    """Token ids of ``prompt + response``, the characters of it that each stands for, and where the response starts."""
    encoding = tokenizer(prompt + response, return_offsets_mapping=True)
    ids = _without_final_specials(encoding["input_ids"], encoding["offset_mapping"])
    offsets = [tuple(offset) for offset in encoding["offset_mapping"][: len(ids)]]
    start = next((index for index, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
    return ids, offsets, start


def truncate(example: TokenizedExample, max_length: int) -> TokenizedExample | None:
    """Cut the response so that at most ``max_length`` tokens remain; a cut response has no end token.

    Returns None if no response token would be left: prompts are never cut.
    """
    if example.response_start >= max_length:
        return None
    kept = max_length - example.response_start
    targets = None if example.targets is None else example.targets[:kept]
    return replace(example, input_ids=example.input_ids[:max_length], targets=targets)


def _without_final_specials(ids: list[int], offsets: list[tuple[int, int]]) -> list[int]:
    """Drop tokens that the tokenizer adds behind the text: they stand for no character, offset (0, 0)."""
    end = len(ids)
    while end > 1 and tuple(offsets[end - 1]) == (0, 0):
        end -= 1
    return ids[:end]


def tokenizers_differ(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> str | None:
    """The first difference between what two tokenizers make of text, as the end of a sentence; None without one."""
    mine, theirs = one.get_vocab(), other.get_vocab()
    if mine != theirs:
        token = next(token for token in [*mine, *theirs] if mine.get(token) != theirs.get(token))
        return f": token {token!r} has id {mine.get(token)} in one and {theirs.get(token)} in the other"
    if one.eos_token_id != other.eos_token_id:
        return f" in their EOS token: {one.eos_token!r} and {other.eos_token!r}"
    # With one vocabulary, merges or normalisation may still differ: compare the results.
    probe = "\n\nHuman: Don't  stop\tat 3.14% – naïve 東京 <s>?\n\nAssistant: It isn't over..."
    if one(probe)["input_ids"] != other(probe)["input_ids"]:
        return ": same vocabulary, but they split text differently"
    return None


def require_same_tokenizer(
    actor: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, role: str, remedy: str | None = None
) -> None:
    """Refuse two models whose token ids mean different things (token rewards would land on the wrong words).

    Raises ``InputError`` with both names, the first difference and the remedy.
    """
    if difference := tokenizers_differ(actor, other):
        remedy = remedy or f"train the {role} from the actor's model family, labels are recomputed for any tokenizer"
        raise InputError(
            f"the actor's tokenizer ({actor.name_or_path}) and the {role}'s ({other.name_or_path}) "
            f"differ{difference}; {remedy}"
        )
