"""Every figure and table of the paper for the user's own models, and one report of them.

python evaluation/main.py --models sft=OUT/step1_sft tlcr=OUT/step3_ppo_tlcr/actor \
    --discriminator OUT/step2_discriminator --revisions OUT/labeling/revisions.jsonl --data_path DATA \
    --mt_bench_dir FASTCHAT --prompts alpaca_eval.json --judge gpt-6-luna --out OUTPUT

A part runs where it has what it needs, and the report names the others as missing. --prompts serves AlpacaEval and the
answers side by side, --data_path the reward scores; where only one of them is given it serves all three. Human votes
are made and counted by evaluation/human/make.py and count.py. The same command continues an interrupted evaluation.
Exit codes: 0 done, 2 wrong input, 3 a judge stopped early (the same command continues), 4 verdicts are missing.
"""

import sys
from collections.abc import Sequence

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.errors import exits_cleanly
from evaluation.options import Everything as Options


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv)
    # PyTorch and DeepSpeed take seconds to import: --help and a wrong flag do without.
    from evaluation.everything import evaluate

    return evaluate(options)


if __name__ == "__main__":
    sys.exit(main())
