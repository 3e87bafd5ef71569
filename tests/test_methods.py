"""run_method.sh and run_table1.sh: each method's stages, with commands that the stages understand."""

import re
from pathlib import Path

import pytest
from test_plan import recipe
from test_scripts import options_of, run

from training_scripts.planning.preflight import check_labelling

STAGES = {
    "dpo": ["step1_sft", "dpo"],
    "figa": ["step1_sft", "labeling", "figa"],
    "ppo_seq": ["step1_sft", "step2_sequence", "step3_ppo_seq"],
    "ppo_synthetic": ["step1_sft", "labeling", "step2_synthetic", "step3_ppo_synthetic"],
    "remax": ["step1_sft", "step2_sequence", "step3_remax"],
    "abc": ["step1_sft", "step2_sequence", "step3_abc"],
    "drlc": ["step1_sft", "step2_sequence", "step3_drlc"],
    "rlmec": ["step1_sft", "labeling", "step2_grm", "step2_sequence", "step3_rlmec"],
    "fine_grained": ["step1_sft", "labeling", "step2_discriminator", "step2_sequence", "step3_fine_grained"],
    "preference_grounded": ["step1_sft", "step2_token_pairs", "step3_preference_grounded"],
    "ppo_max": ["step1_sft", "step2_sequence", "step3_ppo_max"],
    "tlcr_positive_only": ["step1_sft", "labeling", "step2_discriminator", "step3_tlcr_positive_only"],
}


def planned(output: str) -> dict[str, list[str]]:
    """The words of each planned command, by the name of the folder that it writes."""
    found = {}
    for line in output.replace("\\\n", " ").splitlines():
        words = line.split()
        if "--output_dir" in words and words[0] in ("deepspeed", "python3"):
            found["/".join(Path(words[words.index("--output_dir") + 1]).parts[1:])] = words
    return found


@pytest.fixture(scope="module")
def plans() -> dict[str, str]:
    done = {method: run("run_method.sh", method, "out", PLAN=1) for method in STAGES}
    assert {method: one.returncode for method, one in done.items()} == dict.fromkeys(STAGES, 0)
    return {method: one.stdout for method, one in done.items()}


def options(plans: dict[str, str], method: str, stage: str):
    words = planned(plans[method])[stage]
    program = next(Path(word) for word in words if word.endswith(".py"))
    return options_of(".".join(program.parent.parts), words)


def test_each_method_has_its_stages(plans):
    assert {method: list(planned(plan)) for method, plan in plans.items()} == STAGES


def test_plan_prices_what_a_method_needs(plans):
    assert "Labelling by" not in plans["dpo"]
    assert "Labelling by" in plans["figa"]
    for method, folders in STAGES.items():
        for folder in folders:
            assert folder == "labeling" or f"Memory of {folder} " in plans[method]
    assert "reference" in plans["dpo"].split("Memory of dpo")[1]


def test_settings_of_the_peers(plans):
    """docs/methods.md's table, as the programs' own parsers read the commands."""
    dpo = options(plans, "dpo", "dpo")
    assert (dpo.beta, dpo.learning_rate, dpo.num_train_epochs, dpo.weight_decay) == (0.1, 9.65e-6, 1, 0.1)
    assert (dpo.per_device_train_batch_size, dpo.zero_stage, dpo.offload) == (8, 3, True)
    assert dpo.model_name_or_path == "out/step1_sft"
    figa = options(plans, "figa", "figa")
    assert (figa.added_weight, figa.removed_weight, figa.removed_nll_limit) == (1.0, -0.5, 0.6)
    assert (figa.learning_rate, figa.lr_scheduler_type, figa.num_train_epochs) == (1e-5, "constant", 5)
    assert 8 * figa.per_device_train_batch_size * figa.gradient_accumulation_steps == 128
    assert figa.revisions == ["out/labeling/revisions.jsonl"]


