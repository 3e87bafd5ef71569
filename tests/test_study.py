"""The study: artefacts and their order, what is computed from runs, and a whole small one on a foreign world."""

import functools
import gzip
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import external_world
import numpy as np
import pytest
import warm
from conftest import ROOT, launch, patience

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.locking import lock
from testbed.study import parts, schedule
from testbed.study.analysis import band, best_of_curve, interval, paired_difference, score_at_tokens, win_rate
from testbed.study.artefacts import Inverse, Joined, Output, Step, Store, flags, in_order
from testbed.study.main import Study, main
from testbed.study.measure import learning_curve
from testbed.study.methods import (
    METHODS,
    Artefacts,
    Condition,
    Scale,
    Setting,
    World,
    beyond,
    learning_rates,
    penalties,
)
from testbed.study.options import PAPER, SENSITIVITY, Options, chosen_world, known_steps
from testbed.study.pages import at_edge, verdicts, write_study_page
from testbed.study.results import DECODINGS, chosen_settings, comparisons, sensitivity, table, with_equal_tokens
from testbed.study.truth import checked

# ---- artefacts -------------------------------------------------------------------------------------------------------


def test_a_step_is_named_by_what_decides_its_content(tmp_path):
    base = Step("base", "base.py", ("--seed", "1"))
    other = Step("base", "base.py", ("--seed", "2"))
    sft, same, different = (Step("sft", "sft.py", ("--model", Output(step))) for step in (base, base, other))
    assert sft.key == same.key != different.key, "what it is made from counts, wherever that lies"
    assert in_order([sft, different]) == [base, sft, other, different]

    store = Store(tmp_path)
    assert store.arguments(sft) == ["--model", str(store.folder(base)), "--output_dir", str(store.folder(sft))]
    assert not store.is_done(base)
    store.folder(base).mkdir()
    store.mark_done(base, 1.5)
    assert store.is_done(base)
    assert store.seconds(base) == 1.5


def test_arguments_of_several_parts_and_of_another_step_s_result(tmp_path):
    store, judge = Store(tmp_path), Step("judge", "judge.py", ())
    term = Joined(("sequence:", Output(judge), "@", Inverse(judge, "sd", 0.5)))
    step = Step("ppo", "ppo.py", flags(reward=(term, "more"), kl=0.1, quick=True, absent=None, off=False))
    assert step.needs == (judge,)
    folder = store.folder(judge)
    folder.mkdir()
    (folder / "results.json").write_text('{"sd": 4.0}')
    assert store.arguments(step)[:-2] == ["--reward", f"sequence:{folder}@0.125", "more", "--kl", "0.1", "--quick"]
    (folder / "results.json").write_text('{"sd": 0.0}')
    with pytest.raises(InputError, match="nothing can be divided"):
        store.arguments(step)


