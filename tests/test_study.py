"""The study: artefacts and their order, what is registered, what is computed from runs, and a whole small one."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import external_world
import pytest
import torch
import warm
from conftest import ROOT, launch, patience

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.locking import lock
from step3_ppo_tlcr.experience import Rollout
from testbed.study import parts, schedule
from testbed.study.artefacts import Inverse, Joined, Output, Step, Store, flags, in_order
from testbed.study.main import Study, main
from testbed.study.measure import learning_curve
from testbed.study.methods import Artefacts, World
from testbed.study.options import Options, chosen_world
from testbed.study.pages import verdicts, write_study_page
from testbed.study.registration import REGISTRATION, Scale, Setting, read
from testbed.study.results import at_equal_tokens, collapses, decide, gaps, with_gaps
from testbed.study.sharpen import fitted, loss
from testbed.study.truth import checked, true_reward

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


REGISTERED = read()


def every_policy(made: Artefacts) -> dict[str, Output]:
    return {name: made.policy(method, Setting()) for name, method in REGISTERED.methods.items()}


def flags_of(step: Step) -> dict[str, object]:
    words = step.arguments
    return {words[at]: words[at + 1] for at in range(len(words) - 1) if str(words[at]).startswith("--")}


def test_methods_share_what_they_can_and_see_no_truth():
    """But for the one that learns from it, by whose name it is known."""
    policies = every_policy(Artefacts(World(), Scale(), seed=1))
    del policies["ppo_true"]
    by_name: dict[str, set[Step]] = {}
    for step in in_order(policy.step for policy in policies.values()):
        by_name.setdefault(step.name, set()).add(step)
        assert "--scorer" not in step.arguments
        assert not step.variables
        assert "truth" not in " ".join(map(str, step.arguments))
    for name in ("data", "parts", "base", "sft", "reward_model", "synthetic_reward_model"):
        assert len(by_name[name]) == 1, name


def test_what_knows_the_truth_is_the_world_its_reviser_and_who_is_to_know_it():
    """The seed of the testbed's facts, a foreign scorer, a foreign world's files: nothing else that trains has them."""
    foreign = World(preferences="/w/pairs.jsonl", revisions="/w/revisions.jsonl", scorer="python:secret:score")
    for world, makers in (
        (World(), {"testbed/main.py", "testbed/study/label.py"}),
        (foreign, {"testbed/study/parts.py", "testbed/study/label.py"}),
    ):
        policies = every_policy(Artefacts(world, Scale(), seed=1))
        del policies["ppo_true"], policies["iterated"]  # whose own answers a foreign world has no reviser for
        steps = in_order(policy.step for policy in policies.values())
        words = {step: " ".join(map(str, step.arguments)) for step in steps}
        own = {step: " ".join(word for word in step.arguments if isinstance(word, str)) for step in steps}
        assert {step.program for step in steps if "world_seed" in own[step] or "/w/" in own[step]} == makers
        assert not any("secret" in text for text in words.values())
    truth = every_policy(Artefacts(World(), Scale(), seed=7))["ppo_true"].step
    assert dict(truth.variables)["TESTBED_WORLD_SEED"] == "7"


def test_every_method_learns_from_as_many_answers_in_as_many_steps():
    """4096 pairs of the reward part in batches of 32 are 128 steps on 8192 answers; 4096 prompts of the RL part, twice,
    in batches of 64, too; ReMax writes two answers to each of half the prompts. All critics start alike."""
    scale = REGISTERED.scale
    made = Artefacts(World(), scale, seed=1)
    policies = every_policy(made)
    assert scale.pairs * 4 // 10 == 4096
    for name, policy in policies.items():
        method, of = REGISTERED.methods[name], flags_of(policy.step)
        if method.algo in ("ppo", "remax"):
            half = method.algo == "remax"
            assert of["--data_path"].path == ("rl_half" if half else "rl")
            batch, epochs = int(of["--per_device_generation_batch_size"]), int(of["--num_train_epochs"])
            assert 4096 // (2 if half else 1) // batch * epochs == 128 * method.epochs
            assert batch * (2 if half else 1) == 64
            assert of["--critic_model_name_or_path"] == made.sft()
        elif method.algo in ("dpo", "figa"):
            assert 4096 // int(of["--per_device_train_batch_size"]) * int(of["--num_train_epochs"]) == 128


def test_every_reward_has_a_unit_of_its_own_and_noise_is_told_in_it():
    made = Artefacts(World(), Scale(), seed=1)
    for name, policy in every_policy(made).items():
        method = REGISTERED.methods[name]
        if method.algo not in ("ppo", "remax"):
            continue
        terms = [argument for argument in policy.step.arguments if isinstance(argument, Joined)]
        units = [part for term in terms for part in term.parts if isinstance(part, Inverse)]
        assert [unit.factor for unit in units] == [1.0, *([method.noise] if method.noise else [])]
        asked = flags_of(units[0].step)
        assert asked["--reward"] == (method.reward or "truth")
        assert asked.get("--fixed_threshold") == (str(t) if (t := method.options.get("fixed_threshold")) else None)


def test_own_answers_are_revised_and_learnt_from_beside_the_first_labels():
    step = every_policy(Artefacts(World(), Scale(), seed=1))["iterated"].step
    judge = next(one for one in in_order([step]) if one.name == "discriminator" and len(one.needs) > 3)
    learnt = [one for one in judge.needs if one.name == "revisions"]
    assert len(learnt) == 2
    assert [need.name for need in in_order(learnt) if need.name == "own_answers"] == ["own_answers"]


def test_another_sharpness_changes_what_depends_on_it_and_nothing_else():
    made, methods = Artefacts(World(), Scale(), 1), REGISTERED.methods
    plain, soft, fit = (made.discriminator(methods[name]).step for name in ("tlcr", "tempered", "calibrated"))
    assert (plain.name, soft.name, fit.name) == ("discriminator", "sharpened", "sharpened")
    assert plain in soft.needs
    assert flags_of(soft)["--factor"] == "0.5"
    assert "--factor" not in flags_of(fit)


def test_the_factor_that_calibrates_by_hand():
    """Half of the tokens have logit 2 and are positive in 3 of 4: log 3 fits them, so a factor of log(3) / 2."""
    logits, targets = torch.tensor([2.0, 2, 2, 2, -2, -2, -2, -2]).numpy(), [1, 1, 1, 0, 0, 0, 0, 1]
    assert fitted(logits, torch.tensor(targets).numpy()) == pytest.approx(math.log(3) / 2, rel=1e-3)
    assert loss(1.0, logits[:1], torch.tensor([0.5]).numpy()) == pytest.approx(math.log(1 + math.exp(2)) - 1)


def test_the_true_score_as_reward_stands_on_the_last_action(monkeypatch):
    """A tokenizer of letters; the score is the response's length, less ten where it was cut off."""

    class Letters:
        eos_token_id, eos_token, all_special_ids = 0, "", [0]

        def decode(self, ids, **_):
            return "".join("?abcdefg"[i] for i in ids if i)

    monkeypatch.setenv("TLCR_STUDY_SCORER", "python:test_study:length_of")
    monkeypatch.setattr("testbed.study.truth.end_ids", lambda tokenizer: (0,))
    ids = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]])
    rollout = Rollout(ids, torch.ones_like(ids), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    assert true_reward(rollout, Letters()).tolist() == [[0, 2 - 10, 0], [0, 0, 3 - 10]]
    ended = replace(rollout, action_mask=torch.ones(2, 3, dtype=torch.long))
    assert true_reward(ended, Letters()).tolist() == [[0, 0, 2], [0, 0, 3 - 10]]


def length_of(prompt: str, response: str, ended: bool) -> float:
    assert prompt == "a"
    return len(response) - 10 * (not ended)


# ---- what is registered ----------------------------------------------------------------------------------------------


def registered(tmp_path: Path, **changes: object) -> Path:
    told = json.loads(REGISTRATION.read_text())
    for path, value in changes.items():
        *way, last = path.split("__")
        place = told
        for name in way:
            place = place[name]
        place[last] = value
    file = tmp_path / "registration.json"
    file.write_text(json.dumps(told))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods__tlcr__algo": "grpo"}, r"methods.tlcr.algo: 'grpo'; known are sft, dpo, figa, ppo, remax"),
        ({"methods__tlcr__lr": 1}, "methods.tlcr: got an unexpected keyword argument 'lr'"),
        ({"methods__tlcr": {"title": "x"}}, "methods.tlcr: missing 1 required keyword-only argument: 'algo'"),
        ({"scale__pears": 3}, "scale: got an unexpected keyword argument 'pears'"),
        ({"seeds__results": [101, 2]}, r"no result: \{101\}"),
        ({"seeds__results": [2, 2]}, "twice the same"),
        ({"stages__main__methods": ["grpo"]}, "no method is called grpo"),
        ({"methods__random__like": "noisy"}, "random is like a method that has no settings of its own"),
        ({"rules": None, "seeds": None}, "not a registration"),
    ],
)
def test_a_registration_that_is_wrong_is_named(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(registered(tmp_path, **changes))


def study_of(tmp_path: Path, registration: Path = REGISTRATION) -> Study:
    return Study(read(registration), World(), Store(tmp_path / "artefacts"), tmp_path)


def finished(study: Study, steps: list[Step], **results: object) -> None:
    """As if they had run."""
    for step in steps:
        if not study.store.is_done(step):
            study.store.folder(step).mkdir(parents=True)
            (study.store.folder(step) / "results.json").write_text(json.dumps(results))
            (study.store.folder(step) / "done.json").write_text("{}")


def test_the_grid_grows_as_it_is_finished_and_its_choice_is_frozen(tmp_path):
    """Two rates, one more coefficient, one finalist on three worlds. The best reward model is the second; of the rates
    the larger; of the coefficients the new one. A registration that changes afterwards is refused."""
    grid = {"learning_rates": [1e-4, 1e-3], "kls": [0.3], "finalists": 1}
    study = study_of(tmp_path, registered(tmp_path, grid=grid))
    for at, (_, steps) in enumerate(study.reward_model_trials()):
        assert study.chosen_reward_model() is None
        finished(study, steps, **{"eval/pair_accuracy": 0.9 if at == 1 else 0.8})
    model = study.chosen_reward_model()
    assert model == study.registration.reward_models[1]

    def settings(name: str) -> list[tuple[float, float, int]]:
        return [(s.learning_rate, s.kl, len(steps)) for s, steps in study.method_trials(name, model)[0].items()]

    assert settings("tlcr") == [(1e-4, 0.1, 1), (1e-3, 0.1, 1)]
    assert len(study.grid_steps()) == 3 * 5 + 2 * len(study.registration.tuned)
    while left := [step for step in study.grid_steps() if not study.store.is_done(step)]:
        study.freeze()
        assert not study.frozen_file.exists()
        for name in study.registration.tuned:
            for setting, steps in study.method_trials(name, model)[0].items():
                score = setting.learning_rate * 1000 + setting.kl
                finished(study, [step for step in steps if step in left], validation={"1": 0.0, "0.5": score})
    assert settings("tlcr") == [(1e-4, 0.1, 1), (1e-3, 0.1, 1), (1e-3, 0.3, 3)]
    assert settings("figa") == [(1e-4, 0.1, 1), (1e-3, 0.1, 3)], "it has no penalty"
    study.freeze()
    assert study.frozen["settings"]["tlcr"] == {"learning_rate": 1e-3, "kl": 0.3}
    assert study.setting("fixed_08") == Setting(learning_rate=1e-3, kl=0.3), "like TLCR"
    assert flags_of(study.measured("tlcr_long", 11)[0])["--num_train_epochs"] == "8"
    assert flags_of(study.measured("long_kl", 11)[0])["--kl_ctl"] == "0.9"
    shutil.rmtree(study.store.root)
    before = study.frozen_file.read_text()
    study.freeze()
    assert study.frozen_file.read_text() == before, "once, whatever is there later"
    changed = study_of(tmp_path, registered(tmp_path, grid=grid, rules__alpha=0.1))
    with pytest.raises(InputError, match="settings were frozen for another registration"):
        _ = changed.frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registration": "absent.json"}, "absent.json: cannot be read"),
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
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
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
    world = chosen_world(options, 2)
    assert replace(world, files="", truth="") == World(**given)
    assert world.files
    assert world.truth
    with pytest.raises(InputError, match=r"--scorer python:test_study:fails, prompt .*: KeyError: "):
        chosen_world(replace(options, scorer="python:test_study:fails"), 2)
    for path, key in ((revisions, "modified"), (pairs, "chosen")):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], lines[2].replace(f'"{key}"', '"other"'), *lines[3:]]))
        with pytest.raises(InputError, match=rf"{path.name}:3: no '{key}'"):
            chosen_world(options, 2)
        path.write_text("\n".join(lines))


