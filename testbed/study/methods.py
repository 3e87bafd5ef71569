"""Every method of the paper's table as commands of the real entry points over shared artefacts.

What methods share within a seed (data, base model, SFT model, revisions, discriminator, reward models) is one step for
all of them. Every RL method gets the same prompts, the same number of answers per update and of updates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from testbed.study.artefacts import Argument, Inverse, Joined, Output, Step, flags
from testbed.study.truth import TESTBED

RECORDER = "python:testbed.study.recorder:record@0"


@dataclass(frozen=True, kw_only=True)
class World:
    """Where prompts, preferences, revisions and the truth come from: the testbed, or files of another world."""

    preferences: str | None = None  # pairs; None: the testbed's
    revisions: str | None = None  # of the reward part's rejected responses
    prompts: str | None = None  # to test on; None: prompts of the held-out pairs
    base_model: str | None = None  # None: for the testbed its own, else one is trained on the SFT part's texts
    scorer: str = TESTBED
    files: str = ""  # hash of what stands in them: an edited file is another world
    truth: str = ""  # hash of the scorer's source


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and settings that all methods share; run_tiny.sh's, where it has them."""

    pairs: int = 12800
    eval_pairs: int = 1024
    documents: int = 24000
    validation: int = 256
    test: int = 256
    hidden_size: int = 192
    layers: int = 2
    sft_batch: int = 32
    sft_learning_rate: float = 1e-3
    sft_epochs: int = 2
    judge_batch: int = 16
    judge_learning_rate: float = 1e-3
    judge_epochs: int = 2
    judge_weight_decay: float = 0.1
    rl_batch: int = 64
    updates: int = 60  # by when the curves of every token reward are flat
    max_prompt: int = 64
    max_answer: int = 96
    critic_learning_rate: float = 1e-3
    preference_batch: int = 32  # DPO and FIGA
    dpo_epochs: int = 2
    figa_epochs: int = 3
    dtype: str = "fp32"  # or bf16: twice as fast on a CPU that has it, many times slower on one that has not


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the grid varies, the same for every method; one without a KL penalty has no use for the last two.

    Once advantages are whitened, only the ratio of reward scale to KL coefficient matters: half the coefficient is
    twice the reward.
    """

    learning_rate: float = 3e-4
    kl: float = 0.1  # DPO: its beta
    reward_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the sensitivity runs vary; the defaults are the study's."""

    noise: float = 0.03  # chance that the reviser edits a choice wrongly
    one_of: int = 1  # only every n-th revision
    neutral_weight: float = 1.0
    judge_from: str = "base"  # or "sft"
    budget: int = 1  # times the updates


STANDARD = Condition()


UNCLIPPED = 1e6
"""A clip of sequence scores would be of raw ones, before units: +-5 cuts most of PPO_synthetic's, whose model's spread
is ten times that of PPO_seq's. ReMax keeps its clip, which is of differences in units."""