def in_a_process_of_its_own(test):
    """Forks need as much memory promised as their parent holds, and a worker that has run ZeRO-3 holds tens of GB."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if "FORKING" in os.environ:
            return test(*args, **kwargs)
        os.environ["FORKING"] = "1"
        program = Path(pytest.__file__).with_name("__main__.py")
        launch(program, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"{__file__}::{test.__name__}")

    return run


@in_a_process_of_its_own
def test_a_failed_step_stops_only_what_needs_it_and_nothing_is_made_twice(tmp_path, capsys):
    """Real forks: base, then one step that fails and one that does not; after mending, only the rest runs."""
    stopper = tmp_path / "stop"
    stopper.touch()
    base = Step("base", "study_steps.py", ())
    bad = Step("bad", "study_steps.py", flags(model=Output(base), fails_while=stopper))
    good = Step("good", "study_steps.py", flags(model=Output(base)))
    last = Step("last", "study_steps.py", flags(model=Output(bad)))
    store = Store(tmp_path / "artefacts")

    outcome = schedule.run(store, [last, good], jobs=2, title="test")
    assert outcome.failed == {bad: 3}
    assert (outcome.done, outcome.skipped) == (2, 1)
    assert [store.is_done(step) for step in (base, bad, good, last)] == [True, False, True, False]
    with pytest.raises(InputError, match=r"1 steps failed and 1 could not begin: bad .*study\.log"):
        schedule.require(outcome, store)
    assert "bad ended with status 3: the reason" in capsys.readouterr().out

    (store.folder(bad) / "checkpoint").touch()
    stopper.unlink()
    assert schedule.run(store, [last, good], jobs=2, title="test").done == 4
    assert store.results(last)["--model"] == str(store.folder(bad))
    assert [len(ran(store, step).read_text().splitlines()) for step in (base, bad, good, last)] == [1, 2, 1, 1]
    assert not (store.folder(bad) / "checkpoint").exists(), "half a run's files would be mixed with the next one's"


def ran(store: Store, step: Step) -> Path:
    """Where study_steps.py notes each time that it ran."""
    return store.folder(step).with_name(f"{store.folder(step).name}.ran")


@in_a_process_of_its_own
def test_sigterm_ends_the_running_steps_and_the_next_start_makes_them_anew(tmp_path):
    """This process gets the signal while its first step sleeps."""
    slow, store = Step("slow", "study_steps.py", flags(sleep=60)), Store(tmp_path)
    note = ran(store, slow)

    def terminate_once_it_runs() -> None:
        while not (note.exists() and note.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate_once_it_runs, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        schedule.run(store, [slow], jobs=1, title="test")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text().split()[1]), 0)
    assert not store.is_done(slow)


def test_methods_share_what_they_can_and_see_no_truth():
    made = Artefacts(World(), Scale(), seed=1)
    policies = {name: method(made, Setting()) for name, method in METHODS.items()}
    by_name: dict[str, set[Step]] = {}
    for step in in_order(policy.step for policy in policies.values()):
        by_name.setdefault(step.name, set()).add(step)
        words = step.arguments
        if step.program == "testbed/study/measure.py":
            assert words[words.index("--scorer") + 1] == "none"
        else:
            assert "--scorer" not in words
    assert all(len(steps) == 1 for name, steps in by_name.items() if name != "measured-sft")
    # The one thing that is measured before training is over: the spread of a reward model on SFT's answers.
    for name in ("ppo_seq", "remax", "ppo_synthetic"):
        term = next(argument for argument in policies[name].step.arguments if isinstance(argument, Joined))
        assert [part.name for part in term.parts if isinstance(part, Inverse)] == ["sequence_reward_sd"]


def test_what_knows_the_truth_is_the_world_and_its_reviser_alone():
    """The seed of the testbed's facts, a foreign scorer, a foreign world's files: nothing that trains has them."""
    foreign = World(preferences="/w/pairs.jsonl", revisions="/w/revisions.jsonl", scorer="python:secret:score")
    for world, makers in (
        (World(), {"testbed/main.py", "testbed/study/label.py"}),
        (foreign, {"testbed/study/parts.py", "testbed/study/label.py"}),
    ):
        made = Artefacts(world, Scale(), seed=1)
        steps = in_order(method(made, Setting()).step for method in METHODS.values())
        words = {step: " ".join(map(str, step.arguments)) for step in steps}
        own = {step: " ".join(word for word in step.arguments if isinstance(word, str)) for step in steps}
        assert {step.program for step in steps if "world_seed" in own[step] or "/w/" in own[step]} == makers
        assert not any("secret" in text for text in words.values())


def test_every_rl_method_gets_the_same_prompts_answers_and_updates():
    made = Artefacts(World(), Scale(updates=10, rl_batch=8), seed=1)
    for name in set(METHODS) - {"sft", "dpo", "figa"}:
        words = METHODS[name](made, Setting()).step.arguments
        of = {words[at]: words[at + 1] for at in range(len(words) - 1) if str(words[at]).startswith("--")}
        half = name == "remax"  # two answers to each of half the prompts
        assert of["--per_device_generation_batch_size"] == ("4" if half else "8")
        assert of["--data_path"].path == ("rl_half" if half else "rl")
        assert of["--num_train_epochs"] == "1"


def test_another_condition_changes_what_depends_on_it_and_nothing_else():
    plain, noisy = Artefacts(World(), Scale(), 1), Artefacts(World(), Scale(), 1, Condition(noise=0.25))
    assert plain.discriminator().step.key != noisy.discriminator().step.key
    assert plain.sft().step.key == noisy.sft().step.key
    assert plain.reward_model().step.key == noisy.reward_model().step.key


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_same_for_every_method():
    rates, best = [1e-4, 1e-3], Setting(learning_rate=1e-3)
    assert learning_rates("tlcr", rates, PAPER) == learning_rates("ppo_seq", rates, PAPER)
    assert [(s.learning_rate, s.kl, s.reward_scale) for s in learning_rates("tlcr", rates, PAPER)] == [
        (1e-4, 0.1, 1.0),
        (1e-3, 0.1, 1.0),
    ]
    assert [(s.learning_rate, s.kl, s.reward_scale) for s in penalties("tlcr", [0.01, 0.3], [2.0], best)] == [
        (1e-3, 0.01, 1.0),
        (1e-3, 0.3, 1.0),
        (1e-3, 0.1, 2.0),
    ]
    assert len(penalties("dpo", [0.3], [2.0], best)) == 1
    assert penalties("figa", [0.3], [2.0], best) == []
    assert learning_rates("sft", rates, PAPER) == [PAPER]


def test_settings_are_chosen_by_validation_score_once_at_the_papers_kl_and_once_of_all():
    def trial(rate, kl, score):
        return {
            "method": "tlcr",
            "setting": {"learning_rate": rate, "kl": kl, "reward_scale": 1.0},
            "true_score": score,
        }

    found = chosen_settings([trial(1e-4, 0.1, 4.0), trial(1e-3, 0.1, 5.0), trial(1e-4, 0.3, 6.0)], PAPER)["tlcr"]
    assert found["paper"]["learning_rate"] == 1e-3
    assert found["best"]["kl"] == 0.3


def test_ablations_without_a_grid_of_their_own_take_tlcr_s_settings(tmp_path):
    options = Options(output_dir=str(tmp_path), learning_rates=[1e-4, 1e-3, 3e-3], kls=[0.3])
    study = Study(options, World(), Scale(), ["random", "tlcr", "ppo_seq"], [1], Store(tmp_path))
    scores = iter((5.0, 6.0, 4.0, 7.0, 6.5))
    known = study.store.known
    for _ in range(2):  # the second round's trials are there once the first's are known
        for method, _, measured in study.trials():
            if method == "tlcr" and measured.key not in known:
                results = {"true_score": next(scores), "response_length": 20.0, "kl": 3.0}
                known[measured.key] = {"seconds": 1.0, "results": results}
    found = study.settings()
    assert found["tlcr"] == {"paper": Setting(learning_rate=1e-3), "best": Setting(learning_rate=1e-3, kl=0.3)}
    assert found["random"] == {"paper": Setting(learning_rate=1e-3)}
    assert found["ppo_seq"] == {"paper": PAPER}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["tlcr", "ppo"]}, "--methods ppo: unknown; known are sft, dpo"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [0, 1]}, "must not be reported on it"),
        ({"scale": ["pears=3"]}, "--scale pears=3: unknown; known are pairs"),
        ({"scale": ["pairs=many"]}, "'many' is not a number"),
        ({"scale": ["updates=0"]}, "must be above 0"),
        ({"preferences": "pairs.jsonl"}, "also needs --revisions, --scorer"),
        ({"scorer": "python:no_such_module:score"}, "No module named 'no_such_module'"),
        ({"scorer": "score"}, "expected python:package.module:function"),
        ({"scorer": "python:math:pi"}, "not a callable object; expected a function of prompt, response, ended"),
        ({"scorer": "python:math:sqrt"}, "too many positional arguments; expected a function of prompt"),
        (
            {"preferences": "absent.jsonl", "revisions": "r.jsonl", "scorer": "python:external_world:score"},
            "absent.jsonl: no such file or folder",
        ),
    ],
)
def test_bad_choices_are_named(options, message, capsys):
    arguments = [word for name, value in options.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]
    with pytest.raises(SystemExit) as stop:
        main(["--output_dir", "out", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def fails(prompt: str, response: str, ended: bool) -> float:
    raise KeyError(prompt)


def test_another_world_is_read_before_anything_is_trained(tmp_path):
    pairs, revisions = external_world.write(tmp_path, 20)
    given = {"preferences": str(pairs), "revisions": str(revisions), "scorer": "python:external_world:score"}
    options = Options(output_dir=str(tmp_path / "out"), **given)
    world = chosen_world(options)
    assert replace(world, files="", truth="") == World(**given)
    assert world.files
    assert world.truth
    with pytest.raises(InputError, match=r"--scorer python:test_study:fails, prompt .*: KeyError: "):
        chosen_world(replace(options, scorer="python:test_study:fails"))
    for path, key in ((revisions, "modified"), (pairs, "chosen")):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], lines[2].replace(f'"{key}"', '"other"'), *lines[3:]]))
        with pytest.raises(InputError, match=rf"{path.name}:3: no '{key}'"):
            chosen_world(options)
        path.write_text("\n".join(lines))


def test_sensitivity_varies_one_thing_at_a_time(tmp_path):
    options = Options(output_dir=str(tmp_path), seeds=[1])
    study = Study(options, World(), Scale(), ["tlcr", "tlcr_fixed"], [1], Store(tmp_path))
    standard = {"setting": PAPER, "condition": Condition()}
    runs = study.sensitivity_runs()
    for run in runs:
        changed = [
            f"{part}.{field}"
            for part, value in standard.items()
            for field in vars(value)
            if getattr(getattr(run, part), field) != getattr(value, field)
        ]
        assert len(changed) <= 1, (run.variant, changed)
    # Each question's standard level is the study's own run, which is not made twice.
    own = study.runs()[0].policy.step
    assert sum(run.policy.step == own for run in runs) == len(SENSITIVITY)


def test_an_edited_file_is_another_world(tmp_path):
    pairs, revisions = external_world.write(tmp_path, 20)
    given = {"preferences": str(pairs), "revisions": str(revisions), "scorer": "python:external_world:score"}
    options = Options(output_dir=str(tmp_path / "out"), **given)
    before = Artefacts(chosen_world(options), Scale(), seed=1)
    assert Artefacts(chosen_world(options), Scale(), seed=1).discriminator() == before.discriminator()
    pairs.write_text(pairs.read_text().replace("lovely", "lively"))
    after = Artefacts(chosen_world(options), Scale(), seed=1)
    assert after.sft().step.key != before.sft().step.key
    scorer = replace(chosen_world(options), truth="another")
    assert Artefacts(scorer, Scale(), seed=1).sft().step.key == after.sft().step.key
    assert Artefacts(scorer, Scale(), seed=1).measured(after.sft()).key != after.measured(after.sft()).key


def test_another_world_holds_the_same_prompts_out_for_every_seed(tmp_path):
    """Else one seed's test prompts would be another's training prompts, and the grid's."""
    pairs, _ = external_world.write(tmp_path, 120)
    held_out, trained = [], []
    for seed in (0, 1, 2):
        folder = tmp_path / str(seed)
        sizes = ("--validation", "4", "--test", "6", "--data_seed", str(seed), "--fixed_held_out")
        parts.main(["--preferences", str(pairs), "--output_dir", str(folder), *sizes])
        held_out.append([(folder / name).read_text() for name in ("validation.jsonl", "test.jsonl")])
        trained.append({line for part in ("sft", "reward", "rl") for line in prompts_of(folder / part / "train.jsonl")})
    validation, test = ({json.loads(line)["prompt"] for line in text.splitlines()} for text in held_out[0])
    assert held_out[0] == held_out[1] == held_out[2]
    assert (len(validation), len(test)) == (4, 6)
    assert not validation & test
    assert not any(one & (validation | test) for one in trained)
    assert trained[0] != trained[1]