def test_an_edited_file_is_another_world(tmp_path):
    pairs, revisions = external_world.write(tmp_path, 20)
    given = {"preferences": str(pairs), "revisions": str(revisions), "scorer": "python:external_world:score"}
    options = Options(output_dir=str(tmp_path / "out"), **given)
    before = Artefacts(chosen_world(options, 2), Scale(), seed=1)
    assert Artefacts(chosen_world(options, 2), Scale(), seed=1).discriminator() == before.discriminator()
    pairs.write_text(pairs.read_text().replace("lovely", "lively"))
    after = Artefacts(chosen_world(options, 2), Scale(), seed=1)
    assert after.sft().step.key != before.sft().step.key
    scorer = replace(chosen_world(options, 2), truth="another")
    assert Artefacts(scorer, Scale(), seed=1).sft().step.key == after.sft().step.key
    assert Artefacts(scorer, Scale(), seed=1).measured(after.sft()).key != after.measured(after.sft()).key


def test_another_world_holds_the_same_prompts_out_for_every_seed(tmp_path):
    """Else one seed's test prompts would be another's training prompts, and the grid's."""
    pairs, _ = external_world.write(tmp_path, 120)
    held_out, trained = [], []
    for seed in (0, 1, 2):
        folder = tmp_path / str(seed)
        sizes = ("--validation", "4", "--test", "6", "--data_seed", str(seed))
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
        main(["--output_dir", str(tmp_path), "--report"])
    assert ended.value.code == 2
    taken.close()


