"""FIGA (Guo et al., 2024): weighted likelihood of what a revision added and removed, without a reward model.

deepspeed baselines/figa/main.py --model_name_or_path SFT --revisions revisions.jsonl --output_dir OUTPUT
"""

from baselines.figa.options import Options, parse_args
from deepspeed_chat_tlcr.programs import stage

__all__ = ["Options", "main", "parse_args", "program"]

main, program = stage("baselines.figa.train", parse_args)

if __name__ == "__main__":
    program()