def prompts_of(file) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_a_score_that_is_no_number_is_named_and_nothing_is_marked_done(capsys):
    scored = checked(lambda prompt, response, ended: math.nan if response == "bad" else 1, "python:a:b")
    assert scored("p", "good", True) == 1.0
    with pytest.raises(InputError, match=r"--scorer python:a:b, prompt 'p', response 'bad', ended False: nan"):
        scored("p", "bad", False)


def test_a_killed_study_leaves_no_step_running_and_two_do_not_share_a_folder(tmp_path):
    """The parent of a sleeping step is killed outright; a second study in a folder that is taken says so."""
    slow, store = Step("slow", "study_steps.py", flags(sleep=60)), Store(tmp_path)
    script = tmp_path / "sleeping_study.py"
    code = "import sys; import test_study as t; "
    code += "t.schedule.run(t.Store(sys.argv[1]), [t.Step('slow', 'study_steps.py', t.flags(sleep=60))], 1, 'test')"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    study = warm.Program(script, [tmp_path], environment)
    note = ran(store, slow)
    deadline = time.monotonic() + patience(120)
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(note.read_text().split()[1])
    study.kill()
    study.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    taken = lock(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--output_dir", str(tmp_path), "--quick", "--stage", "report"])
    assert ended.value.code == 2
    taken.close()


# ---- what the runs say -----------------------------------------------------------------------------------------------


def test_differences_and_their_intervals_by_hand():
    """Means 1 and 3 over seeds: 2 ± t(1) * sqrt(2) / sqrt(2) = 2 ± 12.706."""
    found = paired_difference({1: [2.0, 2.0], 2: [3.0, 5.0]}, {1: [1.0, 1.0], 2: [1.0, 1.0], 9: [0.0]})
    assert found["difference"] == 2
    assert (found["unit"], found["count"]) == ("seed", 2)
    assert found["low"] == pytest.approx(2 - 12.706, abs=1e-3)
    assert found["high"] == pytest.approx(2 + 12.706, abs=1e-3)
    one_seed = paired_difference({1: [2.0, 3.0, 4.0]}, {1: [1.0, 1.0, 1.0]})
    assert (one_seed["difference"], one_seed["unit"]) == (2, "prompt")
    assert one_seed["low"] == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3)
    assert paired_difference({1: [1.0]}, {2: [1.0]}) is None
    assert interval([1.0]) is None
    assert interval([1.0, 1.0]) == (1.0, 1.0)


