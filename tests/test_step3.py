"""Step 3's parts and its real entry point in this process: algorithms, rollout engines, faults, resuming, watching."""

import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import bytes_of_tensors
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, LlamaConfig

import step3_ppo_tlcr.main as step3
import step3_ppo_tlcr.train as training
from deepspeed_chat_tlcr import runtime as runtimes
from deepspeed_chat_tlcr.generation import Decoding
from deepspeed_chat_tlcr.metrics import read_metrics
from deepspeed_chat_tlcr.models import load_causal_lm
from deepspeed_chat_tlcr.runtime import Runtime
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from step3_ppo_tlcr import engines, reward_models
from step3_ppo_tlcr.logprobs import entropy
from step3_ppo_tlcr.objectives import remax_loss, remax_weights
from step3_ppo_tlcr.options import check
from step3_ppo_tlcr.ppo import PPO
from step3_ppo_tlcr.rollout import LoopRollout, checked
from step3_ppo_tlcr.scores import action_logits, sequence_score


@pytest.fixture(scope="module")
def world(tiny: Path, tmp_path_factory) -> Path:
    """Untrained actor, discriminator and reward model, and text for pre-training."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    for name, labels in (("disc", 2), ("rm", 1)):
        torch.manual_seed(labels)
        config = LlamaConfig.from_pretrained(tiny / "model", num_labels=labels, initializer_range=0.5)
        AutoModelForTokenClassification.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()]
    (folder / "text.txt").write_text("\n".join(line["chosen"] for line in lines))
    return folder


@pytest.fixture
def run(tiny, world, tmp_path, monkeypatch):
    """Step 3 in this process; the process group stays for the next run."""
    monkeypatch.setattr(Runtime, "finish", lambda self: None)
    handler = signal.getsignal(signal.SIGTERM)

    def start(name: str, *more: object, critic: str = "disc") -> list[dict]:
        arguments = (
            *("--actor_model_name_or_path", tiny / "model", "--critic_model_name_or_path", world / critic),
            *("--data_path", tiny / "data.jsonl", "--output_dir", tmp_path / name, "--dtype", "fp32"),
            *("--max_answer_seq_len", 10, "--max_prompt_seq_len", 64, "--num_warmup_steps", 0),
            *("--per_device_generation_batch_size", 4, "--per_device_training_batch_size", 4),
            *("--actor_learning_rate", 1e-3, "--enable_test_mode", "--test_stop_step", 3, *more),
        )
        step3.main([str(argument) for argument in arguments])
        return read_metrics(tmp_path / name / "metrics.jsonl")

    yield start
    signal.signal(signal.SIGTERM, handler)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def without_clock(lines: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k.split("/")[0] not in ("seconds", "throughput", "memory")} for line in lines
    ]


def own_reward(folder: Path, monkeypatch, body: str) -> str:
    """A module with ``reward(rollout, tokenizer)`` of this body; returns what ``--reward`` calls it."""
    name = f"reward_of_{folder.name}"
    (folder / f"{name}.py").write_text(
        "import os, signal, resource, torch\ncalls = 0\n"
        "def reward(rollout, tokenizer):\n    global calls\n    calls += 1\n"
        "    plain = 0.1 * rollout.action_mask.float()\n" + "".join(f"    {line}\n" for line in body.splitlines())
    )
    monkeypatch.syspath_prepend(str(folder))
    return f"python:{name}:reward"


LORA = ("--actor_lora_dim", 2, "--critic_lora_dim", 2, "--actor_lora_learning_rate", 1e-2)


# Algorithms


def test_remax_weights_by_hand():
    # R = 2 against 0.5: difference 1.5, discounted once at the last action already (as released).
    rewards = torch.tensor([[0.0, 2.0, 9.0], [0.5, 0.0, 0.0], [20.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]])
    found = remax_weights(rewards, torch.tensor([0.5, 1.5, 0.0]), mask, gamma=0.5, clip=5.0)
    expected = torch.tensor([[0.375, 0.75, 0], [-0.125, -0.25, -0.5], [2.5, 0, 0]])
    torch.testing.assert_close(found, expected)


def test_remax_clips_the_difference_of_scores_and_not_the_scores(run, tmp_path):
    """The reward model's scores, times 1000, are beyond +-5: clipped ones would make every difference 0 or 10."""
    seen, weigh = [], training.ReMax.score

    def noting(self, rollouts, averages):
        found = weigh(self, rollouts, averages)
        seen.append([self.models.reward(one)[0].sum(1) for one in (*rollouts, *self.greedy)])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ReMax, "score", noting)
        patch.setitem(reward_models.SCORES, "sequence_score", lambda *args: 1000 * sequence_score(*args))
        run("unclipped", "--algo", "remax", "--test_stop_step", 1, critic="rm")
    assert max(scores.abs().max() for scores in seen[0]) > 5


