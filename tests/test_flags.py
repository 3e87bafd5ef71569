"""Command lines of DeepSpeed-Chat, ReMax and RLHF-TLCR parse here unchanged; docs/flags.md lists every flag."""

import re
import shlex
from dataclasses import fields
from importlib import import_module

import pytest
from conftest import ROOT

import step1_sft.main
from deepspeed_chat_tlcr.metrics import read_metrics
from docs import flags
from docs.flags import PROGRAMS, Program

BY_PATH = {program.path: program for program in PROGRAMS}


def parse(path: str, line: str):
    return __import__(BY_PATH[path].module, fromlist=["parse_args"]).parse_args(shlex.split(line))


# What is common to the peers' scripts of steps 1, 2 and DPO, with the values they use.
TRAIN = (
    "--local_rank=0 --data_split 2,4,4 --model_name_or_path M --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 4 --max_seq_len 512 --learning_rate 9.65e-6 --num_train_epochs 4 "
    "--gradient_accumulation_steps 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --zero_stage 3 "
    "--deepspeed --output_dir ./output "
)
FOUR_SETS = (
    "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise "
    "yitingxie/rlhf-reward-datasets "
)
FORK = "--data_path Dahoas/full-hh-rlhf --data_output_path ~/data --gradient_checkpointing --offload --print_loss "
CHAT_SHORT = "--model_name_or_path facebook/opt-350m --weight_decay 0.1 --dropout 0.0 --gradient_accumulation_steps 4 "
CHAT_SHORT += "--zero_stage 0 --enable_tensorboard --tensorboard_path ./output --deepspeed --output_dir ./output "

STEP_3 = (
    "--local_rank=0 --data_split 2,4,4 --actor_model_name_or_path M --num_padding_at_beginning 1 "
    "--per_device_generation_batch_size 4 --per_device_training_batch_size 4 --generation_batches 1 --ppo_epochs 1 "
    "--max_answer_seq_len 256 --max_prompt_seq_len 256 --actor_learning_rate 9.65e-6 --actor_weight_decay 0.1 "
    "--num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_dropout 0.0 "
    "--actor_gradient_checkpointing --num_warmup_steps 100 --deepspeed --seed 1234 --actor_zero_stage 3 "
    "--output_dir ./output "
)
FORK_STEP_3 = (
    "--data_path Dahoas/full-hh-rlhf --data_output_path ~/data --per_device_eval_batch_size 4 --penalty full_kl "
    "--kl_ctl 0.1 --gamma 0.99 --disable_actor_dropout --actor_bf16 --offload --offload_reference_model "
    "--offload_reward_model --reference_zero_stage 3 --reward_zero_stage 3 --enable_hybrid_engine --print_answers "
    "--save_answers --enable_tensorboard "
)

LINES = {
    "step1_sft/main.py": (
        TRAIN + FOUR_SETS + "--weight_decay 0. --gradient_checkpointing --offload --lora_dim 128 "
        "--lora_module_name layers. --only_optimize_lora --dtype bf16 --compute_fp32_loss --add_eot_token --print_loss",
        TRAIN + "--data_path wangrui6/Zhihu-KOL Cohere/miracl-zh-queries-22-12 mkqa-Chinese --weight_decay 0.1",
        CHAT_SHORT,
        TRAIN + FORK + "--weight_decay 0. --num_inner_step 1 --bf16 --enable_tensorboard",
        TRAIN + FORK + "--weight_decay 0. --disable_dropout --data_seed 1234 --enable_tensorboard",
    ),
    "step2_discriminator/main.py": (
        TRAIN + FOUR_SETS + "--weight_decay 0.1 --num_padding_at_beginning 0 --gradient_checkpointing --offload "
        "--lora_dim 128 --lora_module_name layers. --eval_interval 50 --eval_iters 100",
        CHAT_SHORT + "--num_padding_at_beginning 1",
        TRAIN + FORK + "--weight_decay 0.1 --num_padding_at_beginning 0 --bf16 --custom_template --enable_tensorboard",
        TRAIN + FORK + "--modification_train_data_path t.pkl --modification_eval_data_path e.pkl --weight_decay 0.1 "
        "--bf16 --discriminate_reward --uni_discriminator_head --enable_tensorboard --num_padding_at_beginning 0",
        TRAIN + FORK + "--weight_decay 0.1 --num_padding_at_beginning 0 --disable_dropout --enable_tensorboard",
    ),
    "baselines/dpo/main.py": (
        TRAIN + FOUR_SETS + "--weight_decay 0.1 --gradient_checkpointing --offload --lora_dim 128 --lora_module_name "
        "layers. --beta 0.2 --label_smoothing 0.1 --offload_reference_model --compute_fp32_loss --print_loss",
        CHAT_SHORT,
        TRAIN + "--data_path Dahoas/rm-static --weight_decay 0.1 --dropout 0.0 --num_padding_at_beginning 1 --offload",
    ),
    "step3_ppo_tlcr/main.py": (
        STEP_3 + FOUR_SETS + "--critic_model_name_or_path C --critic_zero_stage 2 --critic_weight_decay 0.1 "
        "--critic_learning_rate 5e-6 --critic_gradient_checkpointing --actor_lora_module_name decoder.layers. "
        "--actor_lora_dim 128 --critic_lora_dim 128 --critic_lora_module_name layers. --enable_hybrid_engine "
        "--inference_tp_size 8 --tp_gather_partition_size 4 --offload_reference_model --enable_ema --offload "
        "--enable_mixed_precision_lora --enable_test_mode --test_stop_step 5 --print_answers --enable_tensorboard",
        STEP_3 + FORK_STEP_3 + "--critic_model_name_or_path C --critic_zero_stage 2 --critic_learning_rate 1e-6 "
        "--critic_weight_decay 0.1 --critic_gradient_checkpointing --disable_critic_dropout --lam 0.95 --critic_bf16 "
        "--algo ppo --offload_critic_model --save_model --discriminate_reward --uni_discriminator_head "
        "--sum_to_one_reward --custom_template --random_dense_reward",
        STEP_3 + FORK_STEP_3 + "--algo remax --reward_model_name_or_path C --reward_bf16 --disable_reward_dropout",
    ),
}


