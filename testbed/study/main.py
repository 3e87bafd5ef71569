"""The study: what registration.json has committed to, on the testbed or on another world.

python testbed/study/main.py --output_dir OUTPUT

Stages follow each other: the grid, whose choice is frozen; then those of the registration. Whatever was made before is
reused; a run that was stopped, or ended after ``hours``, continues with the same command. docs/study.md explains it.
"""

import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.locking import lock
from deepspeed_chat_tlcr.records import parse_json
from deepspeed_chat_tlcr.saving import write_json
from testbed.study import results as tables
from testbed.study import schedule
from testbed.study.artefacts import Step, Store, in_order
from testbed.study.methods import Artefacts, World
from testbed.study.options import Options, chosen_world
from testbed.study.pages import write_study_page
from testbed.study.registration import Registration, RewardModel, Setting, read

EXIT_RESUMABLE = 3


@dataclass(frozen=True)
class Study:
    """What is to be run, as steps; nothing here runs anything."""

    registration: Registration
    world: World
    store: Store
    folder: Path

    def artefacts(self, seed: int, model: RewardModel | None = None) -> Artefacts:
        return Artefacts(self.world, self.registration.scale, seed, model or RewardModel())

    # ---- the grid, and what it chooses ----

    @property
    def frozen_file(self) -> Path:
        return self.folder / "frozen.json"

    @cached_property
    def frozen(self) -> dict:
        """What was chosen before the first result. Raises ``InputError`` where the registration is another since."""
        found = parse_json(self.frozen_file.read_text(encoding="utf-8"))
        if found["registration"] != self.registration.digest:
            raise InputError(
                f"{self.frozen_file}: settings were frozen for another registration ({found['registration']}, now "
                f"{self.registration.digest}); a study whose registration changes is another one: give it another "
                "--output_dir"
            )
        return found

    def reward_model_trials(self) -> list[tuple[RewardModel, list[Step]]]:
        """Each way to train the reward model, and the models of the grid's worlds."""
        made = [self.artefacts(seed) for seed in self.registration.grid_seeds]
        return [(how, [one.reward_model(how).step for one in made]) for how in self.registration.reward_models]

    def chosen_reward_model(self) -> RewardModel | None:
        """The way with the highest held-out accuracy, on the mean over worlds; None before all are there."""
        trials = self.reward_model_trials()
        if not all(self.store.is_done(step) for _, steps in trials for step in steps):
            return None
        accuracies = [tables.mean([self._accuracy(step) for step in steps]) for _, steps in trials]
        return trials[accuracies.index(max(accuracies))][0]

    def _accuracy(self, step: Step) -> float:
        return self.store.results(step)["eval/pair_accuracy"]

    def trial(self, name: str, setting: Setting, seed: int, model: RewardModel) -> Step:
        made = self.artefacts(seed, model)
        return made.validated(made.policy(self.registration.methods[name], setting))

    def score(self, step: Step) -> float:
        """Validation score at the best temperature."""
        return max(self.store.results(step)["validation"].values())

    def method_trials(self, name: str, model: RewardModel) -> tuple[dict[Setting, list[Step]], Setting | None]:
        """A method's trials by setting, as far as they can be told, and the setting that they choose.

        Learning rates at the middle KL coefficient on the first world; then the other coefficients at the best rate;
        then the finalists on all worlds.
        """
        grid, seeds = self.registration.grid, self.registration.grid_seeds
        trials = {Setting(learning_rate=rate): [] for rate in grid.learning_rates}
        first = {setting: self.trial(name, setting, seeds[0], model) for setting in trials}
        if not all(map(self.store.is_done, first.values())):
            return {setting: [step] for setting, step in first.items()}, None
        best = max(first, key=lambda setting: self.score(first[setting]))
        if self.registration.methods[name].algo != "figa":  # which has no penalty
            more = [replace(best, kl=kl) for kl in grid.kls]
            first |= {setting: self.trial(name, setting, seeds[0], model) for setting in more}
        trials = {setting: [step] for setting, step in first.items()}
        if not all(map(self.store.is_done, first.values())):
            return trials, None
        ranked = sorted(first, key=lambda setting: self.score(first[setting]), reverse=True)[: grid.finalists]
        for setting in ranked:
            trials[setting] += [self.trial(name, setting, seed, model) for seed in seeds[1:]]
        if not all(self.store.is_done(step) for setting in ranked for step in trials[setting]):
            return trials, None
        return trials, max(ranked, key=lambda setting: tables.mean([self.score(step) for step in trials[setting]]))

    def grid_steps(self) -> list[Step]:
        """What the grid has to run, as far as it can be told: later trials depend on what earlier ones say."""
        steps = [step for _, steps in self.reward_model_trials() for step in steps]
        model = self.chosen_reward_model()
        if model:
            found = (self.method_trials(name, model)[0] for name in self.registration.tuned)
            steps += [step for trials in found for row in trials.values() for step in row]
        return steps

    def freeze(self) -> None:
        """Write down what the grid chose, once it is finished and not again; from then on it is read."""
        model = self.chosen_reward_model()
        if self.frozen_file.exists() or not model or not all(map(self.store.is_done, self.grid_steps())):
            return
        settings = {name: self.method_trials(name, model)[1] for name in self.registration.tuned}
        told = {name: asdict(setting) for name, setting in settings.items() if setting}
        content = {"registration": self.registration.digest, "reward_model": asdict(model), "settings": told}
        write_json(self.frozen_file, content)

    # ---- results ----

    def setting(self, name: str) -> Setting:
        of = self.registration.methods[name].like or name
        return Setting(**self.frozen["settings"].get(of, {}))

    def measured(self, name: str, seed: int) -> tuple[Step, Step]:
        """The step that makes a method's policy, and the one that measures it."""
        made = self.artefacts(seed, RewardModel(**self.frozen["reward_model"]))
        policy = made.policy(self.registration.methods[name], self.setting(name))
        return policy.step, made.measured(policy)

    def runs(self, stage: str) -> list[tuple[str, int]]:
        of, methods = self.registration.stages[stage], self.registration.methods
        # Own answers have no reviser where revisions are given.
        names = [name for name in of.methods if not (methods[name].rounds and self.world.revisions)]
        return [(name, seed) for seed in self.registration.seeds[: of.seeds] for name in names]

    def stage_steps(self, stage: str) -> list[Step]:
        return [self.measured(name, seed)[1] for name, seed in self.runs(stage)]

    def judges(self) -> list[tuple[str, int, Step]]:
        found = []
        for seed in self.registration.seeds:
            made = self.artefacts(seed, RewardModel(**self.frozen["reward_model"]))
            for name in ("discriminator", "reward_model", "synthetic_reward_model"):
                found.append((name, seed, getattr(made, name)().step))
        return found

    def results(self) -> dict:
        """All that is known so far, for results.json and the page."""
        told = {
            "registration": {
                "digest": self.registration.digest,
                "title": self.registration.title,
                "rules": dict(self.registration.rules),
                "titles": {name: method.title for name, method in self.registration.methods.items()},
                "stages": {name: list(stage.methods) for name, stage in self.registration.stages.items()},
            },
            "world": {name: value for name, value in asdict(self.world).items() if value},
            "scale": asdict(self.registration.scale),
            "grid": self.grid_results(),
        }
        if not self.frozen_file.exists():
            return told | {"frozen": None, "runs": [], "judges": [], "families": {}}
        runs = []
        for stage in self.registration.stages:
            for name, seed in self.runs(stage):
                policy, measured = self.measured(name, seed)
                if self.store.is_done(measured):
                    of = {"method": name, "stage": stage, "seed": seed, "seconds": self.store.seconds(policy)}
                    runs.append(of | {"artefact": f"{measured.name}-{measured.key}"} | self.store.results(measured))
        runs = tables.with_gaps(runs)
        judges = [
            {"judge": name, "seed": seed, **tables.held_out(self.store.results(step)), **self.ceiling(seed)}
            for name, seed, step in self.judges()
            if self.store.is_done(step)
        ]
        families = tables.decide(self.registration, runs)
        return told | {"frozen": self.frozen, "runs": runs, "judges": judges, "families": families}

    def ceiling(self, seed: int) -> dict[str, float]:
        """The accuracy on held-out pairs of who knows every true score: only the preferences' noise is left."""
        step = self.artefacts(seed).data()
        if self.world.preferences or not (self.store.folder(step) / "eval.jsonl").is_file():
            return {}
        return {"pair_accuracy_ceiling": tables.pair_ceiling(self.store.folder(step), self.world.version, seed)}

    def grid_results(self) -> dict:
        model, rows = self.chosen_reward_model(), []
        for how, steps in self.reward_model_trials():
            accuracies = [self._accuracy(step) for step in steps if self.store.is_done(step)]
            rows.append({**asdict(how), "pair_accuracies": accuracies})
        trials = []
        for name in self.registration.tuned if model else ():
            for setting, steps in self.method_trials(name, model)[0].items():
                scores = [self.score(step) for step in steps if self.store.is_done(step)]
                trials.append({"method": name, **asdict(setting), "scores": scores})
        return {"reward_models": rows, "trials": trials}


