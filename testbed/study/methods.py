"""Every method of the registration as commands of the real entry points over shared artefacts.

What methods share within a seed (data, base model, SFT model, revisions, judges, units) is one step for all of them.
Every RL method gets the same prompts, as many answers and optimiser steps, a critic that starts as the SFT model with
V = 0, and a reward whose total has deviation 1 over the SFT model's own answers.
"""

from dataclasses import dataclass, replace

from testbed.study.artefacts import Argument, Inverse, Joined, Output, Step, flags
from testbed.study.registration import Method, RewardModel, Scale, Setting
from testbed.study.truth import SCORER, TESTBED

TRUE_REWARD = "python:testbed.study.truth:true_reward"
UNCLIPPED = 1e6
"""A clip of sequence scores would be of raw ones, before units."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Where prompts, preferences, revisions and the truth come from: the testbed, or files of another world."""

    version: int = 2  # of the testbed's world
    preferences: str | None = None  # pairs; None: the testbed's
    revisions: str | None = None  # of the reward part's rejected responses
    prompts: str | None = None  # to test on; None: prompts of the held-out pairs
    base_model: str | None = None  # None: for the testbed its own, else one is trained on the SFT part's texts
    scorer: str = TESTBED
    files: str = ""  # hash of what stands in them: an edited file is another world
    truth: str = ""  # hash of the scorer's source


