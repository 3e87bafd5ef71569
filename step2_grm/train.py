"""RLMEC's generative reward model: fine-tuned on (conversation, good answer, answer) -> rewritten answer."""

import hashlib
from collections.abc import Sequence

from deepspeed_chat_tlcr.records import Preference, Revision
from deepspeed_chat_tlcr.rewriting import rewriting_prompt
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from deepspeed_chat_tlcr.training import stage_config
from step1_sft.sft import fine_tune
from step2_discriminator.revisions import load_revisions
from step2_grm.options import Options


def rewriting_records(revisions: Sequence[Revision], copy_share: float) -> list[Preference]:
    """Rejected responses to rewrite, and of ``copy_share`` of the revisions the modified one, to leave as it is.

    Which are copied depends on nothing but their text.
    """
    records = []
    for one in revisions:
        wrong = rewriting_prompt(one.prompt, one.chosen, one.rejected)
        records.append(Preference(wrong, one.modified, None))
        digest = hashlib.sha256((one.prompt + one.modified).encode()).digest()
        if int.from_bytes(digest[:4], "big") < copy_share * 2**32:
            records.append(Preference(rewriting_prompt(one.prompt, one.chosen, one.modified), one.modified, None))
    return records


def train(options: Options, runtime: Runtime) -> None:
    """This stage's work on every rank: read, tokenise, train, save."""
    config = stage_config(options, runtime)
    tokenizer = load_tokenizer(options.model_name_or_path, options.new_eos)
    revisions = load_revisions(options, tokenizer)
    records = {split: rewriting_records(found, options.copy_share) for split, found in revisions.items()}
    results = fine_tune(options, runtime, config, tokenizer, records, "step2_grm")
    if results:
        runtime.say(f"generative reward model: held-out loss {results['eval/loss']:.4f}; saved in {options.output_dir}")
