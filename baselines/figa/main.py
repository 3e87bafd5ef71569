"""FIGA (Guo et al., 2024): weighted likelihood of what a revision added and removed, without a reward model.

deepspeed baselines/figa/main.py --model_name_or_path SFT --revisions revisions.jsonl --output_dir OUTPUT
"""

from collections.abc import Sequence

from baselines.figa.options import Options, parse_args
from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.programs import as_program

__all__ = ["Options", "main", "parse_args"]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    # PyTorch and DeepSpeed take seconds to import: --help and a wrong flag do without.
    from baselines.figa.train import train
    from deepspeed_chat_tlcr.stages import run_stage

    run_stage(options, train, [options.model_name_or_path])


program = as_program(main)

if __name__ == "__main__":
    program()
