"""Step 1, supervised fine-tuning: the policy learns to answer like the chosen responses.

deepspeed step1_sft/main.py --model_name_or_path MODEL --data_path DATA --output_dir OUTPUT
"""

from collections.abc import Sequence

from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.programs import as_program
from step1_sft.options import Options, parse_args

__all__ = ["Options", "main", "parse_args"]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    # PyTorch and DeepSpeed take seconds to import: --help and a wrong flag do without.
    from deepspeed_chat_tlcr.stages import run_stage
    from step1_sft.sft import train

    run_stage(options, train, [options.model_name_or_path])


program = as_program(main)

if __name__ == "__main__":
    program()
