"""Step 2 of RLMEC (Chen et al., 2024): a generative reward model, which rewrites answers with few edits.

deepspeed step2_grm/main.py --model_name_or_path MODEL --revisions revisions.jsonl --output_dir OUTPUT
"""

from deepspeed_chat_tlcr.programs import stage
from step2_grm.options import Options, parse_args

__all__ = ["Options", "main", "parse_args", "program"]

main, program = stage("step2_grm.train", parse_args)

if __name__ == "__main__":
    program()
