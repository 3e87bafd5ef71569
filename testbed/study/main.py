"""The study: every method x seeds on the testbed, or on another world.

python testbed/study/main.py --output_dir OUTPUT --stage grid|study|sensitivity|report

Whatever was made before is reused; an interrupted study continues with the same command. docs/study.md explains it.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.saving import write_json
from testbed.study import results as tables
from testbed.study import schedule
from testbed.study.artefacts import Output, Step, Store, in_order
from testbed.study.methods import (
    AS_TLCR,
    METHODS,
    NO_REWARD,
    STANDARD,
    Artefacts,
    Condition,
    Scale,
    Setting,
    World,
    beyond,
    learning_rates,
    penalties,
)
from testbed.study.options import (
    NOISE,
    PAPER,
    SENSITIVITY,
    Options,
    chosen_methods,
    chosen_scale,
    chosen_seeds,
    chosen_world,
    known_steps,
)
from testbed.study.pages import write_study_page
from testbed.study.results import Run
from testbed.world import World as Testbed

EXIT_RESUMABLE = 3
MOST_GROWTH = 3  # learning rates that a method's grid may grow by
Trial = tuple[str, Setting, Step]
"""Method, setting, and the measure of what came of them."""
SEQUENCE = {"ppo_synthetic", "ppo_seq", "remax"}


@dataclass(frozen=True)
class Study:
    """What is to be run, as steps; nothing here runs anything."""

    options: Options
    world: World
    scale: Scale
    methods: list[str]
    seeds: list[int]
    store: Store

    def artefacts(self, seed: int, condition: Condition = STANDARD) -> Artefacts:
        return Artefacts(self.world, self.scale, seed, condition)

    def judged_by(self, made: Artefacts) -> dict[str, Output]:
        """The models whose rewards are reported beside the true score: those that some method here learns from."""
        learning = set(self.methods) - NO_REWARD
        found = {}
        if learning - SEQUENCE:
            found["discriminator"] = made.discriminator()
        if learning & SEQUENCE:
            found["reward_model"] = made.reward_model()
        return found

    def run(self, method: str, variant: str, seed: int, setting: Setting, condition: Condition = STANDARD) -> Run:
        policy = METHODS[method](self.artefacts(seed, condition), setting)
        plain = self.artefacts(seed)  # judged as all others are, whatever was varied
        return Run(method, variant, seed, setting, condition, policy, plain.measured(policy, **self.judged_by(plain)))

    # ---- the grid ----

    def trials(self) -> list[Trial]:
        """What the grid has to run, on its own world: learning rates, then penalties at the best two of them.

        Where the best rate is the smallest or the largest, one beyond it is tried too, so that no method is reported
        at a rate that its grid happened to end at. What depends on a trial is here as soon as that is finished.
        """
        found = []
        for method in self.methods:
            first, best = self._rates(method)
            found += first
            for one in best:
                second = penalties(method, self.options.kls, self.options.reward_scales, one)
                found += [self.trial(method, setting) for setting in second]
        return found

    def _rates(self, method: str) -> tuple[list[Trial], list[Setting]]:
        """The trials of a method's learning rates, and the best two settings of them once all are finished.

        Two, since the rate that is best at one penalty may not be at another.
        """
        rates = sorted(self.options.learning_rates)
        while True:
            trials = [self.trial(method, one) for one in learning_rates(method, rates, PAPER)]
            if not all(self.store.is_known(measured) for _, _, measured in trials):
                return trials, []
            ranked = sorted(trials, key=lambda trial: self.store.results(trial[2])["true_score"], reverse=True)
            best = [setting for _, setting, _ in ranked[:2]]
            further = beyond(rates, best[0].learning_rate)
            if method == "sft" or further is None or len(rates) >= len(self.options.learning_rates) + MOST_GROWTH:
                return trials, best
            rates = sorted([*rates, further])

    def trial(self, method: str, setting: Setting) -> Trial:
        """A policy measured on validation prompts at temperature 1."""
        made = self.artefacts(self.options.grid_seed)
        return method, setting, made.measured(METHODS[method](made, setting), "validation", temperatures=[1.0])

    def finished(self, trial: Trial) -> dict:
        method, setting, measured = trial
        kept = self.store.results(measured)
        measures = {name: kept[name] for name in ("true_score", "response_length", "kl")}
        return {"method": method, "setting": asdict(setting), **measures}

    def finished_trials(self) -> list[dict]:
        return [self.finished(trial) for trial in self.trials() if self.store.is_known(trial[2])]

    def settings(self) -> dict[str, dict[str, Setting]]:
        """By method: the settings to report, "paper" and, where the grid is finished for the method, "best".

        Where it is not, an ablation takes TLCR's, any other method the paper's.
        """
        done, trials = self.finished_trials(), self.trials()
        found = {}
        for method in sorted(self.methods, key=lambda name: name in AS_TLCR):  # TLCR before what goes by it
            expected = sum(trial[0] == method for trial in trials)
            mine = [trial for trial in done if trial["method"] == method]
            if len(mine) == expected:
                chosen = tables.chosen_settings(mine, PAPER)[method]
                found[method] = {variant: Setting(**setting) for variant, setting in chosen.items()}
            else:
                found[method] = {"paper": found["tlcr"]["paper"] if method in AS_TLCR and "tlcr" in found else PAPER}
        return {method: found[method] for method in self.methods}

    # ---- the study and its sensitivity ----

    def runs(self) -> list[Run]:
        settings = self.settings()
        return [
            self.run(method, variant, seed, setting)
            for seed in self.seeds
            for method in self.methods
            for variant, setting in settings[method].items()
        ]

    def questions(self) -> dict[str, dict[str, tuple[Condition, Setting, str]]]:
        """``SENSITIVITY``, without the noise of a reviser whose revisions are given."""
        return {name: levels for name, levels in SENSITIVITY.items() if not (name == NOISE and self.world.revisions)}

    def sensitivity_runs(self) -> list[Run]:
        """Learning rates as the grid chose them at the paper's settings; the rest is what SENSITIVITY varies."""
        settings = self.settings()
        return [
            self.run(method, f"{question}: {name}", seed, self._at_its_rate(settings, method, setting), condition)
            for question, levels in self.questions().items()
            for name, (condition, setting, method) in levels.items()
            if method in self.methods
            for seed in self.seeds
        ]

    @staticmethod
    def _at_its_rate(settings: dict[str, dict[str, Setting]], method: str, setting: Setting) -> Setting:
        return replace(setting, learning_rate=settings[method]["paper"].learning_rate)

    def judges(self) -> Iterator[tuple[str, int, Step]]:
        for seed in self.seeds:
            made = self.artefacts(seed)
            yield "discriminator", seed, made.discriminator().step
            yield "reward_model", seed, made.reward_model().step
            yield "synthetic_reward_model", seed, made.synthetic_reward_model().step

    # ---- what came out ----

    def reported(self) -> list[Step]:
        """Every step whose results the report needs."""
        runs = self.runs() + self.sensitivity_runs()
        steps = [step for run in runs for step in (run.measured, run.policy.step)]
        steps += [measured for _, _, measured in self.trials()] + [step for _, _, step in self.judges()]
        return list(dict.fromkeys(steps))

    def told_world(self) -> dict:
        """Where everything comes from, and what makes the testbed hard: the noise of preferences and reviser."""
        told = {name: value for name, value in asdict(self.world).items() if value}
        if self.world.preferences is None:
            told |= {"preference_sharpness": Testbed.preference_sharpness, "reviser_noise": STANDARD.noise}
        return {**told, "seeds": self.seeds}

    def results(self) -> dict:
        settings = self.settings()
        records = tables.with_equal_tokens(tables.collect(self.store, self.runs()))
        varied = tables.collect(self.store, self.sensitivity_runs())
        variants = list(dict.fromkeys(variant for chosen in settings.values() for variant in chosen))
        trials = self.finished_trials()
        return {
            "world": self.told_world(),
            "scale": asdict(self.scale),
            "grid": {"seed": self.options.grid_seed, "trials": trials, "of": len(self.trials())},
            "settings": {name: {v: asdict(s) for v, s in chosen.items()} for name, chosen in settings.items()},
            "judges": tables.judges(self.store, list(self.judges())),
            "tables": {variant: tables.table(records, self.methods, variant) for variant in variants},
            "comparisons": {variant: tables.comparisons(records, self.methods, variant) for variant in variants},
            "sensitivity": {
                question: tables.sensitivity(
                    varied, question, {name: method for name, (_, _, method) in levels.items()}, standard_level(levels)
                )
                for question, levels in self.questions().items()
            },
            "runs": records + varied,
        }


