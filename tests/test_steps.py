"""Steps 1-3 through their real entry points: tiny, on CPU, alone, on two ranks, and under the DeepSpeed launcher."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer, launch, tiny_llama, write_jsonl
from torch.utils.cpp_extension import _get_build_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, pipeline

import step1_sft.main
import step2_discriminator.main
import step3_ppo_tlcr.main
from deepspeed_chat_tlcr import operators
from deepspeed_chat_tlcr.deepspeed_config import build_config, read_overrides
from deepspeed_chat_tlcr.metrics import read_metrics


def step1(tiny: Path, output: Path, *more: object, **kwargs):
    return launch(
        "step1_sft/main.py",
        *("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", output),
        *("--learning_rate", 1e-3, "--dtype", "fp32", *more),
        **kwargs,
    )


def step2(tiny: Path, output: Path, *more: object, **kwargs):
    return launch(
        "step2_discriminator/main.py",
        *("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", output),
        *("--revisions", tiny / "revisions.jsonl", "--learning_rate", 1e-3, "--dtype", "fp32", *more),
        **kwargs,
    )


def step3(tiny: Path, output: Path, sft: Path, judge: Path, *more: object, **kwargs):
    return launch(
        "step3_ppo_tlcr/main.py",
        *("--actor_model_name_or_path", sft, "--critic_model_name_or_path", judge, "--output_dir", output),
        *("--data_path", tiny / "data.jsonl", "--max_answer_seq_len", 12, "--num_warmup_steps", 0),
        *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4, "--dtype", "fp32", *more),
        **kwargs,
    )


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory) -> Path:
    """SFT, discriminator, sequence reward model and TLCR policy of one rank, in sub-folders."""
    folder = tmp_path_factory.mktemp("trained")
    batch = ("--per_device_train_batch_size", 4)
    step1(tiny, folder / "sft", *batch)
    step2(tiny, folder / "disc", *batch, "--num_train_epochs", 4)
    step2(tiny, folder / "rm", *batch, "--objective", "sequence", "--revisions")
    step3(tiny, folder / "ppo", folder / "sft", folder / "disc", "--actor_learning_rate", 1e-3)
    return folder


def train_losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_sft_learns_and_saves_a_whole_model(trained):
    losses = train_losses(trained / "sft")
    assert len(losses) == 3  # 10 SFT examples of 60 (a tenth of them held out), batches of 4
    assert losses[-1] < losses[0]
    assert results(trained / "sft")["eval/loss"] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(trained / "sft")
    model = AutoModelForCausalLM.from_pretrained(trained / "sft")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not list((trained / "sft").glob("checkpoint-*"))


def test_discriminator_learns_and_loads_as_a_token_classification_pipeline(trained):
    losses = train_losses(trained / "disc")
    assert losses[-1] < losses[0]
    measured = results(trained / "disc")
    assert measured["eval/reward_positive"] > measured["eval/reward_negative"]
    classify = pipeline("token-classification", model=str(trained / "disc"), aggregation_strategy="none")
    found = classify("\n\nHuman: Tell me of the cat.\n\nAssistant: I think the cat hates you.")
    assert {entry["entity"] for entry in found} <= {"POSITIVE", "NEGATIVE"}
    assert all(0.5 <= entry["score"] <= 1 for entry in found)


def test_sequence_reward_model_reports_pairs(trained):
    measured = results(trained / "rm")
    assert 0 <= measured["eval/pair_accuracy"] <= 1
    assert measured["eval/margin"] == pytest.approx(
        measured["eval/score_better"] - measured["eval/score_worse"], abs=1e-5
    )


def test_ppo_writes_metrics_of_every_update_and_loadable_models(trained):
    log = read_metrics(trained / "ppo" / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert abs(log[0]["policy/kl"]) < 1e-4  # the policy still is the SFT model
    assert log[0]["policy/clip_fraction"] == 0.0
    for line in log:
        assert -1 <= line["reward/per_token"] <= 1
        assert line["reward/positive_share"] + line["reward/negative_share"] <= 1
        assert 1 <= line["rollout/response_length"] <= 12
    before = AutoModelForCausalLM.from_pretrained(trained / "sft")
    after = AutoModelForCausalLM.from_pretrained(trained / "ppo" / "actor")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert results(trained / "ppo")["steps"] == 5


def test_rewards_by_name_are_summed_with_weights(tiny, trained, tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "import math\n\ndef per_token(rollout, tokenizer):\n    mask = rollout.action_mask.float()\n"
        "    return (0.25 * mask).masked_fill(mask == 0, math.nan)  # what stands behind the end never counts\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    weights = {
        "tlcr": 0.5,
        "sequence": 0.25,
        "sequence_2": 0.0625,
        "random": 0.125,
        "tlcr_fixed": 1.0,
        "tlcr_positive_only": 1.0,
        "tlcr_negative_only": 1.0,
        "tlcr_released_code": 2.0,
        "tlcr_sum": 0.5,
        "python": 4.0,
    }
    paths = {"sequence": f":{trained / 'rm'}", "sequence_2": f":{trained / 'rm'}", "python": ":own_reward:per_token"}
    terms = [f"{name.removesuffix('_2')}{paths.get(name, '')}@{weight}" for name, weight in weights.items()]
    step3(tiny, tmp_path / "ppo", trained / "sft", trained / "disc", "--reward", *terms)
    line = read_metrics(tmp_path / "ppo" / "metrics.jsonl")[0]
    total = sum(weight * line[f"reward/{name}"] for name, weight in weights.items())
    assert line["reward/per_sequence"] == pytest.approx(total, rel=1e-4)
    assert line["reward/sequence_2"] == line["reward/sequence"]
    assert line["reward/python"] == pytest.approx(0.25 * line["rollout/response_length"])
    assert line["reward/tlcr_sum"] == pytest.approx(line["reward/tlcr"], abs=1e-5)
    assert line["reward/tlcr"] == pytest.approx(
        line["reward/tlcr_positive_only"] + line["reward/tlcr_negative_only"], abs=1e-5
    )


def test_the_critic_path_decides_the_reward_unless_told(tiny, trained, tmp_path):
    """DeepSpeed-Chat's command line, whose critic path is a sequence reward model, keeps its meaning."""
    step3(tiny, tmp_path / "ppo", trained / "sft", trained / "rm")
    log = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    # One rewarded token a response: at most a twelfth of the tokens or so.
    assert log[0]["reward/positive_share"] + log[0]["reward/negative_share"] < 0.3