def test_remax_loss_is_reinforce_over_counted_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, -math.inf]], requires_grad=True)
    loss = remax_loss(logprobs, torch.tensor([[3.0, -1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert loss.item() == pytest.approx((3.0 - 2.0) / 2)
    loss.backward()
    assert logprobs.grad.tolist() == [[-1.5, 0.5, 0.0]]


def test_entropy_has_the_gradient_of_its_definition():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    entropies = entropy(logits, torch.zeros(2, 3, dtype=torch.long), Decoding(max_new_tokens=8), eos_id=0)
    (ours,) = torch.autograd.grad((entropies * torch.arange(6.0).view(2, 3)).sum(), logits)
    probs = logits.softmax(-1)
    (expected,) = torch.autograd.grad((-(probs * probs.log()).sum(-1) * torch.arange(6.0).view(2, 3)).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_remax_trains_without_a_critic(run, tmp_path):
    lines = run("remax", "--algo", "remax", "--gamma", 0.99, "--kl_ctl", 0.05, critic="rm")
    assert {"actor", "results.json"} <= {path.name for path in (tmp_path / "remax").iterdir()}
    assert not (tmp_path / "remax" / "critic").exists()
    assert all(math.isfinite(line["reward/greedy_per_sequence"]) for line in lines)
    assert "value/loss" not in lines[0]


def test_the_kl_is_measured_from_the_reference_that_is_named(run, tiny, tmp_path):
    assert run("own")[0]["policy/kl"] == pytest.approx(0, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    shutil.copytree(tiny / "model", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    assert abs(run("named", "--reference_model_name_or_path", tmp_path / "other")[0]["policy/kl"]) > 0.1


@pytest.mark.parametrize("more", [(), ("--actor_zero_stage", 3, "--tokens_per_micro_batch", 200, "--ppo_epochs", 2)])
def test_the_actor_without_its_lora_layers_is_the_reference(run, tiny, tmp_path, monkeypatch, more):
    """All that is measured equals what a reference of its own gives; the actor's own log-probs move away from it."""
    loaded, load = [], engines.load_causal_lm
    monkeypatch.setattr(engines, "load_causal_lm", lambda path, *rest: loaded.append(str(path)) or load(path, *rest))
    more = (*more, *LORA, "--only_optimize_lora", "--eval_interval", 2, "--eval_prompts", 2)
    one = run("one", *more)
    assert loaded == [str(tiny / "model")]
    shutil.copytree(tiny / "model", tmp_path / "copy")
    two = run("two", *more, "--reference_model_name_or_path", tmp_path / "copy")
    assert loaded[1:] == [str(tiny / "model"), str(tmp_path / "copy")]
    assert without_clock(one) == without_clock(two)
    assert one[1]["policy/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(one[3]["policy/kl"]) > 1e-3
    assert one[3]["eval/policy/kl"] != 0
    first, second = weights(tmp_path / "one" / "actor"), weights(tmp_path / "two" / "actor")
    assert all(torch.equal(first[name], second[name]) for name in first)
    run("all", *LORA, "--test_stop_step", 1)
    assert loaded[3:] == [str(tiny / "model")] * 2, "the rest of the actor trains too"


@pytest.mark.parametrize("kind", ["disc", "rm"])
@pytest.mark.parametrize("more", [(), ("--critic_zero_stage", 3, "--reward_zero_stage", 3, "--critic_dropout", 0.1)])
def test_the_critic_without_its_lora_layers_scores_with_the_rewards_own_head(run, world, tmp_path, capsys, more, kind):
    """All that is measured equals what a reward model of its own gives, the copy in another folder."""
    shutil.copytree(world / kind, tmp_path / "copy")
    name = {"disc": "tlcr", "rm": "sequence"}[kind]
    more = (*more, *LORA, "--only_optimize_lora", "--critic_learning_rate", 1e-2, "--critic_lora_learning_rate", 1e-2)
    # Weights whose sum is 1: the head of a critic that starts as the reward model stays as it is.
    one = run("one", *more, "--reward", f"{name}@0.75", f"{name}@0.25", critic=kind)
    assert "own head on the critic without its LoRA layers" in capsys.readouterr().out
    two = run("two", *more, "--reward", *(f"{name}:{tmp_path / 'copy'}@{w}" for w in (0.75, 0.25)), critic=kind)
    assert "own head" not in capsys.readouterr().out
    assert without_clock(one) == without_clock(two)
    first, second = weights(tmp_path / "one" / "critic"), weights(tmp_path / "two" / "critic")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_greedy_baseline_of_the_same_answer_leaves_the_kl_penalty_alone(run):
    """Sampled at a temperature near 0 the answers are the greedy ones: every difference, and every return, is 0."""
    lines = run("same", "--algo", "remax", "--temperature", 1e-4, "--kl_ctl", 0.0)
    assert lines[0]["reward/per_sequence"] == pytest.approx(lines[0]["reward/greedy_per_sequence"], abs=1e-5)
    assert lines[0]["policy/return"] == pytest.approx(0.0, abs=1e-5)


def test_two_rewards_are_summed_as_token_by_token_arithmetic_sums_them(run, world, tmp_path, monkeypatch):
    """D of every token from its own prefix, the reward model's value at the end: tlcr @ 1 + sequence @ 0.2."""
    saved = tmp_path / "rollout.pt"
    body = (
        f"if calls == 1: torch.save([rollout.input_ids, rollout.attention_mask, rollout.action_mask], {str(saved)!r})"
    )
    keep = own_reward(tmp_path, monkeypatch, f"{body}\nreturn plain")
    terms = (f"tlcr:{world / 'disc'}", f"sequence:{world / 'rm'}@0.2", f"{keep}@0")
    line = run("sum", "--reward", *terms, "--test_stop_step", 1)[0]

    disc, rm = (AutoModelForTokenClassification.from_pretrained(world / name) for name in ("disc", "rm"))
    totals = []
    for ids, attention, actions in zip(*torch.load(saved), strict=True):
        text, length = ids[attention > 0], int(actions.sum())
        with torch.no_grad():
            probs = [disc(text[None, : at + 1]).logits[0, -1].softmax(-1)[1] for at in range(len(text))][-length:]
            score = rm(text[None]).logits[0, -1, 0]
        totals.append(sum(2 * float(prob) - 1 for prob in probs) + 0.2 * min(max(float(score), -5), 5))
    assert line["reward/per_sequence"] == pytest.approx(sum(totals) / len(totals), abs=1e-4)


def test_a_critic_that_starts_as_the_reward_model_speaks_in_units_of_reward(run, world, tmp_path):
    """A score weighs 3, or 2 + 1, in the reward: V is 3 times the model's own. Rewards divided by their spread: so is
    V. A critic that is not the reward model is in units of reward already, and stays as it is."""

    def first(name: str, *terms: str, more: tuple = ()) -> dict:
        return run(name, "--reward", *terms, *more, "--test_stop_step", 1, critic="rm")[0]

    plain = first("plain", "sequence")
    assert plain["value/mean"] != 0
    for name, terms in (("three", ["sequence@3"]), ("sum", ["sequence@2", f"sequence:{world}/./rm@1"])):
        assert first(name, *terms)["value/mean"] == pytest.approx(3 * plain["value/mean"], rel=1e-4)
    divided = first("divided", "sequence", more=("--scale_rewards",))
    assert divided["reward/scale"] != pytest.approx(1.0, rel=0.01)
    assert divided["value/mean"] == pytest.approx(plain["value/mean"] / divided["reward/scale"], rel=1e-4)
    shutil.copytree(world / "rm", tmp_path / "copy")
    assert first("other", f"sequence:{tmp_path / 'copy'}@3")["value/mean"] == pytest.approx(plain["value/mean"])


# Rollouts


def test_rollout_engines_agree_on_greedy_answers(run):
    """Answers do not depend on which engine writes them; at a temperature near 0 there is only one answer."""
    more = ("--temperature", 1e-5, "--test_stop_step", 1)
    lengths = [
        without_clock(run(name, "--rollout", name, *more))[0]["rollout/ref_perplexity"]
        for name in ("loop", "hf", "continuous")
    ]
    assert lengths == pytest.approx([lengths[0]] * 3, rel=1e-5)


def test_all_generation_batches_decoded_at_once_or_one_by_one(run):
    more = ("--generation_batches", 2, "--gradient_accumulation_steps", 2, "--temperature", 1e-5)
    together = run("together", *more, "--test_stop_step", 1)
    apart = run("apart", *more, "--test_stop_step", 1, "--decode_batch_size", 4)
    assert together[0]["rollout/ref_perplexity"] == pytest.approx(apart[0]["rollout/ref_perplexity"], rel=1e-6)


def test_the_hybrid_engine_falls_back_where_it_cannot_run(run, capsys):
    run("hybrid", "--enable_hybrid_engine", "--test_stop_step", 1)
    assert "rollouts go on with --rollout loop" in capsys.readouterr().out


class Gibberish(RolloutEngine):
    """A broken engine: the same token for ever."""

    def generate(self, request, sampling):
        said = torch.full((len(request.prompt_ids), sampling.max_new_tokens), 7)
        return RolloutBatch(
            torch.cat([request.prompt_ids, said], 1),
            torch.cat([request.prompt_attention_mask, torch.ones_like(said)], 1),
            torch.full((len(said),), request.prompt_ids.size(1)),
        )

    def sync_weights(self, step):
        pass


class PlainEngine:
    """A model where an engine is expected."""

    def __init__(self, module):
        self.module = module

    def zero_optimization_partition_weights(self):
        return False


def test_an_engine_that_writes_gibberish_is_replaced(tiny, capsys):
    runtime = runtimes.start("fp32", 0)
    model, tokenizer = load_causal_lm(str(tiny / "model"), torch.float32), load_tokenizer(tiny / "model")
    loop, prompts = LoopRollout(PlainEngine(model), tokenizer), [[5, 6, 8], [9, 4, 11, 12, 30]]

    @torch.no_grad()
    def logits_of(rollout):
        return action_logits(model, rollout)

    assert checked(loop, loop, runtime, prompts, logits_of) is loop
    assert "gibberish" not in capsys.readouterr().out
    assert checked(Gibberish(), loop, runtime, prompts, logits_of) is loop
    assert "gibberish" in capsys.readouterr().out


# Faults


def test_a_reward_that_is_not_a_number_is_skipped_and_counted(run, tmp_path, monkeypatch):
    reward = own_reward(tmp_path, monkeypatch, "return plain * (float('nan') if calls == 2 else 1)")
    lines = run("skipped", "--reward", reward)
    assert [line["faults/skipped"] for line in lines] == [0.0, 1.0, 0.0]
    assert [line["policy/updates"] for line in lines] == [1.0, 0.0, 1.0]
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "skipped" / "actor").values())


def test_faults_in_a_row_stop_the_run_with_what_caused_them(run, tmp_path, monkeypatch, capsys):
    reward = own_reward(tmp_path, monkeypatch, "return plain / (calls < 2)")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        run("stopped", "--reward", reward, "--max_faults", 2)
    assert ended.value.code == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "2 updates in a row" in message
    assert "step-3" in message
    batch = load_file(tmp_path / "stopped" / "faulty_batch-0.safetensors")
    assert batch["input_ids"].shape[0] == 4
    assert (tmp_path / "stopped" / "checkpoints" / "step-3" / "state.json").exists()


@pytest.fixture
def spoilt(monkeypatch):
    """Call with a role, a function and the calls to spoil: in these that role's loss becomes the function of it."""
    whole, batches = PPO.losses, []

    def spoil(role, function, on):
        def losses(self, batch):
            batches.append(batch)
            call = len(batches)
            for loss in whole(self, batch):
                yield replace(loss, value=function(loss.value)) if loss.role == role and on(call) else loss

        monkeypatch.setattr(PPO, "losses", losses)
        return batches

    return spoil


def infinite_slope(loss):
    """As large as the loss, but d sqrt(x) / dx at 0 is infinite."""
    return loss + (loss * 0).sqrt()


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_loss_that_is_not_finite_leaves_out_its_micro_batch(run, tmp_path, spoilt, role):
    """Two micro-batches per update, the second poisoned: the update is the first one's alone."""
    batches = spoilt(role, lambda loss: loss * math.nan, lambda call: call == 2)
    more = ("--per_device_training_batch_size", 2, "--gradient_accumulation_steps", 2)
    lines = run("left_out", *more)
    assert [line["faults/left_out"] for line in lines] == [0.5, 0.0, 0.0]
    assert [line["policy/updates"] for line in lines] == [1.0] * 3
    assert len(batches) == 7  # the good one again, with weight 0, in the place of the bad one
    assert batches[2] is batches[0]


def test_a_critic_that_only_has_bad_losses_skips_the_update(run, tmp_path, spoilt):
    spoilt("critic", lambda loss: loss * math.nan, lambda call: call == 2)
    lines = run("critic")
    assert [line["faults/left_out"] for line in lines] == [0.0, 1.0, 0.0]
    assert [line["faults/skipped"] for line in lines] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("stage", [0, 2])
def test_gradients_that_are_not_finite_do_not_reach_the_weights(run, tmp_path, spoilt, stage):
    spoilt("actor", infinite_slope, lambda call: call == 2)
    lines = run("gradients", "--actor_zero_stage", stage, "--critic_zero_stage", stage)
    assert [line["faults/skipped"] for line in lines] == [0.0, 1.0, 0.0]
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "gradients" / "actor").values())


def test_overflow_of_one_model_skips_the_step_of_both(run, tmp_path, spoilt):
    """In bf16, whose optimisers check for overflow as those of fp16 do."""
    spoilt("actor", infinite_slope, lambda call: True)
    more = ("--actor_zero_stage", 2, "--critic_zero_stage", 2, "--dtype", "bf16", "--test_stop_step", 2)
    aligned, alone = run("aligned", *more, "--align_overflow"), run("alone", *more)
    assert [line["faults/critic_overflows"] for line in aligned] == [1.0, 2.0]
    assert [line["faults/critic_overflows"] for line in alone] == [0.0, 0.0]
    assert [line["faults/actor_overflows"] for line in alone] == [1.0, 2.0]


def test_a_full_disk_ends_with_one_message_and_a_whole_checkpoint(run, tmp_path, monkeypatch, capsys):
    """From step 2 on no file may grow beyond 20 kB, which a checkpoint does."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    reward = own_reward(
        tmp_path,
        monkeypatch,
        "if calls == 2:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "return plain",
    )

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended:
            run("full", "--reward", reward, "--save_interval", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert ended.value.code == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step-2 could not be written" in message
    assert "step-1 is whole" in message
    monkeypatch.undo()


# Resuming


EVERYTHING = ("--enable_ema", "--ema_decay", 0.5, "--eval_interval", 1, "--eval_prompts", 2, "--save_answers")


def test_a_run_stopped_by_sigterm_ends_where_the_uninterrupted_one_ends(run, world, tmp_path, monkeypatch, capsys):
    """With EMA, pre-training text, held-out prompts and a python reward that sends the signal in step 2."""
    more = (*EVERYTHING, "--unsupervised_dataset_name", world / "text.txt", "--unsup_coef", 1.0, "--scale_rewards")
    more = (*more, "--per_device_eval_batch_size", 1)
    quiet = own_reward(tmp_path, monkeypatch, "return plain * (1 + torch.rand_like(plain))")
    # Its random numbers come from torch's generator, so they resume with it.
    whole = run("whole", *more, "--reward", quiet)
    stopping = tmp_path / f"reward_of_{tmp_path.name}.py"
    body, sends = stopping.read_text(), "    if calls == 5: os.kill(os.getpid(), signal.SIGTERM)\n    plain ="
    # Measured before step 1 (2 answers, 2 ways), then step 1, in which the fifth call is.
    stopping.write_text(body.replace("    plain =", sends))
    monkeypatch.delitem(sys.modules, f"reward_of_{tmp_path.name}")
    run("half", *more, "--reward", quiet)
    assert "resume with the same command" in capsys.readouterr().out
    assert not (tmp_path / "half" / "actor").exists()
    assert [path.name for path in (tmp_path / "half" / "checkpoints").iterdir()] == ["step-1"]
    stopping.write_text(body)
    monkeypatch.delitem(sys.modules, f"reward_of_{tmp_path.name}")
    resumed = run("half", *more, "--reward", quiet, "--print_answers")
    shown = capsys.readouterr().out
    assert "continuing from step 1" in shown
    assert "--print_answers: False -> True" in shown
    assert without_clock(resumed) == without_clock(whole)
    for model in ("actor", "critic", "actor_ema"):
        one, other = weights(tmp_path / "whole" / model), weights(tmp_path / "half" / model)
        assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("answers-0.jsonl", "samples.jsonl", "samples.html"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_number_of_ranks_is_refused(run, tmp_path, capsys):
    saved = tmp_path / "ranks" / "checkpoints" / "step-1"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 1, "world_size": 2}))
    with pytest.raises(SystemExit) as ended:
        run("ranks")
    assert ended.value.code == 2
    assert "written by 2 rank(s), this run has 1" in capsys.readouterr().err


def stopped(run, name: str, tmp_path, monkeypatch, *more: object) -> None:
    """A run of three steps that SIGTERM ends after the first."""
    reward = own_reward(tmp_path, monkeypatch, "if calls == 1: os.kill(os.getpid(), signal.SIGTERM)\nreturn plain")
    run(name, "--reward", reward, *more)
    monkeypatch.delitem(sys.modules, f"reward_of_{tmp_path.name}")
    own_reward(tmp_path, monkeypatch, "return plain")


AVERAGE = ("--enable_ema", "--ema_decay", 0.5)
# The tiny actor: two matrices of 320 x 32 and the last norm, and in each of two blocks 10,240 weights of seven matrices
# and two norms. LoRA of rank 2 adds 2 * 64 to the four matrices of 32 x 32 and 2 * 96 to the three of 32 x 64.
OUTSIDE, BLOCKS, ADAPTERS = 2 * 320 * 32 + 32 + 2 * 64, 2 * 10_240, 2 * (4 * 2 * 64 + 3 * 2 * 96)
TRAINED = {  # ZeRO stage and options; how many of the actor's parameters train
    "fp32": ((0, "fp32"), OUTSIDE + BLOCKS),
    "fp32, ZeRO-2": ((2, "fp32"), OUTSIDE + BLOCKS),
    "bf16": ((0, "bf16"), OUTSIDE + BLOCKS),
    "bf16, ZeRO-2, average": ((2, "bf16", *AVERAGE), OUTSIDE + BLOCKS),
    "ZeRO-2, offload": ((2, "bf16", "--offload"), OUTSIDE + BLOCKS),
    "ZeRO-3, average": ((3, "bf16", *AVERAGE), OUTSIDE + BLOCKS),
    "ZeRO-3, offload": ((3, "bf16", "--offload"), OUTSIDE + BLOCKS),
    "LoRA": ((0, "fp32", *LORA, "--only_optimize_lora"), ADAPTERS),
    "LoRA and the rest": ((2, "bf16", *LORA), OUTSIDE + ADAPTERS),
    "LoRA, ZeRO-2, average": ((2, "bf16", *LORA, "--only_optimize_lora", *AVERAGE), ADAPTERS),
    "LoRA, ZeRO-3": ((3, "bf16", *LORA, "--only_optimize_lora"), ADAPTERS),
}


OLDER = ("fp32", "bf16", "LoRA", "LoRA, ZeRO-2, average", "LoRA, ZeRO-3")
"""Of these, checkpoints of an older version, with everything in them, are loaded too."""


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_holds_what_cannot_be_made_again(run, tmp_path, monkeypatch, name):
    """Weight, momentum and variance in fp32: 12 bytes of a parameter that trains, none of one that does not.

    A run stopped after its first step, by SIGTERM, and continued must end where the uninterrupted one ends.
    """
    (stage, dtype, *more), trained = TRAINED[name]
    more = ("--dtype", dtype, "--actor_zero_stage", stage, "--critic_zero_stage", stage, "--save_total_limit", 9, *more)
    whole = run("whole", *more, "--reward", own_reward(tmp_path, monkeypatch, "return plain"))

    def kept_by(half: str, lean: bool) -> int:
        """Bytes of tensors in the actor's checkpoint."""
        monkeypatch.delitem(sys.modules, f"reward_of_{tmp_path.name}")
        with monkeypatch.context() as patch:
            if not lean:
                patch.setattr(engines, "lean_checkpoints", lambda engine: None)
            stopped(run, half, tmp_path, monkeypatch, *more)
        files = (tmp_path / half / "checkpoints" / "step-1" / "actor").glob("*.pt")
        kept = sum(bytes_of_tensors(torch.load(file, weights_only=False)) for file in files)
        resumed = run(half, *more, "--reward", f"python:reward_of_{tmp_path.name}:reward")
        assert without_clock(resumed) == without_clock(whole)
        for model in ("actor", "critic", *(["actor_ema"] if "--enable_ema" in more else [])):
            one, other = weights(tmp_path / "whole" / model), weights(tmp_path / half / model)
            assert all(torch.equal(one[name], other[name]) for name in one)
        return kept

    assert kept_by("half", lean=True) == pytest.approx(12 * trained, rel=0.01)
    if name in OLDER:
        assert kept_by("older", lean=False) > 12 * trained + 40_000 * ("LoRA" in name or "bf16" in name)


def test_frozen_weights_of_another_model_are_refused(run, tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny / "model", tmp_path / "base")
    more = (*LORA, "--only_optimize_lora", "--actor_zero_stage", 2, "--actor_model_name_or_path", tmp_path / "base")
    stopped(run, "other", tmp_path, monkeypatch, *more)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as ended:
        run("other", "--reward", f"python:reward_of_{tmp_path.name}:reward", *more)
    assert ended.value.code == 2
    assert "was written with another model than the one loaded now" in capsys.readouterr().err


def test_a_resumed_run_goes_by_the_rates_of_its_flags(run, tmp_path, monkeypatch, capsys):
    """Cosine over 10 updates or more from a new peak, at the old place; beta too, and weight decay."""
    reward = ("--reward", f"python:reward_of_{tmp_path.name}:reward")
    stopped(run, "rates", tmp_path, monkeypatch)
    changed = ("--actor_learning_rate", 1e-6, "--kl_ctl", 0.9, "--lr_scheduler_type", "constant")
    lines = run("rates", *reward, *changed)
    assert "--kl_ctl: 0.1 -> 0.9" in capsys.readouterr().out
    assert [line["policy/kl_coefficient"] for line in lines] == [0.1, 0.9, 0.9]
    assert lines[0]["optimiser/actor_learning_rate"] > 1e-4
    assert [line["optimiser/actor_learning_rate"] for line in lines[1:]] == pytest.approx([1e-6, 1e-6])


def test_what_does_not_fit_a_checkpoint_is_named_before_a_model_is_loaded(run, tmp_path, monkeypatch, capsys):
    reward = ("--reward", f"python:reward_of_{tmp_path.name}:reward")
    stopped(run, "unfit", tmp_path, monkeypatch)
    for more, words in (
        (("--actor_zero_stage", 2), "--actor_zero_stage: 0 -> 2"),
        (("--offload",), "--offload: False -> True"),
        (("--actor_lora_dim", 2, "--actor_lora_module_name", "layers."), "--actor_lora_dim: 0 -> 2"),
        (("--algo", "remax"), "--algo: ppo -> remax"),
        (("--enable_ema",), "--enable_ema: False -> True"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(training, "build", lambda *args: pytest.fail("a model is loaded"))
            with pytest.raises(SystemExit) as ended:
                run("unfit", *reward, *more)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    generators = tmp_path / "unfit" / "checkpoints" / "step-1" / "generators-0.pt"
    generators.write_bytes(generators.read_bytes()[:50])
    with pytest.raises(SystemExit) as ended:
        run("unfit", *reward)
    assert ended.value.code == 2
    assert "step-1 cannot be read" in capsys.readouterr().err


def test_a_reward_function_that_raises_is_named(run, tmp_path, monkeypatch, capsys):
    reward = own_reward(tmp_path, monkeypatch, "raise KeyError('no such word')")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        run("raises", "--reward", reward)
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert f"--reward {reward}: KeyError: 'no such word'" in message
    assert f"reward_of_{tmp_path.name}.py:" in message


def test_other_data_than_before_is_said(run, tiny, tmp_path, monkeypatch, capsys):
    stopped(run, "other", tmp_path, monkeypatch)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((tiny / "data.jsonl").read_text().splitlines(keepends=True)[:50]))
    run("other", "--reward", f"python:reward_of_{tmp_path.name}:reward", "--data_path", fewer)
    assert "the data has changed since this run began" in capsys.readouterr().out


def test_a_disk_that_is_full_for_the_models_costs_no_step(run, tmp_path, monkeypatch, capsys):
    """The last step's checkpoint stands: the same command has only the models to save; once more, nothing at all."""
    save, calls = training.Run.save_models, []

    def full(self, *args):
        def no_space(*args, **kwargs):
            raise OSError(28, "No space left on device")

        calls.append(self.done)
        with monkeypatch.context() as patch:
            patch.setattr(type(self.trainer.models.actor.module), "save_pretrained", no_space)
            save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "save_models", full)
        patch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit) as ended:
            run("models")
    assert (ended.value.code, calls) == (1, [0])
    assert "could not be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "models" / "checkpoints").iterdir()] == ["step-3"]
    assert not (tmp_path / "models" / "results.json").exists()
    lines = run("models")
    shown = capsys.readouterr().out
    assert "continuing from step 3" in shown
    results = json.loads((tmp_path / "models" / "results.json").read_text())
    assert results["reward/per_token"] == lines[-1]["reward/per_token"]
    assert results["steps"] == 3
    before = weights(tmp_path / "models" / "actor")
    written = (tmp_path / "models" / "actor" / "model.safetensors").stat().st_mtime_ns
    run("models")
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "models" / "actor" / "model.safetensors").stat().st_mtime_ns == written
    run("models", "--actor_learning_rate", 1e-2, "--resume", "never")
    after = weights(tmp_path / "models" / "actor")
    assert any(not before[name].equal(after[name]) for name in before), "another command is carried out"


def test_a_checkpoint_at_each_epochs_end_where_no_interval_is_given(run, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training.Run, "save", lambda self, step: saved.append(step))
    run("epochs", "--save_interval", 0, "--num_train_epochs", 2, "--test_stop_step", 9)
    per_epoch = saved[0]
    assert saved[:2] == [per_epoch, min(2 * per_epoch, 9)]
    saved.clear()
    run("default")
    assert saved == [3], "the last step, by default every hundredth too"


def test_a_cut_distribution_has_no_kl_to_itself(run):
    """Rate 0: the policy stays the reference, whatever top-p and top-k cut from what is sampled."""
    cut = ("--top_p", 0.7, "--top_k", 9, "--temperature", 0.9, "--actor_learning_rate", 0.0)
    for more in ((), ("--ppo_epochs", 2), ("--algo", "remax"), ("--eval_interval", 3, "--eval_prompts", 2)):
        lines = run(f"cut{len(more)}{more[-1:]}", *cut, *more)
        measured = [v for line in lines for k, v in line.items() if k.endswith(("policy/kl", "kl_per_token"))]
        assert measured == pytest.approx([0.0] * len(measured), abs=1e-4)
        assert all(0 < line["policy/entropy"] <= math.log(9) + 1e-4 for line in lines if line["step"])


def test_answers_and_metrics_tell_rewards_before_any_scaling(run, tmp_path):
    for name, more in (("ppo", ()), ("remax", ("--algo", "remax", "--gamma", 0.9))):
        lines = run(name, *more, "--reward", "tlcr@0.05", "--scale_rewards", "--save_answers", "--ppo_epochs", 2)
        answers = [json.loads(text) for text in (tmp_path / name / "answers-0.jsonl").read_text().splitlines()]
        for line in lines:
            told = [answer["reward"] for answer in answers if answer["step"] == line["step"]]
            assert line["reward/per_sequence"] == pytest.approx(sum(told) / len(told), abs=1e-5)
            assert abs(line["reward/per_token"]) <= 0.05
            assert line["reward/scale"] > 0


def test_passes_over_a_set_of_rollouts_come_in_another_order(run, monkeypatch):
    orders, update = [], PPO._optimiser_step
    monkeypatch.setattr(
        PPO,
        "_optimiser_step",
        lambda self, batches, *rest: orders.append(id(batches[0])) or update(self, batches, *rest),
    )
    more = ("--per_device_training_batch_size", 1, "--ppo_epochs", 6, "--test_stop_step", 1)
    run("shuffled", *more)
    passes = [orders[begin : begin + 4] for begin in range(0, 24, 4)]
    assert len(orders) == 24
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert len(set(map(tuple, passes))) > 1


@pytest.mark.parametrize("stage", [0, 3])
def test_the_average_of_weights_by_hand(run, tiny, tmp_path, monkeypatch, stage):
    """Decay 0.5 over two updates: a quarter of the first weights, a quarter of the second, half of the last."""
    import step3_ppo_tlcr.ema as ema

    seen = []
    update = ema.WeightAverage.update

    def noting(self):
        with torch.no_grad():
            seen.append({name: self._part(parameter).clone() for name, parameter in self._trained()})
        update(self)

    monkeypatch.setattr(ema.WeightAverage, "update", noting)
    # Two updates of one set of rollouts.
    more = ("--enable_ema", "--ema_decay", 0.5, "--test_stop_step", 1, "--ppo_epochs", 2, "--actor_zero_stage", stage)
    run("ema", *more, "--critic_zero_stage", stage)
    first = AutoModelForCausalLM.from_pretrained(tiny / "model").state_dict()
    averaged, last = weights(tmp_path / "ema" / "actor_ema"), weights(tmp_path / "ema" / "actor")
    assert len(seen) == 2
    for name, start in first.items():
        one, two = (step[name].view(-1)[: start.numel()].view_as(start) for step in seen)
        torch.testing.assert_close(averaged[name], 0.25 * start + 0.25 * one + 0.5 * two, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(last[name], two)


def test_pretraining_text_is_learnt(run, world):
    """With nothing else to learn (no reward, no KL), the loss on the mixed text falls."""
    more = ("--unsupervised_dataset_name", world / "text.txt", "--reward", "random@0", "--kl_ctl", 0.0)
    lines = run("text", *more, "--actor_learning_rate", 1e-2, "--test_stop_step", 5, "--max_grad_norm", 100)
    losses = [line["policy/pretraining_loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.5


# Watching


def test_held_out_prompts_and_the_page_of_samples(run, tmp_path):
    lines = run("watched", "--eval_interval", 2, "--eval_prompts", 2, "--report_to", "tensorboard")
    assert [line["step"] for line in lines if "eval/reward/per_token" in line] == [0, 2, 3]
    assert lines[0]["eval/policy/kl"] == pytest.approx(0.0, abs=1e-4)  # before the first update
    page = (tmp_path / "watched" / "samples.html").read_text()
    for words in ("step 0, greedy", "step 2, sampled", "step 3, sampled", "Human: Tell me of"):
        assert words in page
    assert list((tmp_path / "watched").rglob("events*"))


def test_trackers_that_are_not_there_are_refused(run, capsys):
    for name, words in (("wandbb", "unknown; known: "), ("aim", "not installed")):
        with pytest.raises(SystemExit) as ended:
            run("tracked", "--report_to", name)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


# Models as others read them


def test_models_are_written_as_deepspeed_chat_reads_them(run, tmp_path):
    run("chat", "--save_format", "deepspeed_chat", "--test_stop_step", 1)
    actor = torch.load(tmp_path / "chat" / "actor" / "pytorch_model.bin", weights_only=True)
    critic = torch.load(tmp_path / "chat" / "critic" / "pytorch_model.bin", weights_only=True)
    config = LlamaConfig.from_pretrained(tmp_path / "chat" / "actor")
    model = AutoModelForCausalLM.from_config(config)
    assert set(model.state_dict()) == set(actor)
    assert critic["v_head.weight"].shape == (1, config.hidden_size)
    backbone = {name.removeprefix("rwtransformer.") for name in critic if not name.startswith("v_head.")}
    assert backbone == set(model.model.state_dict())


# Options


@pytest.mark.parametrize(
    ("more", "terms"),
    [
        (("--discriminate_reward", "--uni_discriminator_head", "--sum_to_one_reward"), ["tlcr"]),
        (("--discriminate_reward", "--fixed_reward"), ["tlcr_fixed"]),
        (("--use_positive_reward_only", "--discriminate_reward"), ["tlcr_positive_only"]),
        (("--random_dense_reward", "--discriminate_reward"), ["random"]),
        (("--fixed_reward", "--use_negative_reward_only"), ["tlcr_fixed"]),
        ((), ["auto"]),
    ],
)
def test_rewards_by_the_flags_of_the_fork(more, terms):
    options = step3.parse_args(["--actor_model_name_or_path", "A", "--reward_model_name_or_path", "C", *more])
    assert options.reward_terms == terms
    assert options.critic_model_name_or_path == "C"


def test_a_fixed_reward_of_one_sign_only():
    """In the fork the two flags are one after the other: +-1 first, then one sign of it."""
    parse = ["--actor_model_name_or_path", "A", "--reward_model_name_or_path", "C", "--fixed_reward"]
    assert step3.parse_args([*parse, "--use_negative_reward_only"]).fixed_values == {
        "threshold": 0.6,
        "positive": 0,
        "negative": -1,
    }
    assert step3.parse_args([*parse, "--use_positive_reward_only"]).fixed_values == {
        "threshold": 0.6,
        "positive": 1,
        "negative": 0,
    }
    assert step3.parse_args([*parse, "--fixed_threshold", "0.8"]).fixed_values["threshold"] == 0.8
    assert step3.parse_args([*parse, "--fixed_positive_reward", "3"]).fixed_values == {
        "threshold": 0.6,
        "positive": 3,
        "negative": -1,
    }


def test_training_batches_are_no_larger_than_what_is_generated():
    """As DeepSpeed-Chat's MiniDataset, which cuts each generation batch: a default of 16 is no reason to refuse 4."""
    parse = ["--actor_model_name_or_path", "A", "--reward_model_name_or_path", "C"]
    options = step3.parse_args([*parse, "--per_device_generation_batch_size", "4"])
    check(options)
    assert (options.per_device_training_batch_size, options.micro_batches) == (4, 1)


# What the scripts of the peers for Llama-2 7B pass, in their order.
COMMON = (
    "--data_path D --data_output_path ~/d --data_split 2,4,4 --actor_model_name_or_path A "
    "--per_device_generation_batch_size 1 --per_device_training_batch_size 1 --generation_batches 1 --ppo_epochs 1 "
    "--max_answer_seq_len 256 --max_prompt_seq_len 256 --actor_learning_rate 1e-6 --actor_weight_decay 0.1 "
    "--num_train_epochs 1 --lr_scheduler_type cosine --gradient_accumulation_steps 1 --actor_gradient_checkpointing "
    "--num_warmup_steps 0 --deepspeed --offload --seed 1235 --actor_zero_stage 2 --enable_hybrid_engine "
    "--output_dir O --local_rank=0 --print_answers "
)
FORKS = "--disable_actor_dropout --kl_ctl 0.05 --gamma 0.99 --offload_reference_model --offload_reward_model "
FORKS += "--actor_bf16 --reference_zero_stage 3 --reward_zero_stage 3 --per_device_eval_batch_size 1 --save_answers "
CRITIC = "--critic_model_name_or_path C --critic_learning_rate 1e-6 --critic_weight_decay 0.1 --critic_zero_stage 2 "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            COMMON + CRITIC + "--num_padding_at_beginning 1 --critic_gradient_checkpointing --inference_tp_size 1 "
            "--actor_lora_dim 128 --actor_lora_module_name layers. --only_optimize_lora --actor_dropout 0.0 "
            "--dtype bf16 --enable_ema --align_overflow --unsupervised_dataset_name wikitext --unsup_coef 27.8 "
            "--unsupervised_dataset_config_name wikitext-2-raw-v1 --unpin_actor_parameters --release_inference_cache",
            {"algo": "ppo", "kl_ctl": 0.1, "precision": "bf16", "rollout_name": "hybrid", "unsup_coef": 27.8},
        ),
        (
            "--algo ppo " + COMMON + CRITIC + FORKS + "--critic_bf16 --disable_critic_dropout --penalty full_kl "
            "--lam 0.95 --offload_critic_model --save_model --discriminate_reward --uni_discriminator_head "
            "--sum_to_one_reward",
            {"algo": "ppo", "precision": "bf16", "penalty": "full_kl", "reward_terms": ["tlcr"], "gamma": 0.99},
        ),
        (
            "--algo remax --reward_model_name_or_path C " + COMMON + FORKS + "--reward_bf16 --disable_reward_dropout "
            "--num_padding_at_beginning 0 --enable_tensorboard --save_at_final --target_kl 1.0 --entropy_coef 0.0",
            {"algo": "remax", "critic_model_name_or_path": "C", "kl_ctl": 0.05, "gamma": 0.99, "target_kl": 1.0},
        ),
    ],
)
def test_scripts_of_the_peers_parse_unchanged(line, expected):
    options = step3.parse_args(line.split())
    check(options)
    assert {name: getattr(options, name) for name in expected} == expected


def test_gradients_accumulate_over_several_sets_of_rollouts(run):
    """As in DeepSpeed-Chat's run_1.3b.sh for one GPU: 2 micro-batches an update, 1 in a generation batch."""
    more = ("--per_device_generation_batch_size", 2, "--per_device_training_batch_size", 2, "--test_stop_step", 2)
    accumulated = run("accumulated", *more, "--gradient_accumulation_steps", 2)
    named = run("named", *more, "--gradient_accumulation_steps", 2, "--generation_batches", 2)
    assert without_clock(accumulated) == without_clock(named)
    assert [line["policy/updates"] for line in accumulated] == [1.0, 1.0]


def test_options_that_cannot_work_together_are_refused(run, capsys):
    for more, words in (
        (("--inference_tp_size", 2), "--actor_zero_stage 3"),
        (("--enable_mixed_precision_lora",), "--actor_lora_dim"),
        (("--only_optimize_lora",), "no LoRA to optimise"),
        (("--rollout", "continuous", "--min_answer_seq_len", 2), "no minimum length"),
        (("--rollout", "continuous", "--actor_zero_stage", 3), "--actor_zero_stage 0, 1 or 2"),
        (("--decode_batch_size", 3), "--decode_batch_size 3"),
        (("--unsupervised_dataset_config_name", "x"), "--unsupervised_dataset_name"),
        (("--unsupervised_dataset_name", "/nowhere.txt"), "/nowhere.txt"),
        (("--algo", "remax", "--whiten_advantages"), "--whiten_advantages"),
        (("--max_faults", 0), "--max_faults 0"),
        (("--kl_target", 0), "--kl_target 0"),
        (("--kl_ctl", -0.1), "--kl_ctl -0.1"),
        (("--actor_learning_rate", "nan"), "--actor_learning_rate nan"),
        (("--gamma", 1.1), "--gamma 1.1"),
        (("--max_answer_seq_len", 0), "--max_answer_seq_len 0"),
        (("--print_answers", "--print_answers_interval", 0), "--print_answers_interval 0"),
        (("--num_train_epochs", 0), "--num_train_epochs 0"),
        (("--fixed_reward", "--reward", "tlcr"), "--reward and --fixed_reward"),
        (("--random_dense_reward", "--holistic_reward"), "--random_dense_reward and --holistic_reward"),
        (("--use_positive_reward_only", "--use_negative_reward_only"), "ask for different rewards"),
        (("--reward", "sequence"), "not a sequence reward model"),
        (("--reward", "python:nowhere_at_all:f"), "nowhere_at_all"),
        (("--reward", "python::f"), "expected python:package.module:function"),
        (("--reward", "random@nan"), "'nan' after @ is not a finite number"),
    ):
        with pytest.raises(SystemExit) as ended:
            run("refused", *more)
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_the_same_folder_again_from_the_start(run, tmp_path):
    """--resume never: an older run's checkpoints are not taken for this one's."""
    (tmp_path / "again" / "checkpoints" / "step-7").mkdir(parents=True)
    (tmp_path / "again" / "checkpoints" / "step-7" / "state.json").write_text("{}")
    lines = run("again", "--resume", "never", "--save_interval", 1)
    assert [line["step"] for line in lines] == [1, 2, 3]
