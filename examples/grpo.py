"""The discriminator as the reward of TRL's GRPO: python examples/grpo.py POLICY DISCRIMINATOR PROMPTS OUTPUT

POLICY: an SFT model. DISCRIMINATOR: a model of step 2 with the same tokenizer. PROMPTS: .jsonl with a field "prompt".
"""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from deepspeed_chat_tlcr.rewards import discriminator_reward


def main(policy: str, discriminator: str, prompts: str, output: str, **settings) -> GRPOTrainer:
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=discriminator_reward(discriminator, reduce="mean"),
        args=GRPOConfig(output_dir=output, learning_rate=1e-6, num_generations=8, **settings),
        train_dataset=load_dataset("json", data_files=prompts, split="train").select_columns("prompt"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