def standard_level(levels: Mapping[str, tuple[Condition, Setting, str]]) -> str:
    """Which level of a question is TLCR as the study runs it."""
    return next(name for name, level in levels.items() if level == (STANDARD, PAPER, "tlcr"))


def wanted(study: Study, stage: str) -> list[Step]:
    """The steps that a stage is for, but those whose results are known already."""
    if stage == "grid":
        steps = [measured for _, _, measured in study.trials()]
    elif stage == "report":
        steps = []
    else:
        runs = study.runs() if stage == "study" else study.sensitivity_runs()
        steps = [run.measured for run in runs]
    return [step for step in steps if step.key not in study.store.known]


def absolute(options: Options) -> Options:
    """Paths as they are seen from everywhere: a step's arguments decide its key."""
    names = ("preferences", "revisions", "prompts", "base_model")
    given = {name: getattr(options, name) for name in names}
    return replace(options, **{name: str(Path(path).resolve()) for name, path in given.items() if path})


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = absolute(parse(Options, argv))
    folder = Path(options.output_dir)
    study = Study(
        options,
        chosen_world(options),
        chosen_scale(options.scale),
        chosen_methods(options),
        chosen_seeds(options),
        Store(folder / "artefacts", known_steps(options.known)),
    )
    steps = wanted(study, options.stage)
    if options.plan:
        for step in in_order(steps):
            done = "done" if study.store.is_done(step) else "to do"
            print(f"{done:5}  {step.name}-{step.key}  {step.program}")
        return 0
    taken = lock(folder)
    # Small models gain nothing from two threads or a GPU; the jobs side by side do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # OpenMP has read the variable already; two jobs of two threads each would mostly wait for each other's turn.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        outcome = schedule.run(study.store, steps, options.jobs, options.stage)
        while options.stage == "grid" and not outcome.failed:  # whose later trials depend on what the first ones say
            more = [step for step in wanted(study, "grid") if not study.store.is_done(step)]
            if not more:
                break
            outcome = schedule.run(study.store, more, options.jobs, "grid, what follows")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", flush=True)
        return EXIT_RESUMABLE
    found = study.results()
    if options.stage == "report" and options.known and not found["runs"]:
        raise InputError(
            "--known: holds no run of these settings, so there is nothing to report; repeat the options that the runs "
            "were made with, --scale (as in --scale dtype=bf16), --seeds and --methods among them"
        )
    write_json(folder / "results.json", found)
    write_json(folder / "known.json", study.store.told(study.reported()))
    page = write_study_page(folder / "study.html", found)
    print(f"{folder / 'results.json'}, {page}: {len(found['runs'])} runs, {len(found['grid']['trials'])} trials")
    schedule.require(outcome, study.store)
    taken.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