@pytest.mark.parametrize(("path", "line"), [(path, line) for path, lines in LINES.items() for line in lines])
def test_scripts_of_the_peers_parse_unchanged(path, line):
    options = parse(path, line)
    if path.startswith("step3"):
        assert (options.actor_model_name_or_path, options.critic_model_name_or_path) == ("M", "C")
        return
    assert options.model_name_or_path in ("M", "facebook/opt-350m")
    assert options.gradient_accumulation_steps == (4 if "facebook" in line else 1)


def test_flags_of_the_peers_keep_their_meaning():
    step1, step2 = LINES["step1_sft/main.py"], LINES["step2_discriminator/main.py"]
    chat = parse("step1_sft/main.py", step1[0])
    assert (chat.learning_rate, chat.zero_stage, chat.lora_dim, chat.precision) == (9.65e-6, 3, 128, "bf16")
    assert chat.data_path == [
        "Dahoas/rm-static",
        "Dahoas/full-hh-rlhf",
        "Dahoas/synthetic-instruct-gptj-pairwise",
        "yitingxie/rlhf-reward-datasets",
    ]
    assert chat.new_eos == "<|endoftext|>"
    assert (chat.print_loss, chat.data_output_path) == (True, None)
    assert parse("step1_sft/main.py", step1[3]).data_output_path == "~/data"
    old = parse("step1_sft/main.py", "--model_name_or_path M --deepscale --deepscale_config C")
    assert (old.deepspeed, old.deepspeed_config) == (True, "C")
    assert parse("step1_sft/main.py", step1[3]).precision == "bf16"
    assert parse("step1_sft/main.py", step1[3]).dropout_rate is None
    assert parse("step1_sft/main.py", step1[4]).dropout_rate == 0.0
    # DeepSpeed-Chat's step 2 trains a sequence reward model, RLHF-TLCR's flag asks for the discriminator.
    assert [parse("step2_discriminator/main.py", line).token_level for line in step2] == [0, 0, 0, 1, 0]
    discriminator = parse("step2_discriminator/main.py", step2[3])
    assert (discriminator.revisions, discriminator.eval_revisions) == (["t.pkl"], ["e.pkl"])


def accepted(program: Program) -> set[str]:
    """Names of all flags that a program parses, further spellings included."""
    return {
        name
        for entry in fields(program.options)
        for name in (entry.name, *(flag.lstrip("-") for flag in entry.metadata["flags"]))
    }


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.path)
def test_every_flag_of_the_peers_is_accepted(program: Program):
    for peer, names in program.peers.items():
        assert not names - accepted(program), f"{program.path} does not know all flags of {peer}"


def test_flags_page_is_that_of_the_declarations():
    """A flag that is declared and not on the page, or has changed since, fails here."""
    page = (ROOT / "docs" / "flags.md").read_text()
    for program in PROGRAMS:
        section = page.split(f"## {program.path}\n")[1].split("\n## ")[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        assert {word.strip("`,") for row in rows for word in row.split()} == {f"--{name}" for name in accepted(program)}
    assert page == flags.document(), "write it anew: python -m docs.flags > docs/flags.md"


def test_print_loss_and_data_output_path(tiny, tmp_path, in_process, capsys):
    base = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--dtype", "fp32")
    more = ("--per_device_train_batch_size", 4, "--print_loss", "--data_output_path", tmp_path / "kept")
    in_process(step1_sft.main.main, *base, *more, "--output_dir", tmp_path / "sft")
    printed = re.findall(r"step (\d+): loss (\S+)", capsys.readouterr().out)
    logged = [line for line in read_metrics(tmp_path / "sft" / "metrics.jsonl") if "train/loss" in line]
    assert [(int(step), float(loss)) for step, loss in printed] == [
        (line["step"], pytest.approx(line["train/loss"], rel=1e-5)) for line in logged
    ]
    assert len(printed) == 3
    assert len(list((tmp_path / "kept").glob("*.arrow"))) == 1


@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if not p.path.startswith(("baselines/figa", "step2_grm"))], ids=lambda p: p.path
)
def test_data_output_path_is_used_by_every_program_that_reads_data(tiny, tmp_path, in_process, program, capsys):
    """A file where the folder should be: the one message says which flag. (FIGA and RLMEC read revisions.)"""
    (tmp_path / "file").touch()
    model = ("--model_name_or_path", tiny / "model")
    if program.path.startswith("step3"):
        model = ("--actor_model_name_or_path", tiny / "model", "--critic_model_name_or_path", tiny / "model")
        model = (*model, "--reward", "random")
    arguments = (*model, "--data_path", tiny / "data.jsonl", "--data_output_path", tmp_path / "file", "--dtype", "fp32")
    with pytest.raises(SystemExit) as ended:
        in_process(import_module(program.module).main, *arguments, "--output_dir", tmp_path / "out")
    assert ended.value.code == 2
    assert f"into the cache {tmp_path / 'file'}" in capsys.readouterr().err


def test_flags_without_effect_warn_once_each(capsys):
    parse("step2_discriminator/main.py", LINES["step2_discriminator/main.py"][3])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    named = sorted(line.split()[1] for line in warnings)
    assert named == ["--num_padding_at_beginning", "--uni_discriminator_head"]
