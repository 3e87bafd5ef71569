"""Pairs whose rejected response is the current policy's own answer, to be revised in the next round of iterated TLCR.

python labeling/own_answers.py --policy ACTOR --data_path DATA --output_dir OUTPUT   ->  OUTPUT/{train,eval}.jsonl

The discriminator judges answers of a policy that moves away from those it was trained on (the paper's limitation: its
reward data is static). Prompts and chosen responses are those of the reward part of the data, so that they stay out of
SFT and PPO; answers to its eval split are only ever measured on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from deepspeed_chat_tlcr.arguments import DataOptions, option, parse, seed_option
from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.generation import Decoding, answers
from deepspeed_chat_tlcr.models import embedding_rows, load_causal_lm
from deepspeed_chat_tlcr.records import Preference
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Answer prompts of the reward part with a policy; write the answers as rejected responses."""

    policy: str = option(MISSING, "the policy: a Hugging Face folder")
    output_dir: str = option(MISSING, "folder for train.jsonl, eval.jsonl and results.json")
    prompts: int = option(2000, "training prompts to answer, an other part of them in every round")
    eval_prompts: int = option(200, "held-out prompts to answer, the same in every round")
    round: int = option(1, "which round this is, from 1: which training prompts are answered")
    max_prompt_seq_len: int = option(256, "longest prompt, tokens; longer ones are left out")
    max_answer_seq_len: int = option(256, "longest answer, tokens")
    batch_size: int = option(64, "answers generated at once")
    seed: int = seed_option(1234, "seed of the sampled answers")


def part_of_round(preferences: Sequence[Preference], count: int, round: int) -> list[Preference]:
    """``count`` of them (all, where there are fewer), beginning anew behind the last: rounds differ while they can."""
    count = min(count, len(preferences))
    begin = (round - 1) * count
    return [preferences[(begin + place) % len(preferences)] for place in range(count)]


def own_answers(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    preferences: Sequence[Preference],
    options: Options,
    what: str,
) -> list[Preference]:
    """The preferences with a sampled answer (temperature 1, as in PPO) in the rejected response's place.

    An answer that is empty, or the chosen response itself, is left out: there is nothing to revise.
    """
    prompts = [tokenize_prompt(tokenizer, one.prompt) for one in preferences]
    kept = [place for place, ids in enumerate(prompts) if len(ids) <= options.max_prompt_seq_len]
    if not kept:
        raise InputError(f"no {what} prompt is as short as --max_prompt_seq_len {options.max_prompt_seq_len} tokens")
    # By length, so that batches need little padding.
    kept.sort(key=lambda place: len(prompts[place]))
    decoding = Decoding(options.max_answer_seq_len)
    generated = answers(policy, tokenizer, [prompts[place] for place in kept], decoding, options.batch_size)
    written = tqdm(generated, total=len(kept), desc=f"{what} answers", dynamic_ncols=True)
    found = zip(kept, written, strict=True)
    pairs = [Preference(preferences[at].prompt, preferences[at].chosen, answer.text) for at, answer in found]
    return [pair for pair in pairs if pair.rejected.strip() and pair.rejected != pair.chosen]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    require_writable(options.output_dir)
    tokenizer = load_tokenizer(options.policy, rows=embedding_rows(options.policy))
    parts = {split: load_part(options, "reward", split, tokenizer) for split in ("train", "eval")}
    chosen = {
        "train": part_of_round(parts["train"], options.prompts, options.round),
        "eval": part_of_round(parts["eval"], options.eval_prompts, 1),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = load_causal_lm(options.policy, torch.float32 if device.type == "cpu" else torch.bfloat16).eval().to(device)
    set_seed(options.seed)
    counts = {}
    for split, preferences in chosen.items():
        pairs = own_answers(policy, tokenizer, preferences, options, split)
        lines = [
            json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}, ensure_ascii=False)
            for pair in pairs
        ]
        text = "".join(line + "\n" for line in lines)
        (Path(options.output_dir) / f"{split}.jsonl").write_text(text, encoding="utf-8")
        counts[split] = {"prompts": len(preferences), "answers": len(pairs)}
    write_json(Path(options.output_dir) / "results.json", {**counts, "policy": options.policy, "round": options.round})
    print(", ".join(f"{split}: {found['answers']} answers" for split, found in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
