"""Step 1, supervised fine-tuning: the policy learns to answer like the chosen responses.

deepspeed step1_sft/main.py --model_name_or_path MODEL --data_path DATA --output_dir OUTPUT
"""

from deepspeed_chat_tlcr.programs import stage
from step1_sft.options import Options, parse_args

__all__ = ["Options", "main", "parse_args", "program"]

main, program = stage("step1_sft.sft", parse_args)

if __name__ == "__main__":
    program()