@dataclass(frozen=True)
class Artefacts:
    """The steps of one seed, made on demand: equal steps are one, whoever asks."""

    world: World
    scale: Scale
    seed: int
    condition: Condition = STANDARD

    # ---- what all methods share ----

    @property
    def on_testbed(self) -> bool:
        return self.world.preferences is None

    def data(self) -> Step:
        sizes = {"train": self.scale.pairs, "eval": self.scale.eval_pairs}
        sizes["test"] = self.scale.validation + self.scale.test
        options = flags(**sizes, world_seed=self.seed, data_seed=self.seed)
        return Step("data", "testbed/main.py", ("data", *options))

    def parts(self) -> Step:
        world = self.world
        found = Output(self.data()) if self.on_testbed else world.preferences
        prompts = Output(self.data(), "test_prompts.jsonl") if self.on_testbed else world.prompts
        return Step(
            "parts",
            "testbed/study/parts.py",
            flags(
                preferences=found,
                prompts=prompts,
                rl_prompts=self.scale.rl_batch * self.scale.updates,
                validation=self.scale.validation,
                test=self.scale.test,
                data_seed=self.seed,
                fixed_held_out=not self.on_testbed,
            ),
            world.files,
        )

    def part(self, name: str) -> Output:
        return Output(self.parts(), name)

    def base(self) -> Argument:
        if self.world.base_model:
            return self.world.base_model
        sizes = {"hidden_size": self.scale.hidden_size, "layers": self.scale.layers, "seed": self.seed}
        if self.on_testbed:
            options = flags(documents=self.scale.documents, world_seed=self.seed, **sizes)
            return Output(Step("base", "testbed/main.py", ("base", *options)))
        untrained = Step("untrained", "testbed/study/untrained.py", flags(texts=self.part("texts"), **sizes))
        return Output(self._supervised("base", Output(untrained), "texts", loss_on_prompt=True))

    def sft(self) -> Output:
        return Output(self._supervised("sft", self.base(), "sft"))

    def _supervised(self, name: str, model: Argument, part: str, **options: object) -> Step:
        scale = self.scale
        return Step(
            name,
            "step1_sft/main.py",
            flags(
                model_name_or_path=model,
                data_path=self.part(part),
                data_split="10,0,0",
                per_device_train_batch_size=scale.sft_batch,
                per_device_eval_batch_size=scale.sft_batch,
                num_train_epochs=scale.sft_epochs,
                learning_rate=scale.sft_learning_rate,
                seed=self.seed,
                **self._training(),
                **options,
            ),
        )

    def _training(self) -> dict[str, object]:
        """Options of every stage that trains one model."""
        return {
            "max_seq_len": self.scale.max_prompt + self.scale.max_answer,
            "dtype": self.scale.dtype,
            "save_interval": 100_000,
        }

    def revisions(self) -> Step:
        condition = self.condition
        asked = {"world_seed": self.seed, "noise": condition.noise} if not self.world.revisions else {}
        return Step(
            "revisions",
            "testbed/study/label.py",
            flags(data_path=self.part("reward"), revisions=self.world.revisions, one_of=condition.one_of, **asked),
        )

    def _judge(self, name: str, **options: object) -> Output:
        scale = self.scale
        start = self.base() if self.condition.judge_from == "base" else self.sft()
        step = Step(
            name,
            "step2_discriminator/main.py",
            flags(
                model_name_or_path=start,
                data_path=self.part("reward"),
                data_split="0,10,0",
                per_device_train_batch_size=scale.judge_batch,
                per_device_eval_batch_size=scale.judge_batch,
                num_train_epochs=scale.judge_epochs,
                learning_rate=scale.judge_learning_rate,
                weight_decay=scale.judge_weight_decay,
                seed=self.seed,
                **self._training(),
                **options,
            ),
        )
        return Output(step)

    def _labels(self) -> dict[str, object]:
        found = self.revisions()
        return {"revisions": Output(found, "train.jsonl"), "eval_revisions": Output(found, "eval.jsonl")}

    def discriminator(self) -> Output:
        return self._judge("discriminator", neutral_weight=self.condition.neutral_weight, **self._labels())

    def reward_model(self) -> Output:
        return self._judge("reward_model", objective="sequence")

    def synthetic_reward_model(self) -> Output:
        return self._judge("synthetic_reward_model", objective="sequence", pairs="modified", **self._labels())

    # ---- how good a policy is ----

    def measured(self, policy: Output, prompts: str = "test", **options: object) -> Step:
        """A policy's true scores and, where it learnt by RL, its curve."""
        trained = policy.step if policy.path == "actor" else None
        return self._answers(
            policy,
            prompts,
            scorer=self.world.scorer,
            world_seed=self.seed if self.on_testbed else 0,
            training=Output(trained) if trained else None,
            **options,
        )

    def _answers(self, policy: Output, prompts: str, **options: object) -> Step:
        return Step(
            f"measured-{policy.step.name}",
            "testbed/study/measure.py",
            flags(
                policy=policy,
                sft=self.sft(),
                prompts=self.part(f"{prompts}.jsonl"),
                max_answer_seq_len=self.scale.max_answer,
                seed=self.seed,
                **options,
            ),
            self.world.truth,
        )

    # ---- methods: the policy that each one makes ----

    def reinforced(
        self, name: str, reward: str, judge: Output | None, setting: Setting, algorithm: str = "ppo", unit=None
    ) -> Output:
        """Step 3 with one reward; ``judge`` is its model, ``unit`` what one unit of it is (a step's number)."""
        scale = self.scale
        half = algorithm == "remax"  # which writes two answers to each prompt: half the prompts, as many answers
        weight = f"{setting.reward_scale:g}" if unit is None else replace(unit, factor=setting.reward_scale)
        term = Joined((reward, *((":", judge) if judge else ()), "@", weight))
        batch = scale.rl_batch // 2 if half else scale.rl_batch
        step = Step(
            name,
            "step3_ppo_tlcr/main.py",
            flags(
                algo=algorithm if half else None,
                actor_model_name_or_path=self.sft(),
                critic_model_name_or_path=judge or self.discriminator(),
                reward=(term, RECORDER),
                data_path=self.part("rl_half" if half else "rl"),
                data_split="0,0,10",
                max_prompt_seq_len=scale.max_prompt,
                max_answer_seq_len=scale.max_answer,
                per_device_generation_batch_size=batch,
                per_device_training_batch_size=batch,
                num_train_epochs=self.condition.budget,
                actor_learning_rate=setting.learning_rate,
                critic_learning_rate=scale.critic_learning_rate,
                num_warmup_steps=0,
                kl_ctl=setting.kl,
                clip_reward_value=UNCLIPPED if unit is not None and not half else None,
                whiten_advantages=not half,
                dtype=scale.dtype,
                seed=self.seed,
            ),
        )
        return Output(step, "actor")

    def unit_of(self, reward_model: Output) -> Inverse:
        """Two reward models differ in scale for no good reason: one unit is the spread over SFT's own answers."""
        measured = self._answers(self.sft(), "validation", scorer="none", reward_model=reward_model, temperatures=[1.0])
        return Inverse(measured, "sequence_reward_sd")

    def preference_trained(self, name: str, program: str, setting: Setting, **options: object) -> Output:
        """DPO and FIGA: as SFT, from the SFT model."""
        scale = self.scale
        step = Step(
            name,
            program,
            flags(
                model_name_or_path=self.sft(),
                data_path=self.part("reward"),
                data_split="0,10,0",
                per_device_train_batch_size=scale.preference_batch,
                per_device_eval_batch_size=scale.preference_batch,
                learning_rate=setting.learning_rate,
                seed=self.seed,
                **self._training(),
                **options,
            ),
        )
        return Output(step)