def run_stages(study: Study, options: Options, clock: schedule.Clock) -> schedule.Outcome:
    """The grid until nothing is left of it, the freeze, then stage after stage; ends early when the time is over."""
    stages = ["grid", *study.registration.stages]
    for stage in stages[: stages.index(options.until) + 1]:
        while True:
            wanted = study.grid_steps() if stage == "grid" else study.stage_steps(stage)
            left = [step for step in wanted if not study.store.is_done(step)]
            if not left:
                break
            outcome = schedule.run(study.store, left, options.jobs, stage, clock)
            if outcome.failed or clock.is_over:
                return outcome
        study.freeze()
    return schedule.Outcome()


def write(study: Study, found: dict) -> None:
    folder = study.folder
    write_json(folder / "results.json", found)
    with tarfile.open(folder / "answers.tar", "w") as kept:
        for run in found["runs"]:
            texts = study.store.root / run["artefact"] / "answers.jsonl.xz"
            if texts.is_file():
                kept.add(texts, f"{run['method']}-{run['seed']}.jsonl.xz")
    page = write_study_page(folder / "study.html", found)
    print(
        f"{folder / 'results.json'}, {page}: {len(found['runs'])} runs, {len(found['grid']['trials'])} settings tried"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv)
    folder, registration = Path(options.output_dir), read(options.registration)
    store = Store(folder / "artefacts")
    study = Study(registration, chosen_world(options, registration.world), store, folder)
    if study.frozen_file.exists():
        _ = study.frozen  # refuses another registration before anything runs
    if options.plan:
        steps = study.grid_steps()
        if study.frozen_file.exists():
            steps += [step for stage in registration.stages for step in study.stage_steps(stage)]
        for step in in_order(steps):
            print(f"{'done' if store.is_done(step) else 'to do':5}  {step.name}-{step.key}  {step.program}")
        return 0
    taken = lock(folder)
    # Small models gain nothing from two threads or a GPU; the jobs side by side do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # OpenMP has read the variable already; two jobs of two threads each would mostly wait for each other's turn.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    clock = schedule.Clock(3600 * (options.hours or registration.hours))
    try:
        outcome = schedule.Outcome() if options.report else run_stages(study, options, clock)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", flush=True)
        return EXIT_RESUMABLE
    study.freeze()
    found = study.results()
    write(study, found)
    schedule.require(outcome, store)
    taken.close()
    if clock.is_over:
        print("its time is over; the same command continues", flush=True)
        return EXIT_RESUMABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
