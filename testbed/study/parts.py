"""The data of one world, cut once into what each stage may see; all methods share these files.

OUTPUT_DIR/{sft,reward,rl,rl_half}/{train,eval}.jsonl   pairs; rl_half is the first half of rl's training prompts
OUTPUT_DIR/{validation,test}.jsonl                      prompts that no stage trains on: to choose settings, to report;
                                                        the same whatever the seed, chosen by hash
OUTPUT_DIR/texts/{train,eval}.jsonl                     both responses of the SFT part: what a base model may read
"""

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.data.preferences import load_preferences
from deepspeed_chat_tlcr.data.sources import find_source
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.records import Preference, read_jsonl, write_jsonl
from deepspeed_chat_tlcr.saving import write_json


@dataclass(frozen=True, kw_only=True)
class Options:
    """Split preference data into the parts of a study."""

    preferences: str = option(MISSING, "a file, or a folder with train.jsonl and eval.jsonl, of pairs")
    prompts: str | None = option(None, "JSON lines with prompts to test on; unset: prompts of the eval pairs")
    data_split: str = option("2,4,4", "shares of SFT, reward and RL data")
    data_seed: int = seed_option(1234, "seed of that split")
    validation: int = option(256, "prompts that settings are chosen on; 0: none", least=0)
    test: int = option(256, "other prompts, that are reported on; 0: none", least=0)
    output_dir: str = option(MISSING, "folder for the parts")


def read_prompts(file: str) -> list[str]:
    """The prompts of --prompts. Raises ``InputError`` for a line without one."""
    found = [record.get("prompt") for _, record in read_jsonl(file)]
    if not all(isinstance(prompt, str) for prompt in found):
        raise InputError(f"{file}: every line needs a 'prompt' that is a string")
    return found


def held_out_prompts(options: Options) -> list[str]:
    """The prompts to test on, whatever the seed: those of --prompts or of eval.jsonl, else some of all, by hash.

    Raises ``InputError`` where there are too few.
    """
    wanted = options.validation + options.test
    if options.prompts:
        ranked = list(dict.fromkeys(read_prompts(options.prompts)))
    else:
        splits = ["eval"] if find_source(options.preferences).eval is not None else ["train", "eval"]
        found = {one.prompt for split in splits for one in load_preferences([options.preferences], "all", split)}
        ranked = sorted(found, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(ranked) < wanted:
        raise InputError(
            f"{options.prompts or options.preferences}: {len(ranked)} prompts to hold out, but --validation "
            f"{options.validation} and --test {options.test} need {wanted}"
        )
    return ranked if options.prompts else ranked[:wanted]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    folder = Path(options.output_dir)
    loaded = {
        (part, split): list(load_preferences([options.preferences], part, split, options.data_split, options.data_seed))
        for part in ("sft", "reward", "rl")
        for split in ("train", "eval")
    }
    prompts = held_out_prompts(options) if options.validation + options.test else []
    kept_out = set(prompts)
    for part in ("sft", "reward", "rl"):
        loaded[part, "train"] = [one for one in loaded[part, "train"] if one.prompt not in kept_out]
        if not loaded[part, "train"]:
            raise InputError(f"{options.preferences}: beside the test prompts no pairs are left for the {part} part")
    counts = {
        f"{part}_{split}": write_jsonl(folder / part / f"{split}.jsonl", map(Preference.as_pair, ps))
        for (part, split), ps in loaded.items()
    }
    rl = loaded["rl", "train"]
    write_jsonl(folder / "rl_half" / "train.jsonl", map(Preference.as_pair, rl[: len(rl) // 2]))
    write_jsonl(folder / "rl_half" / "eval.jsonl", map(Preference.as_pair, loaded["rl", "eval"]))
    for split in ("train", "eval"):
        texts = [{"prompt": p.prompt, "chosen": text} for p in loaded["sft", split] for text in (p.chosen, p.rejected)]
        write_jsonl(folder / "texts" / f"{split}.jsonl", texts)
    write_jsonl(folder / "validation.jsonl", ({"prompt": prompt} for prompt in prompts[: options.validation]))
    rest = prompts[options.validation : options.validation + options.test]
    write_jsonl(folder / "test.jsonl", ({"prompt": prompt} for prompt in rest))
    write_json(folder / "results.json", counts)
