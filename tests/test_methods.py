"""run_method.sh and run_table1.sh: each method's stages, with commands that the stages understand."""

from pathlib import Path

import pytest
from test_scripts import options_of, run

STAGES = {
    "dpo": ["step1_sft", "dpo"],
    "figa": ["step1_sft", "labeling", "figa"],
    "ppo_seq": ["step1_sft", "step2_sequence", "step3_ppo_seq"],
    "ppo_synthetic": ["step1_sft", "labeling", "step2_synthetic", "step3_ppo_synthetic"],
    "remax": ["step1_sft", "step2_sequence", "step3_remax"],
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