@dataclass(frozen=True)
class Artefacts:
    """The steps of one seed, made on demand: equal steps are one, whoever asks."""

    world: World
    scale: Scale
    seed: int
    chosen_model: RewardModel = RewardModel()

    # ---- what all methods share ----

    @property
    def on_testbed(self) -> bool:
        return self.world.preferences is None

    def _which(self) -> dict[str, object]:
        """What tells a program of the testbed which world it is."""
        return {"world": self.world.version, "world_seed": self.seed} if self.on_testbed else {}

    def data(self) -> Step:
        scale = self.scale
        sizes = {"train": scale.pairs, "eval": scale.eval_pairs, "validation": scale.validation, "test": scale.test}
        return Step("data", "testbed/main.py", ("data", *flags(**sizes, **self._which(), data_seed=self.seed)))

    def parts(self) -> Step:
        world, own = self.world, self.on_testbed
        return Step(
            "parts",
            "testbed/study/parts.py",
            flags(
                preferences=Output(self.data()) if own else world.preferences,
                prompts=world.prompts,
                validation=0 if own else self.scale.validation,
                test=0 if own else self.scale.test,
                data_seed=self.seed,
            ),
            world.files,
        )

    def part(self, name: str) -> Output:
        return Output(self.parts(), name)

    def prompts(self, which: str) -> Output:
        """``validation`` or ``test`` prompts."""
        return Output(self.data(), f"{which}_prompts.jsonl") if self.on_testbed else self.part(f"{which}.jsonl")

    def base(self) -> Argument:
        if self.world.base_model:
            return self.world.base_model
        sizes = {"hidden_size": self.scale.hidden_size, "layers": self.scale.layers, "seed": self.seed}
        if self.on_testbed:
            options = flags(documents=self.scale.documents, **self._which(), **sizes)
            return Output(Step("base", "testbed/main.py", ("base", *options)))
        untrained = Step("untrained", "testbed/study/untrained.py", flags(texts=self.part("texts"), **sizes))
        return Output(self._supervised("base", Output(untrained), "texts", loss_on_prompt=True))

    def sft(self) -> Output:
        return Output(self._supervised("sft", self.base(), "sft"))

    def _supervised(self, name: str, model: Argument, part: str, **options: object) -> Step:
        scale = self.scale
        more = self._training(scale.sft_batch, scale.sft_epochs, scale.sft_learning_rate)
        chosen = flags(model_name_or_path=model, data_path=self.part(part), data_split="10,0,0", **more, **options)
        return Step(name, "step1_sft/main.py", chosen)

    def _training(self, batch: int, epochs: int, learning_rate: float) -> dict[str, object]:
        """Options of every stage that trains one model."""
        return {
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "num_train_epochs": epochs,
            "learning_rate": learning_rate,
            "max_seq_len": self.scale.max_prompt + self.scale.max_answer,
            "dtype": "fp32",
            "save_interval": 100_000,
            "seed": self.seed,
        }

    # ---- judges ----

    def revisions(self, pairs: Output | None = None) -> Step:
        """The reviser's edits of the reward part, or of other ``pairs``."""
        asked = {} if self.world.revisions and pairs is None else self._which()
        given = None if pairs else self.world.revisions
        return Step(
            "revisions",
            "testbed/study/label.py",
            flags(data_path=pairs or self.part("reward"), revisions=given, **asked),
        )

    def _judge(self, name: str, start: Argument, epochs: int, learning_rate: float, **options: object) -> Output:
        more = self._training(self.scale.judge_batch, epochs, learning_rate)
        more |= {"weight_decay": self.scale.judge_weight_decay, **options}
        chosen = flags(model_name_or_path=start, data_path=self.part("reward"), data_split="0,10,0", **more)
        return Output(Step(name, "step2_discriminator/main.py", chosen))

    def _labels(self, *more: Step) -> dict[str, object]:
        """Revisions to learn from, and those that judges are measured on: the same, whatever else is learnt."""
        made = (self.revisions(), *more)
        return {
            "revisions": [Output(one, "train.jsonl") for one in made],
            "eval_revisions": [Output(made[0], "eval.jsonl")],
        }

    def discriminator(self, method: Method | None = None, *more: Step) -> Output:
        """D, or D with its logits multiplied as ``method`` wants them; ``more``: further revisions to learn from."""
        scale = self.scale
        epochs, rate = scale.judge_epochs, scale.judge_learning_rate
        plain = self._judge("discriminator", self.base(), epochs, rate, **self._labels(*more))
        if method is None or method.sharpness == 1.0:
            return plain
        held_out = Output(self.revisions(), "eval.jsonl")
        factor = None if method.sharpness == "fit" else method.sharpness
        options = flags(discriminator=plain, revisions=held_out, factor=factor)
        return Output(Step("sharpened", "testbed/study/sharpen.py", options))

    def reward_model(self, chosen: RewardModel | None = None, **options: object) -> Output:
        how = chosen or self.chosen_model
        start = self.base() if how.start == "base" else self.sft()
        options |= {"objective": "sequence", "score_positions": how.positions}
        name = "synthetic_reward_model" if "pairs" in options else "reward_model"
        return self._judge(name, start, how.epochs, how.learning_rate, **options)

    def synthetic_reward_model(self) -> Output:
        return self.reward_model(pairs="modified", **self._labels())

    def judge(self, method: Method, *more: Step) -> Output | None:
        match method.judge:
            case "discriminator":
                return self.discriminator(method, *more)
            case "reward_model":
                return self.reward_model()
            case "synthetic_reward_model":
                return self.synthetic_reward_model()
        return None

    # ---- how good a policy is ----

    def measured(self, policy: Output) -> Step:
        """A policy's true scores at its best temperature and at 1; the SFT model's at all, and as best-of-n."""
        trained = policy.step if policy.path == "actor" else None
        judges = {}
        if policy == self.sft():
            judges = {"discriminator": self.discriminator(), "reward_model": self.reward_model()}
        options = flags(
            policy=policy,
            sft=self.sft(),
            prompts=self.prompts("test"),
            validation=self.prompts("validation"),
            answers=self.scale.answers,
            training=Output(trained) if trained else None,
            scorer=self.world.scorer,
            **self._which(),
            **judges,
            **self._sampling(),
        )
        return Step(f"measured-{policy.step.name}", "testbed/study/measure.py", options, self.world.truth)

    def validated(self, policy: Output) -> Step:
        """A policy's true scores on validation prompts at every temperature: what the grid chooses by."""
        options = flags(
            policy=policy,
            sft=self.sft(),
            validation=self.prompts("validation"),
            scorer=self.world.scorer,
            **self._which(),
            **self._sampling(),
        )
        return Step(f"validated-{policy.step.name}", "testbed/study/measure.py", options, self.world.truth)

    def _sampling(self) -> dict[str, object]:
        return {"max_answer_seq_len": self.scale.max_answer, "seed": self.seed}

    def unit(self, method: Method, judge: Output | None) -> Step:
        """The deviation of a reward's total over the SFT model's own answers to validation prompts."""
        options: dict[str, object] = {"reward": method.reward or "truth", "judge": judge}
        if method.judge == "truth":
            options |= {"scorer": self.world.scorer, **self._which()}
        asked = flags(
            sft=self.sft(),
            prompts=self.prompts("validation"),
            fixed_threshold=method.options.get("fixed_threshold"),
            **options,
            **self._sampling(),
        )
        return Step("unit", "testbed/study/unit.py", asked, self.world.truth if method.judge == "truth" else "")

    # ---- the policy that each method makes ----

    def policy(self, method: Method, setting: Setting) -> Output:
        setting = Setting(learning_rate=setting.learning_rate * method.rate, kl=setting.kl * method.kl)
        match method.algo:
            case "sft":
                return self.sft()
            case "dpo":
                return self._learnt("dpo", "baselines/dpo/main.py", method, setting, beta=setting.kl)
            case "figa":
                return self._learnt("figa", "baselines/figa/main.py", method, setting, **self._labels())
        more: list[Step] = []
        for number in range(method.rounds):
            before = self._reinforced(replace(method, rounds=0), setting, self.judge(method, *more))
            more.append(self.revisions(self._own_answers(before, number + 1)))
        return self._reinforced(method, setting, self.judge(method, *more))

    def _own_answers(self, policy: Output, number: int) -> Output:
        """A policy's answers to half of the reward part's prompts, in the place of its rejected responses."""
        half = max(1, self.scale.pairs * 4 // 10 // 2)
        lengths = {"max_prompt_seq_len": self.scale.max_prompt, "max_answer_seq_len": self.scale.max_answer}
        asked = flags(
            policy=policy,
            data_path=self.part("reward"),
            data_split="0,10,0",
            prompts=half,
            round=number,
            seed=self.seed,
            **lengths,
        )
        return Output(Step("own_answers", "labeling/own_answers.py", asked))

    def _reinforced(self, method: Method, setting: Setting, judge: Output | None) -> Output:
        """Step 3. ReMax writes two answers to each prompt, so it gets half the prompts and as many answers."""
        scale, half = self.scale, method.algo == "remax"
        batch = scale.rl_batch // 2 if half else scale.rl_batch
        unit, name = Inverse(self.unit(method, judge), "sd"), TRUE_REWARD if method.judge == "truth" else method.reward
        terms: list[Argument] = [Joined((name, *((":", judge) if judge else ()), "@", unit))]
        if method.noise:
            terms.append(Joined(("random@", replace(unit, factor=method.noise))))
        options = flags(
            algo=method.algo,
            actor_model_name_or_path=self.sft(),
            critic_model_name_or_path=self.sft(),
            reward=terms,
            save_answers=True,
            data_path=self.part("rl_half" if half else "rl"),
            data_split="0,0,10",
            max_prompt_seq_len=scale.max_prompt,
            max_answer_seq_len=scale.max_answer,
            per_device_generation_batch_size=batch,
            per_device_training_batch_size=batch,
            num_train_epochs=round(scale.rl_epochs * method.epochs),
            actor_learning_rate=f"{setting.learning_rate:g}",
            critic_learning_rate=scale.critic_learning_rate,
            num_warmup_steps=0,
            kl_ctl=f"{setting.kl:g}",
            clip_reward_value=None if half else UNCLIPPED,
            whiten_advantages=not half,
            save_interval=100_000,
            dtype="fp32",
            seed=self.seed,
            **method.options,
        )
        if method.judge != "truth":
            return Output(Step(method.algo, "step3_ppo_tlcr/main.py", options), "actor")
        told = {SCORER: self.world.scorer, "TESTBED_WORLD": self.world.version, "TESTBED_WORLD_SEED": self.seed}
        variables = tuple((name, str(value)) for name, value in told.items())
        return Output(Step(method.algo, "step3_ppo_tlcr/main.py", options, self.world.truth, variables), "actor")

    def _learnt(self, name: str, program: str, method: Method, setting: Setting, **options: object) -> Output:
        """DPO and FIGA: as SFT, from the SFT model, on the whole reward part."""
        more = self._training(self.scale.preference_batch, max(1, round(method.epochs)), setting.learning_rate)
        given = {"model_name_or_path": self.sft(), "data_path": self.part("reward"), "data_split": "0,10,0"}
        return Output(Step(name, program, flags(**given, **more, **options)))