# ---- what the runs say -----------------------------------------------------------------------------------------------


def row(score: float, kl: float, entropy: float, scores: list[float] | None = None) -> dict:
    told = {"true_score": score, "kl": kl, "entropy": entropy, "scores": scores or [score, score]}
    return told | {"response_length": 9.0, "repeats": 0.25, "by_kind": {"prompts": score, "facts": score - 1}}


def run_of(method: str, seed: int, score: float, **more: object) -> dict:
    """One finished run as a measured step tells it: T = 1 and its best, 0.5, at KL 1 and entropy 2."""
    curve = {"true_score": [1.0, score], "generated_tokens": [100, 200]}
    decodings = {"1": row(score - 2, 0.5, 3.0), "0.5": row(score, 1.0, 2.0)}
    run = {"method": method, "stage": "main", "seed": seed, "seconds": 20.0, "best": "0.5", "artefact": "x"}
    return run | {"decodings": decodings, "curve": curve} | more


def sft_of(seed: int) -> dict:
    """Scores 3 at KL 0 and entropy 4, 5 at KL 2 and entropy 0."""
    decodings = {"1": row(3.0, 0.0, 4.0), "0": row(5.0, 2.0, 0.0)}
    best_of = {"truth": [{"n": 1, "kl": 0.0, "true_score": 3.0}, {"n": 2, "kl": 0.2, "true_score": 6.0}]}
    return run_of("sft", seed, 5.0, decodings=decodings, best="0", best_of=best_of, curve={})


