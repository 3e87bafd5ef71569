"""The prompts that the policy answers: those of the RL part, and held-out ones."""

from collections.abc import Iterator, Sequence
from itertools import chain

from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.data.preferences import load_part
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import tokenize_prompt
from deepspeed_chat_tlcr.training import LengthGroupedSampler
from step3_ppo_tlcr.options import Options


def load_prompts(
    options: Options, tokenizer: PreTrainedTokenizerFast, runtime: Runtime, split: str = "train"
) -> list[list[int]]:
    """Token ids of the RL part's prompts that fit; the longer ones are counted and dropped."""
    preferences = load_part(options, "rl", split, tokenizer, require_rejected=False)
    prompts = [tokenize_prompt(tokenizer, preference.prompt) for preference in preferences]
    kept = [prompt for prompt in prompts if len(prompt) <= options.max_prompt_seq_len]
    what = "prompts" if split == "train" else "held-out prompts"
    runtime.say(f"{len(kept)} {what}, {len(prompts) - len(kept)} dropped (over {options.max_prompt_seq_len} tokens)")
    return kept


def load_references(options: Options, tokenizer: PreTrainedTokenizerFast) -> dict[tuple[int, ...], str]:
    """The chosen response of every prompt of the RL part, held-out ones too, by the prompt's tokens."""
    splits = ["train", "eval"] if options.eval_interval else ["train"]
    preferences = chain(*(load_part(options, "rl", split, tokenizer, require_rejected=False) for split in splits))
    return {tuple(tokenize_prompt(tokenizer, one.prompt)): one.chosen for one in preferences}


def set_size(options: Options, runtime: Runtime) -> int:
    """Prompts of one set of rollouts, over all ranks."""
    return options.per_device_generation_batch_size * options.rollout_batches * runtime.world_size


def require_a_set(prompts: Sequence[list[int]], options: Options, runtime: Runtime) -> None:
    """Raise ``InputError`` for too few prompts."""
    if len(prompts) < set_size(options, runtime):
        raise InputError(
            f"{len(prompts)} prompts of at most {options.max_prompt_seq_len} tokens (--max_prompt_seq_len) do not fill "
            f"one set of rollouts of {set_size(options, runtime)} "
            f"(--per_device_generation_batch_size x --generation_batches x {runtime.world_size} rank(s))"
        )


def prompt_sets(
    prompts: Sequence[list[int]], options: Options, runtime: Runtime, epoch: int
) -> Iterator[list[list[int]]]:
    """This rank's prompts for each set of rollouts; formed by length.

    A last set that would be incomplete is left out: no rank ever holds a batch of another size.
    """
    per_set = set_size(options, runtime)
    per_rank = per_set // runtime.world_size
    sampler = LengthGroupedSampler([len(prompt) for prompt in prompts], per_set, options.seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    for begin in range(0, len(order) - per_set + 1, per_set):
        mine = order[begin + runtime.rank * per_rank : begin + (runtime.rank + 1) * per_rank]
        yield [prompts[index] for index in mine]
