"""Answers side by side (Table 2): any models, any prompts, each token coloured by its reward.

python evaluation/side_by_side.py --models sft=OUT/step1_sft tlcr=OUT/step3_ppo_tlcr/actor --prompts prompts.jsonl \
    --discriminator OUT/step2_discriminator --out OUTPUT
"""

import sys
from dataclasses import dataclass, replace

from deepspeed_chat_tlcr.pictures import TokenScores
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from evaluation.options import PolicyOptions, PromptOptions, SideOptions
from evaluation.policies import Question, answers_folder, parse_models, torch_dtype
from evaluation.prompts import answer_prompts, prompt_id, read_prompts
from evaluation.report import part_program
from evaluation.results import save_results
from evaluation.reward_scores import Answered, answers_in_context
from evaluation.scoring import Judge, as_record, heatmap


@dataclass(frozen=True, kw_only=True)
class Options(SideOptions, PromptOptions, PolicyOptions):
    """Show the models' answers beside each other."""


def prompts_to_answer(options: Options, models: dict[str, str]) -> list[Question]:
    """The prompts that are shown; all of a file's where another part has the models' answers to them already."""
    if options.show:
        return [Question(prompt_id(text), [text], options.temperature) for text in dict.fromkeys(options.show)]
    questions = read_prompts(options, next(iter(models.values())))
    folder = answers_folder(options.out, questions)
    answered = all((folder / f"{name}.jsonl").exists() for name in models)
    return questions if answered else questions[: options.shown]


def coloured(answered: dict[str, Answered], options: Options) -> dict[str, list[TokenScores]]:
    """Each model's answers as heat-maps; without a discriminator as one piece of text without a score."""
    if not options.discriminator:
        return {
            name: [TokenScores([text], [None], f"{name}, {tokens} tokens") for _, text, _, tokens in one.rows]
            for name, one in answered.items()
        }
    tokenizer = load_tokenizer(options.discriminator)
    model = Judge(options.discriminator, 2, torch_dtype(options.dtype), options.attn_implementation).load()
    drawn: dict[str, list[TokenScores]] = {}
    for name, one in answered.items():
        maps = [heatmap(tokenizer, model, example) for example in one.examples(tokenizer)]
        drawn[name] = [replace(scores, caption=caption(name, scores)) for scores in maps]
    return drawn


def caption(name: str, scores: TokenScores) -> str:
    count = len(scores.values)
    mean = f"mean reward {sum(scores.values) / count:+.3f}".replace("-", "−") if count else "no tokens"
    return f"{name}: {mean}, {count} tokens"


def run(options: Options) -> None:
    models = parse_models(options.models)
    questions = prompts_to_answer(options, models)
    shown = questions if options.show else questions[: options.shown]
    replies = answer_prompts(models, questions, options)
    answered = {name: answers_in_context(path, shown, replies[name]) for name, path in models.items()}
    drawn = coloured(answered, options)
    samples = [
        {
            "title": f"Prompt {place + 1}",
            "prompt": question.turns[0],
            "texts": [as_record(maps[place]) for maps in drawn.values()],
        }
        for place, question in enumerate(shown)
    ]
    results = {"models": list(models), "discriminator": options.discriminator, "samples": samples}
    results |= {"temperature": options.temperature, "attn_implementation": options.attn_implementation}
    save_results(options.out, "side_by_side", results)


main = part_program("side_by_side", Options, run)


if __name__ == "__main__":
    sys.exit(main())