def test_several_updates_per_rollout(tiny, trained, tmp_path):
    more = ("--per_device_training_batch_size", 2, "--ppo_epochs", 2, "--actor_learning_rate", 1e-2)
    step3(tiny, tmp_path / "ppo", trained / "sft", trained / "disc", *more)
    log = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert log[0]["policy/approx_kl"] > 0  # later updates see a policy that has moved


def test_ppo_options_and_their_state_survive_a_restart(tiny, trained, tmp_path):
    options = (
        "--penalty",
        "full_kl",
        "--whiten_advantages",
        "--scale_rewards",
        "--kl_target",
        100.0,
        "--kl_horizon",
        50,
    )
    options = (*options, "--min_answer_seq_len", 3, "--temperature", 0.8, "--top_p", 0.9, "--save_interval", 1)
    options = (*options, "--print_answers", "--ppo_epochs", 2, "--target_kl", 1e9, "--actor_learning_rate", 1e-3)
    test_mode = ("--enable_test_mode", "--test_stop_step", 3)
    done = step3(tiny, tmp_path / "whole", trained / "sft", trained / "disc", *options, *test_mode)
    assert "Human: Tell me of" in done.stdout + done.stderr  # a printed answer
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in whole] == [1, 2, 3]
    betas = [line["policy/kl_coefficient"] for line in whole]
    # KL far below the target: beta shrinks by the largest step, 20 % over 50 sequences, 4 of them each time.
    assert betas == pytest.approx([0.1 * (1 - 0.2 * 4 / 50) ** step for step in range(3)])
    assert all(3 <= line["rollout/response_length"] <= 12 for line in whole)
    assert all(abs(line["value/advantage"]) < 1e-4 for line in whole)
    assert [line["policy/updates"] for line in whole] == [2.0] * 3
    # Killed after step 2: the checkpoint of step 1 is what there is to go on from.
    step3_script(killer(tmp_path, after=2), tiny, tmp_path / "half", trained, (*options, *test_mode))
    step3(tiny, tmp_path / "half", trained / "sft", trained / "disc", *options, *test_mode)
    resumed = read_metrics(tmp_path / "half" / "metrics.jsonl")
    assert [line["policy/kl_coefficient"] for line in resumed] == betas
    assert [line["reward/per_token"] for line in resumed] == [line["reward/per_token"] for line in whole]


