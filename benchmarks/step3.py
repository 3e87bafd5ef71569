"""Seconds, samples per second and peak memory of step 3's phases, measured on the real trainer.

    python benchmarks/step3.py --actor_model_name_or_path LLAMA --data_path HH.jsonl.gz --dtype bf16 \\
        --per_device_generation_batch_size 16 --per_device_training_batch_size 16 --max_answer_seq_len 128

Takes every option of step3_ppo_tlcr/main.py; those below come first. Without a critic's folder, an untrained token
classifier of the actor's shape stands in for critic and discriminator: the work is the same. Every answer is as long as
``--max_answer_seq_len`` says, so that runs compare. Prints one JSON object, on the CPU or whatever DeepSpeed finds.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import deepspeed_chat_tlcr.models  # noqa: F401 (registers OPT's token classifier)
from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from step3_ppo_tlcr.options import check, parse_args
from step3_ppo_tlcr.prompts import load_prompts, require_a_set, set_size
from step3_ppo_tlcr.run import sets_by_step
from step3_ppo_tlcr.servers import Servers
from step3_ppo_tlcr.train import build, reward_specs

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=5, help="measured sets of rollouts")
    parser.add_argument("--warmup", type=int, default=1, help="sets of rollouts before the clock starts")
    parser.add_argument("--shape", choices=SHAPES, help="a random Llama of this shape in place of the actor's weights")
    own, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(own, rest, Path(folder)), indent=1), flush=True)


def measure(own: argparse.Namespace, rest: list[str], folder: Path) -> dict:
    """Run the trainer for ``warmup + iterations`` sets of rollouts; means over the latter, whose lengths differ."""
    line = [*stand_ins(own, rest, folder), "--output_dir", str(folder / "out")]
    options = parse_args(line)
    if options.rollout_name != "continuous":  # which has no minimum length; an untrained model hardly ends by itself
        options = replace(options, min_answer_seq_len=options.max_answer_seq_len)
    check(options)
    with contextlib.redirect_stdout(sys.stderr):  # only the result goes to standard output
        runtime = runtimes.start(options.precision, options.seed)
        tokenizer = load_tokenizer(options.actor_model_name_or_path, options.new_eos)
        prompts = load_prompts(options, tokenizer, runtime)
    require_a_set(prompts, options, runtime)
    servers = Servers(options, runtime) if options.rollout_name == "vllm" else None
    trainer = build(options, runtime, tokenizer, prompts, reward_specs(options), servers)
    lines, walls, processor = [], [], []
    for step, chosen in sets_by_step(prompts, options, runtime):
        begun, begun_processor = time.monotonic(), time.process_time()
        lines.append(trainer.step(chosen))
        walls.append(time.monotonic() - begun)
        processor.append(time.process_time() - begun_processor)
        if step == own.warmup + own.iterations:
            break
    measured = lines[own.warmup :]
    phases = {name: statistics.fmean(line[f"seconds/{name}"] for line in measured) for name in trainer.seconds}
    totals = walls[own.warmup :]  # what lies between the phases, metrics and all, included
    samples = set_size(options, runtime)
    return {
        "model_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.models.actor.module.parameters()),
        "device": str(runtime.device),
        "ranks": runtime.world_size,
        "threads": torch.get_num_threads(),
        "dtype": runtime.dtype,
        "rollout": trainer.rollouts.name,
        "samples_per_iteration": samples,
        "answer_tokens": options.max_answer_seq_len,
        "longest_prompt": max(map(len, prompts)),
        "iterations": len(measured),
        "seconds": {name: round(value, 3) for name, value in phases.items()},
        "seconds_per_iteration": round(statistics.fmean(totals), 3),
        "seconds_by_iteration": [round(seconds, 3) for seconds in totals],
        "processor_seconds_per_iteration": round(statistics.fmean(processor[own.warmup :]), 3),
        "samples_per_second": round(samples / statistics.fmean(totals), 3),
        "tokens_per_second": {
            name: round(statistics.fmean(line[f"throughput/{name}_tokens_per_second"] for line in measured), 1)
            for name in phases
            if name != "sync"  # tokens are not what it moves
        },
        "peak_memory_gib": round(lines[-1]["memory/peak_gib"], 3),
    }


def stand_ins(own: argparse.Namespace, rest: list[str], folder: Path) -> list[str]:
    """The command line with folders of random weights where it names none."""
    given = dict(itertools.pairwise(rest))
    actor = given["--actor_model_name_or_path"]
    rest = list(rest)
    if own.shape:
        tokenizer = AutoTokenizer.from_pretrained(actor)
        config = AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id
        )
        config.update({**SHAPES[own.shape], "num_key_value_heads": SHAPES[own.shape]["num_attention_heads"]})
        config.head_dim = config.hidden_size // config.num_attention_heads
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "actor")
        tokenizer.save_pretrained(folder / "actor")
        rest += ["--actor_model_name_or_path", str(folder / "actor")]
        actor = folder / "actor"
    if "--critic_model_name_or_path" not in given:
        config = AutoConfig.from_pretrained(actor, num_labels=2)
        AutoModelForTokenClassification.from_config(config).save_pretrained(folder / "critic")
        AutoTokenizer.from_pretrained(actor).save_pretrained(folder / "critic")
        rest += ["--critic_model_name_or_path", str(folder / "critic")]
    return rest


if __name__ == "__main__":
    main()
    runtimes.leave()
