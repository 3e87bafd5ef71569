"""Pairs whose rejected response is the current policy's own answer, to be revised in the next round of iterated TLCR.

python labeling/own_answers.py --policy ACTOR --data_path DATA --output_dir OUTPUT   ->  OUTPUT/{train,eval}.jsonl

During PPO the policy moves away from the answers that the discriminator was trained on (a limitation of the paper:
its reward data is static). Prompts and chosen responses come from the reward part of the data, not from those of SFT
and PPO; answers to its eval split are for measuring only.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from itertools import chain
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, set_seed

from deepspeed_chat_tlcr.arguments import AttentionName, DataOptions, option, parse, seed_option
from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.generation import Decoding, answers
from deepspeed_chat_tlcr.models import embedding_rows, load_causal_lm, require_attention
from deepspeed_chat_tlcr.records import Preference, write_jsonl
from deepspeed_chat_tlcr.runtime import TORCH_DTYPES
from deepspeed_chat_tlcr.saving import require_writable, write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer, tokenize_prompt
from deepspeed_chat_tlcr.workers import processes_of, spread


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Answer prompts of the reward part with a policy; write the answers as rejected responses."""

    policy: str = option(MISSING, "the policy: a Hugging Face folder")
    output_dir: str = option(MISSING, "folder for train.jsonl, eval.jsonl and results.json")
    prompts: int = option(2000, "training prompts to answer, an other part of them in every round")
    eval_prompts: int = option(200, "held-out prompts to answer, the same in every round")
    round: int = option(1, "which round this is, from 1: which training prompts are answered", most=1000)
    max_prompt_seq_len: int = option(256, "longest prompt, tokens; longer ones are left out")
    max_answer_seq_len: int = option(256, "longest answer, tokens")
    batch_size: int = option(64, "answers generated at once")
    seed: int = seed_option(1234, "seed of the sampled answers")
    num_processes: int = option(0, "processes that answer, each on its own GPU; 0: one per GPU, or one on a CPU")
    attn_implementation: AttentionName = option(
        "sdpa", "attention kernels; sdpa: PyTorch's, or eager in a family without"
    )


def part_of_round(preferences: Sequence[Preference], count: int, round: int) -> list[Preference]:
    """The next ``count`` preferences (all, if there are fewer) of each round, starting over at the end of the data."""
    count = min(count, len(preferences))
    begin = (round - 1) * count
    return [preferences[(begin + place) % len(preferences)] for place in range(count)]


@dataclass(frozen=True)
class Writer:
    """Answers batches of prompts at temperature 1, as in PPO; loaded in the process that answers."""

    policy: str
    device: str
    attention: str
    longest: int
    seed: int

    def ready(self) -> Callable[[tuple[int, Sequence[list[int]]]], list[str]]:
        """Load the policy. The returned function answers a batch, whose number decides its random numbers."""
        tokenizer = load_tokenizer(self.policy, rows=embedding_rows(self.policy))
        dtype = TORCH_DTYPES[dtype_on(self.device)]
        policy = load_causal_lm(self.policy, dtype, attention=self.attention).eval().to(self.device)

        def written(batch: tuple[int, Sequence[list[int]]]) -> list[str]:
            number, prompts = batch
            set_seed((self.seed + number) % 2**32)
            return [one.text for one in answers(policy, tokenizer, prompts, Decoding(self.longest), len(prompts))]

        return written


def dtype_on(device: str) -> str:
    return "fp32" if device == "cpu" else "bf16"


def own_answers(
    tokenizer: PreTrainedTokenizerFast, preferences: Sequence[Preference], writer: Writer, options: Options, what: str
) -> list[Preference]:
    """The preferences, with the policy's own answer as the rejected response.

    An answer that is empty or equal to the chosen response is left out: there is nothing to revise.
    """
    prompts = [tokenize_prompt(tokenizer, one.prompt) for one in preferences]
    kept = [place for place, ids in enumerate(prompts) if len(ids) <= options.max_prompt_seq_len]
    if not kept:
        raise InputError(f"no {what} prompt is as short as --max_prompt_seq_len {options.max_prompt_seq_len} tokens")
    # By length, so that batches need little padding.
    kept.sort(key=lambda place: len(prompts[place]))
    places = [kept[begin : begin + options.batch_size] for begin in range(0, len(kept), options.batch_size)]
    batches = [(number, [prompts[place] for place in batch]) for number, batch in enumerate(places)]
    written = spread(writer.ready, batches, processes_of(options.num_processes))
    written = tqdm(written, total=len(batches), desc=f"{what} answers, batches", dynamic_ncols=True)
    answered = zip(kept, chain.from_iterable(written), strict=True)
    pairs = [Preference(preferences[place].prompt, preferences[place].chosen, answer) for place, answer in answered]
    return [pair for pair in pairs if pair.rejected.strip() and pair.rejected != pair.chosen]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    device = get_accelerator().device_name()
    require_attention(options.attn_implementation, dtype_on(device))
    require_writable(options.output_dir)
    tokenizer = load_tokenizer(options.policy, rows=embedding_rows(options.policy))
    parts = {split: load_part(options, "reward", split, tokenizer) for split in ("train", "eval")}
    chosen = {
        "train": part_of_round(parts["train"], options.prompts, options.round),
        "eval": part_of_round(parts["eval"], options.eval_prompts, 1),
    }
    longest, counts = options.max_answer_seq_len, {}
    for split, preferences in chosen.items():
        seed = options.seed + (split == "eval") * 1_000_000  # other numbers than those of training prompts
        writer = Writer(options.policy, device, options.attn_implementation, longest, seed)
        pairs = own_answers(tokenizer, preferences, writer, options, split)
        answered = write_jsonl(Path(options.output_dir) / f"{split}.jsonl", map(Preference.as_pair, pairs))
        counts[split] = {"prompts": len(preferences), "answers": answered}
    made = {"policy": options.policy, "round": options.round, "attn_implementation": options.attn_implementation}
    write_json(Path(options.output_dir) / "results.json", made | counts)
    print(", ".join(f"{split}: {count['answers']} answers" for split, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