def _tokens(name: str, reward: str) -> Callable[[Artefacts, Setting], Output]:
    return lambda made, setting: made.reinforced(name, reward, made.discriminator(), setting)


def _sequence(name: str, model: Callable[[Artefacts], Output], algorithm: str = "ppo"):
    def policy(made: Artefacts, setting: Setting) -> Output:
        judge = model(made)
        return made.reinforced(name, "sequence", judge, setting, algorithm, made.unit_of(judge))

    return policy


def _dpo(made: Artefacts, setting: Setting) -> Output:
    options = {"beta": setting.kl, "num_train_epochs": made.scale.dpo_epochs}
    return made.preference_trained("dpo", "baselines/dpo/main.py", setting, **options)


def _figa(made: Artefacts, setting: Setting) -> Output:
    options = {"num_train_epochs": made.scale.figa_epochs, **made._labels()}
    return made.preference_trained("figa", "baselines/figa/main.py", setting, **options)


METHODS: dict[str, Callable[[Artefacts, Setting], Output]] = {
    "sft": lambda made, setting: made.sft(),
    "dpo": _dpo,
    "figa": _figa,
    "ppo_synthetic": _sequence("ppo_synthetic", Artefacts.synthetic_reward_model),
    "ppo_seq": _sequence("ppo_seq", Artefacts.reward_model),
    "remax": _sequence("remax", Artefacts.reward_model, "remax"),
    "tlcr_fixed": _tokens("tlcr_fixed", "tlcr_fixed"),
    "tlcr": _tokens("tlcr", "tlcr"),
    "tlcr_positive_only": _tokens("tlcr_positive_only", "tlcr_positive_only"),
    "tlcr_negative_only": _tokens("tlcr_negative_only", "tlcr_negative_only"),
    "tlcr_released_code": _tokens("tlcr_released_code", "tlcr_released_code"),
    "random": lambda made, setting: made.reinforced("random", "random", None, setting),
}
"""The policy of each method, given what its seed shares and the setting."""

AS_TLCR = ("tlcr_positive_only", "tlcr_negative_only", "tlcr_released_code", "random")
"""Ablations and controls: TLCR with one thing changed, at TLCR's settings unless the grid has found their own."""

NO_KL = {"sft", "figa"}
NO_REWARD = {"sft", "figa", "dpo"}

QUICK = ("sft", "ppo_seq", "tlcr_fixed", "tlcr")


def learning_rates(method: str, rates: Sequence[float], default: Setting) -> list[Setting]:
    """The grid's first round: every learning rate at the default KL coefficient and reward scale."""
    return [default] if method == "sft" else [replace(default, learning_rate=rate) for rate in rates]


def beyond(rates: Sequence[float], best: float) -> float | None:
    """The next rate, of those that are 1 or 3 times a power of ten, beyond the end of ``rates`` that ``best`` is.

    None where the best lies inside, or stands alone.
    """
    lowest, highest = min(rates), max(rates)
    if lowest == highest or lowest < best < highest:
        return None
    power = math.floor(math.log10(best) + 1e-9)
    series = [mantissa * 10.0**exponent for exponent in (power - 1, power, power + 1, power + 2) for mantissa in (1, 3)]
    near = best * 1.001, best * 0.999
    found = min(r for r in series if r > near[0]) if best == highest else max(r for r in series if r < near[1])
    return float(f"{found:.0e}")


def penalties(method: str, kls: Sequence[float], reward_scales: Sequence[float], best: Setting) -> list[Setting]:
    """Its second: other KL coefficients and reward scales, one at a time, at the method's best learning rate."""
    found = [] if method in NO_KL else [replace(best, kl=kl) for kl in kls]
    return found + ([] if method in NO_REWARD else [replace(best, reward_scale=scale) for scale in reward_scales])
