"""What reward models say about texts: D of every response token, a sequence reward model's score."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepspeed_chat_tlcr.models import load_token_classifier
from deepspeed_chat_tlcr.pictures import TokenScores, token_strings
from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.tokenization import TokenizedExample, load_tokenizer, tokenize_response
from deepspeed_chat_tlcr.training import pad_examples
from deepspeed_chat_tlcr.workers import spread
from labeling.token_labels import label_revision
from step2_discriminator.objectives import end_scores, positive_logit


def response_example(
    tokenizer: PreTrainedTokenizerFast, prompt: str, response: str, ended: bool = True
) -> TokenizedExample:
    """A response in its prompt's context; without EOS where a limit, not the policy, ended it."""
    example = tokenize_response(tokenizer, prompt, response)
    return example if ended else TokenizedExample(example.input_ids[:-1], example.response_start)


def places_by_length(examples: Sequence[TokenizedExample], batch_size: int) -> list[list[int]]:
    """The examples' places in batches of similar lengths, the longest first."""
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def batches(examples: Sequence[TokenizedExample], pad_id: int, batch_size: int) -> Iterator[tuple[list[int], dict]]:
    """Padded batches of similar lengths, each with its examples' places."""
    for places in places_by_length(examples, batch_size):
        yield places, pad_examples([examples[place] for place in places], pad_id)


@torch.no_grad()
def token_probs(
    discriminator: PreTrainedModel, examples: Sequence[TokenizedExample], pad_id: int, batch_size: int = 16
) -> list[list[float]]:
    """D(a_t | x, a_<t) of each response token (Eq. 7), a list for each example."""
    probs: list[list[float]] = [[] for _ in examples]
    for places, batch in batches(examples, pad_id, batch_size):
        ids, mask = (batch[name].to(discriminator.device) for name in ("input_ids", "attention_mask"))
        found = positive_logit(discriminator(input_ids=ids, attention_mask=mask).logits).sigmoid().cpu()
        for row, place in enumerate(places):
            probs[place] = found[row, examples[place].response_start : len(examples[place].input_ids)].tolist()
    return probs


@torch.no_grad()
def sequence_scores(
    reward_model: PreTrainedModel, examples: Sequence[TokenizedExample], pad_id: int, batch_size: int = 16
) -> list[float]:
    """The score of a sequence reward model (Eq. 1): its value at each response's last token; 0 where there is none."""
    scores = [0.0] * len(examples)
    for places, batch in batches(examples, pad_id, batch_size):
        ids, mask, response = (
            batch[name].to(reward_model.device) for name in ("input_ids", "attention_mask", "response_mask")
        )
        values = reward_model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        for place, score in zip(places, end_scores(values, response).tolist(), strict=True):
            scores[place] = score if examples[place].response_ids else 0.0
    return scores


@dataclass(frozen=True)
class Judge:
    """A reward model of ``labels`` labels, loaded where it judges: D of each response token (2), or scores (1)."""

    path: str
    labels: int
    dtype: torch.dtype
    attention: str

    def load(self) -> PreTrainedModel:
        model = load_token_classifier(self.path, self.labels, self.dtype, attention=self.attention)
        return model.to(get_accelerator().current_device_name()).eval()

    def ready(self) -> Callable[[Sequence[TokenizedExample]], list]:
        """Load the model; the function returned judges a batch."""
        judge = token_probs if self.labels == 2 else sequence_scores
        model, pad_id = self.load(), load_tokenizer(self.path).pad_token_id
        return lambda batch: judge(model, batch, pad_id, len(batch))


def judged(
    judge: Judge, examples: Mapping[str, Sequence[TokenizedExample]], batch_size: int, processes: int
) -> dict[str, list]:
    """What ``judge`` says of each example, under the examples' names; batches of similar lengths over ``processes``."""
    places = [(name, batch) for name, found in examples.items() for batch in places_by_length(found, batch_size)]
    batches = [[examples[name][place] for place in batch] for name, batch in places]
    said: dict[str, list] = {name: [None] * len(found) for name, found in examples.items()}
    for (name, batch), values in zip(places, spread(judge.ready, batches, processes), strict=True):
        for place, value in zip(batch, values, strict=True):
            said[name][place] = value
    return said


def heatmap(
    tokenizer: PreTrainedTokenizerFast, discriminator: PreTrainedModel, example: TokenizedExample, caption: str = ""
) -> TokenScores:
    """An example's response tokens with their rewards."""
    tokens = token_strings(tokenizer, example.input_ids)[example.response_start :]
    return TokenScores.from_probs(tokens, token_probs(discriminator, [example], tokenizer.pad_token_id)[0], caption)


def revision_heatmaps(
    tokenizer: PreTrainedTokenizerFast, discriminator: PreTrainedModel, revision: Revision, max_length: int
) -> list[TokenScores]:
    """Of both responses of a revision: the labels, and what the discriminator says."""
    texts = []
    for name, example in zip(("rejected", "modified"), label_revision(tokenizer, revision, max_length), strict=True):
        if example is not None:
            tokens = token_strings(tokenizer, example.input_ids)[example.response_start :]
            texts.append(TokenScores.from_targets(tokens, example.targets, f"{name}: labels"))
            texts.append(heatmap(tokenizer, discriminator, example, f"{name}: discriminator"))
    return texts


def as_record(scores: TokenScores) -> dict:
    """For ``results.json``; ``TokenScores(**record)`` is its inverse."""
    values = [None if value is None else round(value, 4) for value in scores.values]
    return {"tokens": list(scores.tokens), "values": values, "caption": scores.caption, "kind": scores.kind}
