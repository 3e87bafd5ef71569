"""Where the time of each stage that trains goes, in seconds by part: a run's sizes put into duration.py's model."""

import math

from training_scripts.planning import duration, memory
from training_scripts.planning.model_shapes import ModelShape
from training_scripts.planning.recipe import ONE_ANSWER, Recipe

CLASSIFIERS = {"step2": 2, "step2_sequence": 1}
"""Stages that train a token classifier, and its labels."""


def optimizer_steps(examples: int, per_device: int, accumulation: int, ranks: int, epochs: int) -> int:
    """Optimiser steps of a stage whose last, smaller batch of an epoch is trained on too."""
    return epochs * math.ceil(examples / (per_device * accumulation * ranks))


def saving(parameters: int, checkpoints: int, models: int, size: int) -> float:
    """Seconds of reading ``models`` models, and of writing checkpoints and the trained parameters."""
    saved = memory.saved_model(parameters, size)
    return duration.files(checkpoints * memory.saved_training_state(parameters) + (models + 1) * saved)


def trained_alone(
    recipe: Recipe, shape: ModelShape, stage: str, examples: int, prompt: float, answer: float
) -> dict[str, float]:
    """Steps 1 and 2, DPO, FIGA. Batches are formed by length, so padding is left out.

    ``prompt`` and ``answer``: mean tokens. SFT has one answer to a prompt, the others have two.
    """
    card, ranks, nodes = duration.CARDS[recipe.gpu_card], recipe.world_size, len(recipe.hosts())
    training = recipe.trainings[stage]
    labels = CLASSIFIERS.get(stage)
    parameters = shape.classifier_parameters(labels) if labels else shape.causal_parameters
    answers = 3 if stage == "step2_grm" else 1  # it reads two before the one that it writes
    row = min(prompt + answers * answer, recipe.longest(stage))
    packed = labels and training.tokens_per_micro_batch
    second = 0 if stage in ONE_ANSWER else min(answer, row) if packed else row
    tokens = training.epochs * examples * (row + second)
    passes = 4 if training.gradient_checkpointing else 3
    compared = stage == "dpo"  # with a frozen reference's forward pass
    steps = optimizer_steps(examples, training.batch_size, training.accumulation_steps, ranks, training.epochs)
    exchanged = duration.zero(
        card, parameters, training.zero_stage, passes - 1, ranks, nodes, recipe.bytes_per_parameter
    )
    return {
        "learning": duration.computing(card, active(shape, parameters, row), tokens / ranks, passes + compared),
        "between GPUs": steps * exchanged,
        "Adam": steps * duration.adam(card, parameters, ranks, nodes, training.offload),
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
    trained = shape.causal_parameters + (shape.classifier_parameters(1) if recipe.with_critic else 0)
    checkpoints = math.ceil(steps / recipe.ppo_save_interval) if recipe.ppo_save_interval else recipe.prompt_epochs
    return saving(trained, checkpoints, 2, recipe.bytes_per_parameter)