def test_the_rate_beyond_the_end_that_the_best_is_at():
    rates = [1e-4, 3e-4, 1e-3]
    assert [beyond(rates, best) for best in rates] == [3e-5, None, 3e-3]
    assert beyond([3e-5, 1e-4], 3e-5) == 1e-5
    assert beyond([1e-3, 3e-3], 3e-3) == 1e-2
    assert beyond([2e-4, 5e-4], 5e-4) == 1e-3
    assert beyond([1e-4], 1e-4) is None


def test_a_grid_grows_until_a_method_s_best_rate_lies_inside(tmp_path):
    """The smaller the rate the better, down to 1e-5: three rates more are tried, then penalties at the best two."""
    options = Options(output_dir=str(tmp_path), learning_rates=[1e-4, 1e-3], kls=[0.3])
    study = Study(options, World(), Scale(), ["tlcr"], [1], Store(tmp_path))
    tried = []
    while fresh := [trial for trial in study.trials() if not study.store.is_known(trial[2])]:
        for _, setting, measured in fresh:
            tried.append((setting.learning_rate, setting.kl))
            score = -abs(math.log10(setting.learning_rate) + 5)
            results = {"true_score": score, "response_length": 1.0, "kl": 0.0}
            study.store.known[measured.key] = {"seconds": 1.0, "results": results}
    assert tried == [(1e-4, 0.1), (1e-3, 0.1), (3e-5, 0.1), (1e-5, 0.1), (3e-6, 0.1), (1e-5, 0.3), (3e-5, 0.3)]
    assert study.settings()["tlcr"]["paper"].learning_rate == 1e-5