def test_reward_models_and_the_policies_that_use_them(plans):
    for method, pairs in (("ppo_seq", "preferences"), ("ppo_synthetic", "modified")):
        _, *_, reward, policy = STAGES[method]
        assert not options(plans, method, reward).token_level
        assert options(plans, method, reward).pairs == pairs
        assert options(plans, method, policy).reward == ["sequence"]
        assert options(plans, method, policy).critic_model_name_or_path == f"out/{reward}"
    assert options(plans, "ppo_synthetic", "step2_synthetic").revisions == ["out/labeling/revisions.jsonl"]
    remax = options(plans, "remax", "step3_remax")
    assert (remax.algo, remax.gamma, remax.actor_weight_decay, remax.reward) == ("remax", 0.99, 0.1, ["sequence"])
    assert options(plans, "tlcr_positive_only", "step3_tlcr_positive_only").reward == ["tlcr_positive_only"]


def test_the_rewards_of_the_field(plans):
    """docs/rewards.md's: what each policy is rewarded by, and by models that its own stages make."""
    rewards = {
        method: options(plans, method, STAGES[method][-1]) for method in ("abc", "drlc", "rlmec", "fine_grained")
    }
    assert rewards["abc"].reward == ["abc"]
    assert rewards["abc"].critic_model_name_or_path == "out/step2_sequence"
    assert rewards["drlc"].reward == ["sequence", "critic:gpt-6-luna"]
    assert (rewards["drlc"].span_max_cost_usd, rewards["drlc"].span_base_url) == (100, None)
    assert rewards["rlmec"].reward == ["rlmec:out/step2_grm"]
    assert rewards["rlmec"].critic_model_name_or_path == "out/step2_sequence"  # which says what is right
    grm = options(plans, "rlmec", "step2_grm")
    assert (grm.learning_rate, grm.num_train_epochs, grm.revisions) == (2e-5, 3, ["out/labeling/revisions.jsonl"])
    judge, whole = "out/step2_discriminator", "out/step2_sequence"
    expected = [f"segments:{judge}@0.3", f"sentences:{judge}@0.5", f"sequence:{whole}@0.3"]
    assert rewards["fine_grained"].reward == expected
    pairs = options(plans, "preference_grounded", "step2_token_pairs")
    assert (pairs.objective, pairs.aggregate) == ("token_pairs", "avg")
    grounded = options(plans, "preference_grounded", "step3_preference_grounded")
    assert (grounded.reward, grounded.critic_model_name_or_path) == (["token_scores"], "out/step2_token_pairs")
    ppo_max = options(plans, "ppo_max", "step3_ppo_max")
    assert (ppo_max.normalise_rewards, ppo_max.clip_reward_value, ppo_max.top_p) == ("scale", 1e9, 0.9)
    assert (ppo_max.kl_ctl, ppo_max.actor_learning_rate, ppo_max.critic_learning_rate) == (0.01, 5e-7, 1.5e-6)
    assert ppo_max.num_warmup_steps == 100


def test_plan_prices_the_spans_of_every_answer(plans):
    """40 % of 112,052 prompts, an answer to each: 870 + 650 + 310 characters of question, 80 tokens of answer."""
    assert "Spans marked by" not in plans["abc"]
    line = next(line for line in plans["drlc"].splitlines() if line.startswith("Spans marked by gpt-6-luna in step 3"))
    assert "44,821 calls, about 20,505,608 tokens in and 3,585,680 out, US$" in line
    own = run("run_method.sh", "drlc", "out", PLAN=1, LABEL_BASE_URL="http://127.0.0.1:8000/v1", LABEL_MODEL="own:7b")
    assert "Spans marked by own:7b in step 3: 44,821 calls" in own.stdout
    assert "--span_base_url http://127.0.0.1:8000/v1" in own.stdout
    done = run("run_method.sh", "drlc", "out", PLAN=1, LABEL_BASE_URL="http://127.0.0.1:8000/v1")
    assert (done.returncode, "LABEL_MODEL" in done.stderr) == (2, True)