def test_a_tight_target_kl_ends_the_updates_of_a_rollout(tiny, trained, tmp_path):
    more = ("--per_device_training_batch_size", 1, "--ppo_epochs", 3, "--actor_learning_rate", 1e-2)
    step3(tiny, tmp_path / "ppo", trained / "sft", trained / "disc", *more, "--target_kl", 1e-6)
    lines = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    # 12 updates a rollout are possible; the second one sees a policy that has moved.
    assert all(line["policy/updates"] < 12 for line in lines)


def test_lora_saves_merged_models(tiny, trained, tmp_path):
    more = ("--actor_lora_dim", 4, "--actor_lora_module_name", "layers.", "--only_optimize_lora")
    step3(tiny, tmp_path / "ppo", trained / "sft", trained / "disc", *more, "--actor_lora_learning_rate", 1e-2)
    before = AutoModelForCausalLM.from_pretrained(trained / "sft").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "actor").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers." in name and "norm" not in name for name in changed)


@pytest.mark.parametrize(("stage", "dtype"), [(2, "fp32"), (3, "bf16")])
def test_all_steps_on_two_ranks(tiny, trained, tmp_path, stage, dtype):
    zero = ("--zero_stage", stage, "--per_device_train_batch_size", 2, "--dtype", dtype, "--deepspeed")
    zero = (*zero, "--gradient_checkpointing") if stage == 3 else zero
    zero = (*zero, "--tokens_per_micro_batch", 64)  # not so on one rank: the losses are the same
    step1(tiny, tmp_path / "sft", *zero, ranks=2, launcher=stage == 2)
    step2(tiny, tmp_path / "disc", *zero, "--num_train_epochs", 4, ranks=2)
    actor = ("--actor_zero_stage", stage, "--critic_zero_stage", stage, "--dtype", dtype, "--deepspeed")
    batch = ("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 2)
    if stage == 3:
        actor = (*actor, "--actor_gradient_checkpointing", "--critic_gradient_checkpointing", "--enable_tensorboard")
    step3(tiny, tmp_path / "ppo", tmp_path / "sft", tmp_path / "disc", *actor, *batch, ranks=2)
    assert bool(list((tmp_path / "ppo").glob("tensorboard/events*"))) == (stage == 3)
    log = read_metrics(tmp_path / "ppo" / "metrics.jsonl")
    assert len(log) == 2
    assert abs(log[0]["policy/kl"]) < 0.05
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "actor")
    if dtype == "fp32":
        # Two ranks and one, at the same global batch of 4, have the same losses to 1e-4.
        for name, whole in (("sft", 2), ("disc", 5)):  # full batches: an incomplete last one is filled up per rank
            one, two = (train_losses(folder / name) for folder in (trained, tmp_path))
            assert one[:whole] == pytest.approx(two[:whole], abs=1e-4)


def test_a_reward_model_learns_the_same_without_padding(tiny, trained, tmp_path):
    micro = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--tokens_per_micro_batch", 64)
    step2(tiny, tmp_path / "rm", *micro, "--objective", "sequence", "--revisions")
    assert train_losses(tmp_path / "rm") == pytest.approx(train_losses(trained / "rm"), abs=1e-5)
    assert results(tmp_path / "rm")["eval/loss"] == pytest.approx(results(trained / "rm")["eval/loss"], abs=1e-4)


def test_a_killed_ppo_run_ends_where_the_uninterrupted_one_ends(tiny, trained, tmp_path):
    arguments = ("--save_interval", 2, "--actor_learning_rate", 1e-3)
    step3(tiny, tmp_path / "whole", trained / "sft", trained / "disc", *arguments)
    # The state a kill after step 3 leaves: the checkpoint of step 2, and one line of metrics too many.
    half = tmp_path / "half"
    killed = step3_script(killer(tmp_path, after=3), tiny, half, trained, arguments)
    assert killed.returncode == 9, killed.stderr[-3000:]
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["step-2"]
    step3(tiny, half, trained / "sft", trained / "disc", *arguments)

    def comparable(folder: Path) -> list[dict]:
        noise = ("seconds/", "throughput/", "memory/")
        return [
            {k: v for k, v in line.items() if not k.startswith(noise)}
            for line in read_metrics(folder / "metrics.jsonl")
        ]

    assert comparable(half) == comparable(tmp_path / "whole")
    for part in ("actor", "critic"):
        assert (half / part / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / part / "model.safetensors"
        ).read_bytes()
    assert not (half / "checkpoints").exists() or not list((half / "checkpoints").iterdir())