def test_settings_at_the_edge_of_what_was_tried():
    tried = [{"learning_rate": rate, "kl": 0.1, "reward_scale": 1.0} for rate in (1e-4, 3e-4, 1e-3)]
    tried.append({"learning_rate": 3e-4, "kl": 0.3, "reward_scale": 1.0})
    assert at_edge(tried[0], tried) == "learning rate: smallest, KL coefficient: smallest"
    assert at_edge(tried[1] | {"kl": 0.2}, tried) == ""
    assert at_edge(tried[3], tried) == "KL coefficient: largest"
    assert at_edge(tried[0], []) == ""


def test_win_rates_bands_and_best_of_curve_by_hand():
    assert win_rate({1: [1, 2], 2: [5, 5]}, {1: [0, 3], 2: [5, 4]}) == (1 + 0 + 0.5 + 1) / 4
    assert win_rate({1: [1]}, {2: [1]}) is None
    means, lows, highs = band([[1.0, None, 3.0], [3.0, 5.0]])
    assert means == [2.0, 5.0, 3.0]
    assert lows == pytest.approx([2 - math.sqrt(2), 5, 3])
    assert highs == pytest.approx([2 + math.sqrt(2), 5, 3])
    assert best_of_curve([0.0, 1.0, 5.0, 3.0, 0.0], window=2) == 4.0
    assert best_of_curve([2.0], window=5) == 2.0