def test_gaps_over_the_frontier_by_hand():
    """At KL 1 SFT reaches 4; at entropy 2, half of what it gives up at most, 4 too; at KL 0 it has 3."""
    swept = list(sft_of(1)["decodings"].values())
    assert gaps(row(6.0, 1.0, 2.0), swept) == {"over_kl": 2.0, "over_entropy": 2.0}
    assert gaps(row(6.0, 0.0, 0.0), swept) == {"over_kl": 3.0, "over_entropy": 1.0}


def test_what_is_decided_and_what_is_not(tmp_path):
    """Gaps of 2 ± .1 on three seeds help; of 0 ± .1 do not; where the sign turns at equal KL, nothing is decided."""
    families = {
        "helps": {"rule": "helps", "methods": ["tlcr", "dpo", "remax"]},
        "pairs": {"rule": "differences", "pairs": [["tlcr", "dpo"], ["ppo_seq", "dpo"], ["tlcr", "remax"]]},
    }
    registration = read(registered(tmp_path, families=families))
    runs = [sft_of(seed) for seed in (1, 2, 3)]
    for seed, noise in ((1, -0.1), (2, 0.0), (3, 0.1)):
        runs += [run_of("tlcr", seed, 6.0 + noise), run_of("dpo", seed, 4.0 - noise)]
        costly = {"1": row(4.5, 0.0, 4.0), "0.5": row(4.6 - noise / 2, 2.0, 0.0)}
        runs.append(run_of("ppo_seq", seed, 4.0, decodings=costly))
    found = decide(registration, with_gaps(runs))
    helps = {one["of"]: one for one in found["helps"]}
    assert helps["tlcr"]["over_kl"]["mean"] == pytest.approx(2.0)
    assert helps["tlcr"]["verdict"] == "helps"
    assert helps["tlcr"]["p_corrected"] == pytest.approx(2 * helps["tlcr"]["p"]), "of the two that are known"
    assert helps["dpo"]["verdict"] == "undecided"
    assert helps["remax"]["p"] is None
    pairs = {one["of"]: one for one in found["pairs"]}
    assert pairs["tlcr - dpo"]["verdict"] == "higher"
    assert pairs["tlcr - dpo"]["score"]["mean"] == pytest.approx(2.0)
    assert pairs["ppo_seq - dpo"]["score"]["low"] > 0 > pairs["ppo_seq - dpo"]["over_kl"]["high"]
    assert pairs["ppo_seq - dpo"]["verdict"] == "undecided"


