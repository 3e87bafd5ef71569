"""DPO (Rafailov et al., 2023) on the reward part's preference pairs, by TRL's trainer with DeepSpeed-Chat's flags.

deepspeed baselines/dpo/main.py --model_name_or_path SFT --data_path DATA --output_dir OUTPUT
"""

from baselines.dpo.options import Options, parse_args
from deepspeed_chat_tlcr.programs import stage

__all__ = ["Options", "main", "parse_args", "program"]

main, program = stage("baselines.dpo.train", parse_args)

if __name__ == "__main__":
    program()