def test_scores_at_equal_tokens_by_hand():
    assert score_at_tokens([1.0, 2.0, 4.0], [10, 10, 10], budget=25, window=1) == 2.0
    assert score_at_tokens([1.0, 2.0, 4.0], [10, 10, 10], budget=30, window=2) == 3.0
    assert score_at_tokens([1.0], [10], budget=9) is None

    def run(method: str, tokens: list[int], scores: list[float]) -> dict:
        curve = {"generated_tokens": tokens, "true_score": scores}
        return {"method": method, "variant": "paper", "seed": 1, "generated_tokens": sum(tokens), "curve": curve}

    sft = {"method": "sft", "variant": "paper", "seed": 1}
    runs = [
        sft,
        run("tlcr", [20, 20, 20], [1.0, 2.0, 9.0]),
        run("ppo_seq", [10, 10, 20], [1.0, 1.0, 1.0]),
        run("tlcr_negative_only", [1, 1, 1], [3.0, 3.0, 3.0]),
    ]
    # ppo_seq generates 40 tokens, which TLCR has after two updates; negative-only's 3 do not count.
    assert [one.get("true_score_at_equal_tokens") for one in with_equal_tokens(runs)] == [None, 1.5, 1.0, 3.0]


def test_learning_curve_takes_the_sampled_answers_of_remax(tmp_path):
    """Two scored sets an update, the greedy ones second."""
    lines = [{"step": step, "rollout/response_length": 5.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [[{"prompt": "", "response": text, "ended": True}] for text in ("a", "aaaa", "aa", "aaaa")]
    calls = [{"tokens": 3, "texts": text} for text in texts]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    curve = learning_curve(tmp_path, lambda prompt, response, ended: float(len(response)))
    assert curve["true_score"] == [1.0, 2.0]
    assert curve["generated_tokens"] == [6, 6]
    assert curve["response_length"] == [5.0, 5.0]


def test_sensitivity_is_paired_with_the_standard_level_by_hand():
    """Differences 1 and 3 over seeds: 2 ± 12.706; a level of one seed has no interval over seeds."""

    def varied(level: str, seed: int, score: float) -> dict:
        return run_of("tlcr", seed, score) | {"variant": f"noise: {level}"}

    runs = [varied("3%", 1, 4.0), varied("3%", 2, 5.0), varied("25%", 1, 5.0), varied("25%", 2, 8.0)]
    found = sensitivity(runs, "noise", {"3%": "tlcr", "25%": "tlcr", "99%": "tlcr"}, "3%")
    assert found["3%"]["difference"]["difference"] == 0
    assert found["25%"]["difference"]["difference"] == 2
    assert found["25%"]["difference"]["high"] == pytest.approx(2 + 12.706, abs=1e-3)
    assert found["25%"]["true_score T=1"]["mean"] == 6.5
    assert found["99%"] is None


# ---- the page ----


def run_of(method: str, seed: int, score: float) -> dict:
    """One finished run as it stands in results.json, two test prompts and two updates."""
    decodings = {name: {"true_score": score, "scores": [score, score]} for name in DECODINGS}
    curve = {"true_score": [1.0, score], "response_length": [9.0, 8.0], "kl": [0.0, 1.0], "perplexity": [2.0, 2.0]}
    told = {"response_length": 8.0, "eos_rate": 1.0, "kl": 1.5, "seconds": 20.0, "generated_tokens": 41234}
    told |= {"best_true_score_in_training": 6.5, "last_true_score_in_training": 6.25}
    return {"method": method, "variant": "paper", "seed": seed, "decodings": decodings, "curve": curve, **told}


def test_the_page_shows_what_was_measured_and_names_what_was_not(tmp_path):
    methods = ["sft", "ppo_seq", "tlcr", "tlcr_positive_only", "dpo"]
    runs = [run_of(method, seed, 3.0 + at + seed) for at, method in enumerate(methods[:4]) for seed in (1, 2)]
    paired = {"difference": -1.25, "low": -2.0, "high": -0.5, "unit": "seed", "count": 2}
    levels = {"1/4": None, "all": table(runs, ["tlcr"], "paper")["tlcr"] | {"difference": paired}}
    results = {
        "world": {"scorer": "python:a:b", "seeds": [1, 2]},
        "scale": {"pairs": 100},
        "settings": {method: {"paper": vars(PAPER)} for method in methods},
        "grid": {"seed": 0, "of": 7, "trials": []},
        "judges": [],
        "tables": {"paper": table(runs, methods, "paper")},
        "comparisons": {"paper": comparisons(runs, methods, "paper")},
        "sensitivity": {"labelled pairs": levels, "neutral weight": levels | {"1/4": levels["all"]}},
        "runs": runs,
    }
    gaps = {"greedy": {"difference": -0.5, "low": -0.8, "high": -0.2, "unit": "seed"}}
    gaps["T=1"] = {"difference": 1.0, "low": 0.5, "high": 1.5, "unit": "seed"}
    text = write_study_page(tmp_path / "study.html", results).read_text().replace("\N{NO-BREAK SPACE}", " ")
    for part in ("5.50 ± 0.71", "6.50 ± 0.00", "6.25 ± 0.00", "41,234 ± 0", "+1.00 [+1.00, +1.00]"):
        assert f"<td>{part}</td>" in text  # score of PPO_seq, best, last, tokens, TLCR - PPO_seq
    for title in ("Table 1: KL to SFT", "Figure 7: response length", "Figure 6: sequence reward", "against KL to SFT"):
        assert title in text
    assert "Figure 7, not run: negative only." in text
    assert "Controls: " not in text
    assert "Controls, not run: released code, random reward." in text
    assert "No finished run: DPO." in text
    assert "Not run (--stage sensitivity): labelled pairs." in text
    assert "Neutral weight" in text
    assert "How this was made" in text
    sentence = verdicts({"paper": {name: {"differences": {"tlcr - sft": gap}} for name, gap in gaps.items()}})
    assert sentence[0].endswith(
        "greedy TLCR measures lower than SFT in true score. TLCR − SFT: −0.50 [−0.80, −0.20] greedy; "
        "+1.00 [+0.50, +1.50] T=1 (95 % intervals over seeds).</p>"
    )
    assert ">neutral weight: 1/4</th><td>6.50 ± 0.71</td><td>−1.25 [−2.00, −0.50]</td>" in text


# ---- a whole one -----------------------------------------------------------------------------------------------------


def test_two_methods_on_a_world_that_the_project_does_not_know(tmp_path, monkeypatch):
    """Pairs, revisions and a scorer from outside: base model, SFT, discriminator, PPO, measures, page; then nothing
    is left to do."""
    pairs, revisions = external_world.write(tmp_path, 160)
    sizes = {"sft_epochs": 1, "judge_epochs": 1, "rl_batch": 8, "updates": 2, "max_answer": 24, "hidden_size": 32}
    sizes |= {"layers": 1, "validation": 3, "test": 5, "sft_batch": 8, "judge_batch": 8}
    command = [
        *("--output_dir", str(tmp_path / "out")),
        *("--methods", "sft", "tlcr", "--seeds", "1", "--preferences", str(pairs), "--revisions", str(revisions)),
        *("--scorer", "python:external_world:score", "--scale", *(f"{name}={size}" for name, size in sizes.items())),
    ]
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.chdir(tmp_path)
    launch("testbed/study/main.py", *command)

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = found["tables"]["paper"]
    assert set(rows) == {"sft", "tlcr"}
    runs = {run["method"]: run for run in found["runs"] if run["variant"] == "paper"}
    for run in runs.values():
        scores = run["decodings"]["T=1"]["scores"]
        assert len(scores) == 5
        assert all(score == int(score) for score in scores), "the scorer's own whole numbers"
        assert rows[run["method"]]["true_score T=1"]["mean"] == pytest.approx(sum(scores) / 5)
    assert len(runs["tlcr"]["curve"]["true_score"]) == 2
    assert runs["sft"]["kl"] == 0
    assert found["comparisons"]["paper"]["T=1"]["differences"]["tlcr - sft"]["unit"] == "prompt"
    assert "reviser noise" not in found["sensitivity"], "its revisions are given"
    assert "reviser_noise" not in found["world"]
    assert "<html" in (tmp_path / "out" / "study.html").read_text()[:200]

    plan = launch("testbed/study/main.py", *command, "--plan")
    assert {line.split()[0] for line in plan.stdout.splitlines()} == {"done"}

    # Elsewhere, with nothing but what is known of it: nothing is to be made, and the same comes out.
    command[command.index("--output_dir") + 1] = str(tmp_path / "there")
    packed = tmp_path / "known.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "out" / "known.json").read_bytes()))
    command += ["--known", str(packed)]
    launch("testbed/study/main.py", *command)
    assert json.loads((tmp_path / "there" / "results.json").read_text()) == found
    assert not list((tmp_path / "there").glob("artefacts/*"))
    command[-1] = str(pairs)
    wrong = launch("testbed/study/main.py", *command, check=False)
    assert "not a known.json" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    packed.write_bytes(packed.read_bytes()[:99])
    with pytest.raises(InputError, match=r"not a known\.json"):
        known_steps([str(packed)])