def test_plan_counts_every_reward_model(plans):
    """RLMEC has the rewriter and the judge, Fine-Grained RLHF a discriminator and a sequence reward model."""

    def planned_gib(method: str) -> float:
        rows = plans[method].split(f"Memory of step3_{method} ")[1].splitlines()
        return next(float(row.split()[-1]) for row in rows if row.strip().startswith("reward model"))

    assert planned_gib("rlmec") == planned_gib("fine_grained") == pytest.approx(2 * planned_gib("abc"), abs=0.02)


def test_plan_counts_what_the_rewriter_learns_from(plans):
    """The reward part's 44,821 revisions, each to edit and to leave: 701 batches of 8 x 2 x 8 in each of 3 epochs."""
    assert re.search(r"step2_grm +89,642 +128 +3 +2,103\n", plans["rlmec"])


def test_a_chat_model_that_marks_spans_is_looked_for_before_the_run(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    drlc = recipe(stages="step1 step2_sequence step3", reward="sequence critic:gpt-6-luna@0.5")
    assert drlc.span_model == "gpt-6-luna"
    [problem] = check_labelling(drlc)
    assert "OPENAI_API_KEY" in problem.found
    assert not list(check_labelling(recipe(stages="step1 step2_sequence step3", reward="sequence")))


def test_unknown_method_lists_the_known():
    done = run("run_method.sh", "grpo", PLAN=1)
    assert done.returncode == 2
    assert "known: sft dpo figa" in done.stderr


def test_a_reward_model_of_ones_own_is_not_made_again():
    done = run("run_method.sh", "ppo_seq", "out", PLAN=1, SEQUENCE_MODEL="/my/reward_model")
    assert done.returncode == 0
    assert list(planned(done.stdout)) == ["step1_sft", "step3_ppo_seq"]
    policy = options({"ppo_seq": done.stdout}, "ppo_seq", "step3_ppo_seq")
    assert policy.critic_model_name_or_path == "/my/reward_model"


def test_a_misspelt_method_or_number_stops_before_anything_is_made():
    done = run("run_table1.sh", "out", PLAN=1, METHODS="sft bogus", SEEDS="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert 'no method "bogus"' in done.stderr
    done = run("run_iterated.sh", "out", PLAN=1, ROUNDS="x")
    assert done.returncode == 2
    assert "ROUNDS=x: must be a whole number" in done.stderr


def test_table_pays_for_labels_once():
    more = run("run_table1.sh", "out", PLAN=1, METHODS="sft", MORE_METHODS="rlmec ppo_max", SEEDS="1").stdout
    stages = ["step1_sft", "step2_grm", "step2_sequence", "step3_rlmec", "step3_ppo_max"]
    assert list(planned(more)) == ["labeling", *(f"seed-1/{stage}" for stage in stages)]
    plan = run("run_table1.sh", "out", PLAN=1, METHODS="tlcr", SEEDS="1 2").stdout
    folders = ["labeling", "seed-1/step1_sft", "seed-1/step2_discriminator", "seed-1/step3_ppo_tlcr"]
    assert plan.count("Labelling by") == 1
    assert set(planned(plan)) == {*folders, *(name.replace("-1", "-2") for name in folders[1:])}
    words = planned(plan)["seed-2/step2_discriminator"]
    assert words[words.index("--revisions") + 1] == "out/labeling/revisions.jsonl"
    assert words[words.index("--seed") + 1] == "2"
    assert plan.count("Optimiser steps") == 2, "the labels alone train nothing"
    ablations = run("run_ablations.sh", "out", PLAN=1, SEEDS="1", METHODS="tlcr tlcr_fixed random").stdout
    assert {"seed-1/step3_tlcr_fixed", "seed-1/step3_random"} <= set(planned(ablations))
    for shared in ("step1", "step2"):  # planned, priced and counted once, for all three
        assert ablations.count(f"{shared}: planned above, made once") == 2
    assert ablations.count("Memory of step1_sft ") == 1
    assert ablations.count("Memory of step3_") == 3
