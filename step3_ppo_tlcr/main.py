"""Step 3: PPO in which every generated token has its own continuous reward (paper 4.3).

deepspeed step3_ppo_tlcr/main.py --actor_model_name_or_path SFT --critic_model_name_or_path DISCRIMINATOR \\
    --reward tlcr --data_path DATA --output_dir OUTPUT
"""

from deepspeed_chat_tlcr.programs import stage
from step3_ppo_tlcr.options import Options, parse_args

__all__ = ["Options", "main", "parse_args", "program"]

MODELS = ("actor_model_name_or_path", "critic_model_name_or_path", "reference_model_name_or_path")
main, program = stage("step3_ppo_tlcr.train", parse_args, MODELS)

if __name__ == "__main__":
    program()