def killer(folder: Path, after: int) -> Path:
    """A script that runs step 3 and dies, as by SIGKILL, once the metrics of step ``after`` are written."""
    script = folder / f"killed_after_{after}.py"
    script.write_text(
        "import os, sys\n"
        "import step3_ppo_tlcr.main as step3\n"
        "from deepspeed_chat_tlcr.metrics import MetricsLog\n"
        "whole_write = MetricsLog.write\n"
        "def write(self, step, metrics):\n"
        "    whole_write(self, step, metrics)\n"
        f"    if step == {after}:\n"
        "        os._exit(9)\n"
        "MetricsLog.write = write\n"
        "step3.main(sys.argv[1:])\n"
    )
    return script


def step3_script(script: Path, tiny: Path, output: Path, trained: Path, more: tuple):
    return launch(
        str(script),
        *("--actor_model_name_or_path", trained / "sft", "--critic_model_name_or_path", trained / "disc"),
        *("--output_dir", output, "--data_path", tiny / "data.jsonl", "--max_answer_seq_len", 12),
        *("--num_warmup_steps", 0, "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4),
        *("--dtype", "fp32", *more),
        check=False,
    )


def refusal(main, arguments: tuple, capsys) -> str:
    """The one line that a wrong command line ends with; exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_bad_input_of_step_1(tiny, tmp_path, capsys):
    good = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / "a")
    batches, optimizer, misspelt = (tmp_path / f"{name}.json" for name in ("batches", "optimizer", "misspelt"))
    misspelt.write_text(json.dumps({"zero_optimisation": {}, "gradient_clipping": 1.0}))
    batches.write_text(json.dumps({"train_batch_size": 8}))
    optimizer.write_text(json.dumps({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}}))
    few = tmp_path / "few_positions"
    GPT2Config(n_positions=64).save_pretrained(few)
    for more, words in (
        (("--per_device_train_batch_size", 64), "do not fill one batch of 64"),
        (("--data_split", "2,4"), "2,4"),
        (("--max_seq_len", 3), "--max_seq_len 3"),
        (("--model_name_or_path", tmp_path / "nowhere"), "no such folder"),
        (("--data_path", "No/such-set"), "No/such-set"),
        (("--dtype", "fp16"), "--dtype fp16"),
        (("--output_dir", tiny / "data.jsonl"), "--output_dir"),
        (("--deepspeed_config", tmp_path / "none.json"), "none.json"),
        (("--deepspeed_config", batches), "take out 'train_batch_size'"),
        (("--deepspeed_config", optimizer), "take out 'optimizer'"),
        (("--deepspeed_config", misspelt), "knows no 'zero_optimisation': did you mean 'zero_optimization'"),
        (("--num_train_epochs", 0), "--num_train_epochs 0"),
        (("--learning_rate", "nan"), "--learning_rate nan"),
        (("--learning_rate", -1), "--learning_rate -1"),
        (("--model_name_or_path", few, "--max_seq_len", 65), "65 tokens are more than the 64 positions"),
    ):
        assert words in refusal(step1_sft.main.main, (*good, *more), capsys)


def test_a_deepspeed_config_overrides_what_flags_do_not_say(tmp_path):
    """transformers' files say "auto" where the flags decide; what is left of them is read."""
    file = tmp_path / "config.json"
    zero = {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}}
    scheduler = {"type": "auto", "params": {"warmup_num_steps": "auto"}}
    said = {
        "train_batch_size": "auto",
        "zero_optimization": zero,
        "scheduler": scheduler,
        "zero_allow_untested_optimizer": True,
    }
    file.write_text(json.dumps(said))
    assert read_overrides(file) == {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    sizes = {"zero_stage": 0, "micro_batch_size": 2, "gradient_accumulation_steps": 3, "world_size": 4}
    config = build_config(dtype="fp32", **sizes, overrides=file)
    assert (config["train_batch_size"], config["zero_optimization"]["stage"]) == (24, 2)


def test_bad_input_of_step_2(tiny, tmp_path, capsys):
    first = json.loads((tiny / "revisions.jsonl").read_text().splitlines()[0])
    lacking = write_jsonl(tmp_path / "lacking.jsonl", [{k: v for k, v in first.items() if k != "modified"}])
    mistyped = write_jsonl(tmp_path / "mistyped.jsonl", [first, first | {"modified": 3}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    unedited = write_jsonl(tmp_path / "unedited.jsonl", [first | {"modified": first["rejected"]}] * 9)
    good = ("--model_name_or_path", tiny / "model", "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / "a")
    good = (*good, "--revisions", tiny / "revisions.jsonl")
    no_lora = ("--per_device_train_batch_size", 4, "--lora_dim", 2, "--lora_module_name")
    for more, words in (
        (("--data_seed", 99), "--allow_foreign_revisions"),
        (("--revisions", lacking), f"{lacking}:1: no 'modified'"),
        (("--revisions", mistyped), f"{mistyped}:2: 'modified' is of type int"),
        (("--revisions", empty), "no revisions in it"),
        (("--revisions", unedited), "none of its 9 revisions edits anything"),
        (("--revisions", tmp_path / "none.jsonl"), "no such file"),
        (("--objective", "token", "--revisions"), "--revisions is missing"),
        (("--objective", "sequence"), "--pairs modified"),
        (("--objective", "token", "--pairs", "modified"), "--objective sequence"),
        (("--objective", "token", "--score_positions", "all"), "--objective sequence"),
        (("--score_positions", "all", "--tokens_per_micro_batch", 512), "averages over padding too"),
        (("--per_device_train_batch_size", 4, "--tokens_per_micro_batch", -1), "--tokens_per_micro_batch -1"),
        (("--objective", "sequence", "--pairs", "modified", "--neutral_weight", 0.5), "--neutral_weight"),
        (("--only_optimize_lora", "--per_device_train_batch_size", 4), "--lora_dim"),
        ((*no_lora, "decoder.layers."), "matches no linear layer"),
    ):
        assert words in refusal(step2_discriminator.main.main, (*good, *more), capsys)


def test_bad_input_of_step_3(tiny, trained, tmp_path, capsys):
    other = tiny_llama(tmp_path / "other", byte_level_tokenizer(["quite another text"], vocab_size=300), seed=1)
    broken = shutil.copytree(trained / "disc", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    foreign = shutil.copytree(trained / "disc", tmp_path / "foreign")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / file, foreign / file)
    good = ("--actor_model_name_or_path", trained / "sft", "--critic_model_name_or_path", trained / "disc")
    good = (*good, "--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / "a")
    good = (*good, "--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4)
    critic = "--critic_model_name_or_path"
    for more, words in (
        (("--reward", "tlcrr"), "known: tlcr, tlcr_fixed"),
        (("--reward", "tlcr@much"), "'much' after @ is not a finite number"),
        (("--reward", "python:nowhere:nothing"), "python:nowhere:nothing"),
        (("--per_device_training_batch_size", 3), "no multiple"),
        (
            ("--per_device_training_batch_size", 2, "--gradient_accumulation_steps", 3),
            "--gradient_accumulation_steps 3",
        ),
        (("--max_prompt_seq_len", 3), "do not fill one set of rollouts"),
        (("--max_answer_seq_len", 257), "was trained for 256 positions, prompt included"),
        ((critic, other, "--reward", "random"), "differ"),
        (("--reward", f"tlcr:{foreign}"), f"({foreign})"),
        ((critic, trained / "sft"), "neither a discriminator nor a reward model"),
        ((critic, trained / "sft", "--reward", "tlcr"), "is not a discriminator"),
        (("--reward", f"tlcr:{trained / 'rm'}"), "1 label"),
        (("--reward", f"tlcr:{broken}"), "9 missing: model.layers.2"),
    ):
        assert words in refusal(step3_ppo_tlcr.main.main, (*good, *more), capsys)


def test_help_is_grouped_and_every_option_documented(capsys):
    for module in (step1_sft.main, step2_discriminator.main, step3_ppo_tlcr.main):
        with pytest.raises(SystemExit) as ended:
            module.parse_args(["--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert "\ndata:\n" in shown
        assert "\nrun:\n" in shown


def test_flags_without_effect_say_so_once(capsys):
    step1_sft.main.parse_args(["--model_name_or_path", "x", "--compute_fp32_loss", "--num_inner_step", "2"])
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in warnings] == ["warning"] * 2
    assert "--compute_fp32_loss" in "".join(warnings)


def test_a_killed_build_does_not_block_the_next_run(tiny, tmp_path, monkeypatch):
    """What a killed compilation leaves behind: PyTorch's ``lock`` file, for which a plain load would wait for ever."""
    operators.own_build_folder()
    built = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    # A copy: other tests use the folder at the same time.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    copy = tmp_path / "extensions" / built.name
    shutil.copytree(built, copy)
    (copy / "lock").touch()
    step1(tiny, tmp_path / "sft", "--per_device_train_batch_size", 4)
    assert not (copy / "lock").exists()
