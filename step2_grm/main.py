"""Step 2 of RLMEC (Chen et al., 2024): a generative reward model, which rewrites answers with few edits.

deepspeed step2_grm/main.py --model_name_or_path MODEL --revisions revisions.jsonl --output_dir OUTPUT
"""

from collections.abc import Sequence

from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.programs import as_program
from step2_grm.options import Options, parse_args

__all__ = ["Options", "main", "parse_args"]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    # PyTorch and DeepSpeed take seconds to import: --help and a wrong flag do without.
    from deepspeed_chat_tlcr.stages import run_stage
    from step2_grm.train import train

    run_stage(options, train, [options.model_name_or_path])


program = as_program(main)

if __name__ == "__main__":
    program()
