"""How long each stage that trains takes, in seconds by part: a run's sizes put into duration.py's model."""

import math
from dataclasses import dataclass

from deepspeed_chat_tlcr.data.split import part_sizes
from training_scripts.planning import duration, memory
from training_scripts.planning.model_shapes import ModelShape
from training_scripts.planning.recipe import ALONE, CLASSIFIERS, ONE_ANSWER, Recipe


@dataclass(frozen=True)
class Work:
    """A stage's records, those of one optimiser step on all ranks together, and the epochs over them."""

    records: int
    batch: int
    epochs: int

    @property
    def steps(self) -> int:
        """An epoch's last, smaller batch is trained on too."""
        return self.epochs * math.ceil(self.records / self.batch)


def work_of(recipe: Recipe, records: int) -> dict[str, Work]:
    """The work of each stage that trains, where the data has so many ``records``."""
    sft, reward, rl = part_sizes(records, recipe.data_split)
    work = {}
    for stage in recipe.folders():
        if stage in ALONE:
            training = recipe.trainings[stage]
            batch = training.batch_size * training.accumulation_steps * recipe.world_size
            # RLMEC's model learns from every revision twice: to edit, and to leave as it is.
            seen = {"step1": sft, "step2_grm": 2 * reward}.get(stage, reward)
            work[stage] = Work(seen, batch, training.epochs)
        elif stage == "step3":
            batch = recipe.ppo_batch_size * recipe.ppo_accumulation_steps * recipe.world_size
            work[stage] = Work(rl, batch, recipe.prompt_epochs)
    return work


def saving(parameters: int, checkpoints: int, models: int, size: int) -> float:
    """Seconds of reading ``models`` models, and of writing checkpoints and the trained parameters."""
    return parameters * (checkpoints * memory.SAVED_STATE + (models + 1) * size) / duration.FILES


def trained_alone(
    recipe: Recipe, shape: ModelShape, stage: str, work: Work, prompt: float, answer: float
) -> dict[str, float]:
    """Steps 1 and 2, DPO, FIGA. Batches are formed by length, so padding is left out.

    ``prompt`` and ``answer``: mean tokens. SFT has one answer to a prompt, the others have two.
    """
    card, ranks, nodes = duration.CARDS[recipe.gpu_card], recipe.world_size, len(recipe.hosts())
    training = recipe.trainings[stage]
    parameters = memory.trained_parameters(shape, stage)
    answers = 3 if stage == "step2_grm" else 1  # it reads two before the one that it writes
    row = min(prompt + answers * answer, recipe.longest(stage))
    packed = stage in CLASSIFIERS and training.tokens_per_micro_batch
    second = 0 if stage in ONE_ANSWER else min(answer, row) if packed else row
    tokens = work.epochs * work.records * (row + second)
    passes = 4 if training.gradient_checkpointing else 3
    compared = stage == "dpo"  # with a frozen reference's forward pass
    exchanged = duration.zero(
        card, parameters, training.zero_stage, passes - 1, ranks, nodes, recipe.bytes_per_parameter
    )
    return {
        "learning": duration.computing(card, active(shape, parameters, row), tokens / ranks, passes + compared),
        "between GPUs": work.steps * exchanged,
        "Adam": work.steps * duration.adam(card, parameters, ranks, nodes, training.offload),
        "files": saving(parameters, training.epochs, 1 + compared, recipe.bytes_per_parameter),
    }


def active(shape: ModelShape, parameters: int, seen: float) -> float:
    """Parameters that a token passes, attention to ``seen`` tokens counted as parameters."""
    return parameters - shape.idle_parameters + duration.attending(shape.layers, shape.heads * shape.head_size, seen)


def ppo_step(recipe: Recipe, shape: ModelShape, prompt: float, answer: float, offload: bool) -> dict[str, float]:
    """Seconds of one update of step 3, by part; ``prompt`` and ``answer``: mean tokens.

    All models have the actor's size. ReMax has no critic, but a greedy answer to each prompt.
    """
    card, ranks, nodes = duration.CARDS[recipe.gpu_card], recipe.world_size, len(recipe.hosts())
    parameters, size = shape.causal_parameters, recipe.bytes_per_parameter
    prompt, answer = min(prompt, recipe.max_prompt_len), min(answer, recipe.max_answer_len)
    sequences = recipe.ppo_batch_size * recipe.ppo_accumulation_steps
    tokens, seen = sequences * (prompt + answer), min(recipe.ppo_tokens_per_micro_batch, sequences * (prompt + answer))
    if not recipe.ppo_tokens_per_micro_batch:
        tokens, seen = tokens / (1 - duration.PADDING), (prompt + answer) / (1 - duration.PADDING)
    through, rows = active(shape, parameters, seen), recipe.decoded_together
    trained, passes = (2 if recipe.with_critic else 1), 4 if recipe.ppo_gradient_checkpointing else 3

    def gathered(stage: int) -> float:
        return duration.exchange(card, parameters * size, ranks, nodes) if stage == 3 else 0

    # CUDA graphs need parameters that stay in their place; under ZeRO-3 each token gathers them.
    whole = recipe.actor_zero_stage != 3
    of_block, beside = duration.OPERATORS
    cache = memory.kv_cache(shape, rows, round(prompt + recipe.max_answer_len / 2), size)
    launches = 1 if whole else of_block * shape.layers + beside
    decoded = duration.decoding(
        card, parameters - shape.idle_parameters * (rows == 1), recipe.max_answer_len, size, rows, cache, launches
    )
    decoded += recipe.max_answer_len * gathered(recipe.actor_zero_stage)
    answers = 1 if recipe.with_critic else 2  # to a prompt
    critic = [recipe.critic_zero_stage] * recipe.with_critic
    exchanged = sum(
        duration.zero(card, parameters, stage, passes - 1, ranks, nodes, size)
        for stage in (recipe.actor_zero_stage, *critic)
    )
    scorers = (recipe.reference_zero_stage, *[recipe.reward_zero_stage] * answers * recipe.reward_models, *critic)
    return {
        "decoding": answers * decoded * sequences / rows,
        "scoring": duration.computing(card, through, tokens, len(scorers)),
        "learning": trained * duration.computing(card, through, tokens, passes),
        "between GPUs": exchanged + sum(gathered(stage) for stage in scorers),
        "Adam on the host" if offload else "Adam": trained * duration.adam(card, parameters, ranks, nodes, offload),
    }


def ppo_saving(recipe: Recipe, shape: ModelShape, steps: int) -> float:
    """Seconds of step 3's files: a checkpoint every PPO_SAVE_INTERVAL steps (0: an epoch) and at the end."""
    checkpoints = math.ceil(steps / recipe.ppo_save_interval) if recipe.ppo_save_interval else recipe.prompt_epochs
    return saving(memory.ppo_parameters(recipe, shape), checkpoints, 2, recipe.bytes_per_parameter)
