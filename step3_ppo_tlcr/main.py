"""Step 3: PPO in which every generated token has its own continuous reward (paper 4.3).

deepspeed step3_ppo_tlcr/main.py --actor_model_name_or_path SFT --critic_model_name_or_path DISCRIMINATOR \\
    --reward tlcr --data_path DATA --output_dir OUTPUT
"""

from collections.abc import Sequence

from deepspeed_chat_tlcr.errors import exits_cleanly
from deepspeed_chat_tlcr.programs import as_program
from step3_ppo_tlcr.options import Options, parse_args

__all__ = ["Options", "main", "parse_args"]


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    # PyTorch and DeepSpeed take seconds to import: --help and a wrong flag do without.
    from deepspeed_chat_tlcr.stages import run_stage
    from step3_ppo_tlcr.train import train

    models = (options.actor_model_name_or_path, options.critic_model_name_or_path, options.reference_model_name_or_path)
    run_stage(options, train, models)


program = as_program(main)

if __name__ == "__main__":
    program()
