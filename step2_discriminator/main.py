"""Step 2, the reward: a token discriminator (paper 4.2), or a sequence reward model for the baselines.

deepspeed step2_discriminator/main.py --model_name_or_path MODEL --revisions revisions.jsonl --output_dir OUTPUT
"""

from deepspeed_chat_tlcr.programs import stage
from step2_discriminator.options import Options, parse_args

__all__ = ["Options", "main", "parse_args", "program"]

main, program = stage("step2_discriminator.train", parse_args)

if __name__ == "__main__":
    program()
