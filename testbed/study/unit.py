"""How far a reward's total varies over the SFT model's own answers: what a study calls one unit of it.

Rewards differ in scale for no good reason, and with whitened advantages only the ratio of reward to KL coefficient
matters. So every reward is divided by this deviation, and one KL coefficient means the same for all.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import torch

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.models import load_causal_lm, load_token_classifier
from deepspeed_chat_tlcr.saving import write_json
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation.logprobs import as_examples
from evaluation.scoring import sequence_scores, token_probs
from step3_ppo_tlcr.rewards import REWARDS, fixed_reward
from testbed.study.measure import ScorerOptions, prompts_of, sampler_of

EACH = 4
"""Answers to each prompt."""


@dataclass(frozen=True, kw_only=True)
class Options(ScorerOptions):
    """Measure the unit of a reward."""

    sft: str = option(MISSING, "the SFT model")
    prompts: str = option(MISSING, "JSON lines with prompts")
    reward: str = option("truth", "a name of step 3's --reward, or truth")
    judge: str | None = option(None, "the model behind it")
    fixed_threshold: float = option(0.6, "of tlcr_fixed", least=0.5, most=1)
    seed: int = seed_option(1234, "seed of the sampled answers")
    output_dir: str = option(MISSING, "folder for results.json")


def totals(options: Options, examples, pad_id: int) -> list[float]:
    """The reward's total of each answer."""
    if options.reward == "sequence":
        model = load_token_classifier(options.judge, 1, torch.float32).eval()
        return sequence_scores(model, examples, pad_id, 64)
    if options.judge:
        model = load_token_classifier(options.judge, 2, torch.float32).eval()
        rows = [torch.tensor([row]) for row in token_probs(model, examples, pad_id, 64)]
    else:
        rows = [torch.zeros(1, len(one.input_ids) - one.response_start) for one in examples]
    more = {"threshold": options.fixed_threshold} if options.reward == "tlcr_fixed" else {}
    function = fixed_reward if more else REWARDS[options.reward].function
    return [function(row, torch.ones_like(row), **more).sum().item() for row in rows]


@exits_cleanly
@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    tokenizer = load_tokenizer(options.sft)
    sft = load_causal_lm(options.sft, torch.float32).eval()
    torch.manual_seed(options.seed)
    sampler = sampler_of(options, tokenizer, sft)
    if options.reward != "truth":
        sampler = replace(sampler, scorer=lambda prompt, response, ended: 0.0)  # which knows nothing
    measured = sampler.measure(sft, prompts_of(options.prompts)[0], 1.0, EACH)
    found = measured.scores.ravel()
    if options.reward != "truth":
        found = totals(options, as_examples(measured.answers), tokenizer.pad_token_id)
    values = torch.tensor(found, dtype=torch.float64)
    write_json(Path(options.output_dir) / "results.json", {"mean": values.mean().item(), "sd": values.std().item()})