def test_scores_at_equal_tokens_and_collapses_by_hand():
    curve = {"generated_tokens": [20, 20, 20], "true_score": [1.0, 2.0, 9.0]}
    thrifty = {"generated_tokens": [10, 10, 20], "true_score": [1.0, 1.0, 1.0]}
    runs = [sft_of(1), run_of("tlcr", 1, 9.0, curve=curve), run_of("ppo_seq", 1, 1.0, curve=thrifty)]
    assert at_equal_tokens(runs) == {"tlcr": {1: 1.5}, "ppo_seq": {1: 1.0}}  # 40 tokens: two updates of TLCR
    # Means of five less 1: 4, then 3.2, 2.4, 1.6, which is below half of 4.
    assert collapses({"curve": {"true_score": [5.0] * 5 + [1.0] * 5}}) == 8
    assert collapses({"curve": {"true_score": [5.0] * 9}}) is None


def test_learning_curve_from_the_answers_that_were_kept(tmp_path):
    """Two updates of two answers; ReMax's greedy answers are counted as long as the sampled ones."""
    lines = [{"step": step, "rollout/response_length": 3.0, "reward/greedy_per_sequence": 0.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [(1, "a</s>"), (1, "aaa"), (2, "aa</s>"), (2, "aaaa</s>")]
    answers = [{"step": step, "prompt": "<s>p", "answer": text, "reward": 0.0} for step, text in texts]
    (tmp_path / "answers-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    curve = learning_curve(tmp_path, lambda prompt, response, ended: len(response) - (not ended), "</s>")
    assert curve["true_score"] == [1.5, 3.0]
    assert curve["generated_tokens"] == [12, 12]
    assert curve["response_length"] == [3.0, 3.0]


# ---- the page ----


def test_the_page_shows_what_was_measured_and_names_what_was_not(tmp_path):
    study = study_of(tmp_path)
    empty = study.results()
    text = write_study_page(tmp_path / "study.html", empty).read_text()
    for part in ("No run has finished", "Nothing is decided yet", "None is trained yet", "Not finished, so nothing"):
        assert part in text
    runs = [sft_of(seed) for seed in (1, 2, 3)]
    runs += [run_of("tlcr", seed, 6.0 + seed / 10) for seed in (1, 2, 3)]
    runs = with_gaps(runs)
    found = empty | {"runs": runs, "families": decide(study.registration, runs), "frozen": {"settings": {}}}
    found["judges"] = [{"judge": "reward_model", "seed": 1, "pair_accuracy": 0.789, "pair_accuracy_ceiling": 0.831}]
    text = write_study_page(tmp_path / "study.html", found).read_text().replace("\N{NO-BREAK SPACE}", " ")
    for part in ("6.20 ± 0.10", "2.20 ± 0.10", "0.789", "0.831", "best of n by the truth", "At equal tokens".lower()):
        assert part in text, part
    assert "No finished run: DPO, FIGA" in text
    assert "TLCR: helps" in verdicts(found)[0]
    assert "not run on two seeds" in text


# ---- a whole one -----------------------------------------------------------------------------------------------------


def test_a_study_of_a_world_that_the_project_does_not_know(tmp_path, monkeypatch):
    """Pairs, revisions, a scorer from outside, and a registration: the grid, its freeze, results, page; in parts, and
    then nothing is left to do."""
    pairs, revisions = external_world.write(tmp_path, 160)
    told = json.loads(REGISTRATION.read_text())
    sizes = {"sft_epochs": 1, "judge_epochs": 1, "rl_batch": 16, "rl_epochs": 1, "max_answer": 24, "hidden_size": 32}
    sizes |= {"layers": 1, "validation": 3, "test": 5, "answers": 2, "sft_batch": 8, "judge_batch": 8}
    methods = {name: told["methods"][name] for name in ("sft", "tlcr", "ppo_true", "calibrated")}
    told |= {"seeds": {"grid": [0], "results": [1, 2]}, "scale": sizes, "methods": methods}
    told |= {"reward_models": [{"epochs": 1}], "grid": {"learning_rates": [1e-3], "kls": [], "finalists": 1}}
    told["stages"] = {
        "main": {"methods": ["sft", "tlcr"], "seeds": 2},
        "controls": {"methods": ["calibrated"], "seeds": 1},
    }
    told["families"] = {"helps": {"rule": "helps", "methods": ["tlcr"]}}
    registration = tmp_path / "registration.json"
    registration.write_text(json.dumps(told))
    command = [
        *("--output_dir", str(tmp_path / "out"), "--until"),
        *("controls", "--registration", str(registration), "--preferences", str(pairs), "--revisions", str(revisions)),
        *("--scorer", "python:external_world:score"),
    ]
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> subprocess.CompletedProcess:
        return launch("testbed/study/main.py", *command, *more, check=False)

    part = run("--hours", "1e-9")
    assert part.returncode == 3, part.stdout + part.stderr[-3000:]
    assert "its time is over; the same command continues" in part.stdout
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = {(one["method"], one["seed"]): one for one in found["runs"]}
    assert set(runs) == {("sft", 1), ("sft", 2), ("tlcr", 1), ("tlcr", 2), ("calibrated", 1)}
    for one in runs.values():
        assert set(one["decodings"]) >= {"1", one["best"]}
        assert one["validation"][one["best"]] == max(one["validation"].values())
        for decoding in one["decodings"].values():
            assert all(2 * score == int(2 * score) for score in decoding["scores"]), "two answers, whole numbers"
    sft = runs["sft", 1]
    assert len(sft["decodings"]) == 9
    assert [one["n"] for one in sft["best_of"]["reward_model"]] == [1, 2, 4, 8, 16]
    assert [one["true_score"] for one in sft["best_of"]["truth"]] == sorted(
        one["true_score"] for one in sft["best_of"]["truth"]
    )
    curve = runs["tlcr", 1]["curve"]
    assert len(curve["true_score"]) == len(curve["generated_tokens"]) == len(curve["update"]) > 1
    assert found["families"]["helps"][0]["over_kl"]["count"] == 2
    assert found["frozen"]["settings"]["tlcr"] == {"learning_rate": 1e-3, "kl": 0.1}
    assert "<html" in (tmp_path / "out" / "study.html").read_text()[:200]
    with tarfile.open(tmp_path / "out" / "answers.tar") as kept:
        assert "tlcr-1.jsonl.xz" in kept.getnames()
    assert {line.split()[0] for line in run("--plan").stdout.splitlines()} == {"done"}

    again = run("--report")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
