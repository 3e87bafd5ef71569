"""How much memory a stage needs, as formulas that return bytes.

What DeepSpeed keeps for a model with P parameters in 16 bit (ZeRO, Rajbhandari et al. 2020, section 3): 2 P for the
parameters, 2 P for their gradients, 12 P for the optimiser (fp32 parameters, momentum, variance), and while it steps 4
P for the gradients in fp32, when no activations are there. Offloaded, DeepSpeed 0.19.8 keeps 18 P on the host: all of
that, and what is reduced in 16 bit. ZeRO-1 divides the optimiser's part by the number of ranks, ZeRO-2 the gradients
too, ZeRO-3 everything. Activations were counted on what autograd really saves in transformers' blocks.
"""

from dataclasses import dataclass, field

from deepspeed_chat_tlcr.deepspeed_config import LIVE_PARAMETERS
from training_scripts.planning.model_shapes import ModelShape
from training_scripts.planning.recipe import ALONE, CLASSIFIERS, ONE_ANSWER, Recipe

GIB = 2**30
REDUCE_BUCKET = 500_000_000  # elements of DeepSpeed's gradient bucket (its default)
RESERVE = 3 * GIB  # CUDA context, NCCL and what the allocator cannot hand out, per GPU
# Bytes of a logit in transformers' language-model loss (itself 2, fp32 copy 4, log-softmax 4, gradient 4), and where
# only the chosen tokens' log-probabilities are needed (itself 2, gradient 2).
FULL_LOGITS, CHOSEN_LOGITS = 14, 4
SAVED_STATE = 12  # bytes of a parameter in a checkpoint to continue from: fp32 parameter, momentum and variance


@dataclass(frozen=True)
class States:
    """What one engine keeps all the time, in bytes: on each GPU, and in host memory over all ranks together."""

    parameters: float
    gradients: float
    optimizer: float
    step: float  # only while the optimiser steps
    buffers: float
    host: float


def model_states(
    parameters: int,
    *,
    zero_stage: int,
    ranks: int,
    trained: bool = True,
    offload: bool = False,
    largest_layer: int = 0,
    bytes_per_parameter: int = 2,
) -> States:
    """Memory of one DeepSpeed engine.

    ``offload`` puts the optimiser, its fp32 gradients, and under ZeRO-3 the parameters, in host memory.
    ``largest_layer``: parameters of the largest module, which ZeRO-3 gathers to compute.
    """
    size = bytes_per_parameter
    if zero_stage == 0 and size == 2:
        zero_stage = 1  # as deepspeed_config.py does in 16-bit training
    weights = parameters * size / (ranks if zero_stage == 3 else 1)
    host = 0.0
    # One module at least, and as many as may be gathered ahead of their turn.
    buffers = max(largest_layer, min(parameters, LIVE_PARAMETERS)) * size if zero_stage == 3 else 0
    if offload and zero_stage == 3:
        weights, host = 0, parameters * size
    if not trained:
        return States(weights, 0, 0, 0, buffers, host)
    gradients = parameters * size / (ranks if zero_stage >= 2 else 1)
    # Plain fp32 training needs no second copy of parameters and gradients; ZeRO keeps its flat copy all the same.
    copies = size == 2 or zero_stage > 0
    optimizer, step = parameters * (12 if copies else 8), parameters * (4 if copies else 0)
    # ZeRO-1 and 2 overlap communication with a second bucket.
    buffers += REDUCE_BUCKET * size * {0: 0, 1: 2, 2: 2, 3: 1}[zero_stage]
    if offload:
        return States(
            weights, 0 if zero_stage >= 2 else gradients, 0, 0, buffers, host + optimizer + step + 2 * parameters
        )
    shares = ranks if zero_stage >= 1 else 1
    return States(weights, gradients, optimizer / shares, step / shares, buffers, host)


def layer_activations(shape: ModelShape, tokens: int, size: int = 2) -> int:
    """Bytes that autograd keeps for one token in one block, in a sequence of ``tokens``.

    Llama: the inputs of both norms and their outputs (4 h; Gemma-2 has four norms), q and the attention's output (2 a),
    k and v, and four tensors of the gated MLP (of each expert that a token passes), in ``size`` bytes; both norms' fp32
    copies (8 h), and where q and k have norms theirs. OPT and its kind: eight tensors of width h (Phi has one norm
    less) and those of the MLP. Eager attention (Bloom's) also keeps a token's scores, and an fp32 copy of them.
    """
    h, attention, kv = shape.hidden, shape.heads * shape.head_size, shape.kv_size
    mlp = size * shape.mlp_kept * (shape.experts_used * shape.intermediate + shape.shared_expert)
    scores = shape.scores_kept * shape.heads * tokens * (size + 4)
    if shape.gated:
        norms = 4 * shape.norms * h + shape.qk_norm * (attention + kv) * (size + 4)
        return size * (2 * shape.norms * h + 2 * attention + 2 * kv) + mlp + norms + scores
    return size * (6 + shape.norms) * h + mlp + scores


def activations(shape: ModelShape, sequences: int, tokens: int, checkpointing: bool, size: int = 2) -> int:
    """Activations of a forward pass that will be differentiated.

    With gradient checkpointing: each block's input, and one block's activations while it is recomputed.
    """
    count, block = sequences * tokens, layer_activations(shape, tokens, size)
    if checkpointing:
        return count * (shape.layers * shape.hidden * size + block)
    return count * shape.layers * block


def learning(
    shape: ModelShape, sequences: int, tokens: int, checkpointing: bool, logits: float, size: int = 2
) -> float:
    """Peak of activations and logits: with checkpointing, logits are freed before a block is recomputed."""
    whole = activations(shape, sequences, tokens, checkpointing, size)
    if not checkpointing:
        return whole + logits
    block = sequences * tokens * layer_activations(shape, tokens, size)
    return whole - block + max(block, logits)


def kv_cache(shape: ModelShape, sequences: int, tokens: int, size: int = 2) -> int:
    """Keys and values of every block while responses are sampled."""
    return 2 * shape.layers * shape.kv_size * size * sequences * tokens


def largest_layer(shape: ModelShape) -> int:
    """Parameters of the largest module that ZeRO-3 gathers at once: a block or the embedding."""
    return max(shape.layer_parameters, shape.vocabulary * shape.embedding)


@dataclass(frozen=True)
class Need:
    """A stage's memory: rows of one GPU (bytes by name), and one node's host memory."""

    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def trained_parameters(shape: ModelShape, stage: str) -> int:
    """Of the one model that a stage of ``ALONE`` trains."""
    labels = CLASSIFIERS.get(stage)
    return shape.classifier_parameters(labels) if labels else shape.causal_parameters


def ppo_parameters(recipe: Recipe, shape: ModelShape) -> int:
    """Of the models that step 3 trains: the actor and, where there is one, the critic."""
    return shape.causal_parameters + (shape.classifier_parameters(1) if recipe.with_critic else 0)


def trained_alone(recipe: Recipe, shape: ModelShape, stage: str) -> Need:
    """Steps 1 and 2, DPO, FIGA: one model, a micro-batch at a time on each GPU."""
    training, parameters = recipe.trainings[stage], trained_parameters(shape, stage)
    ranks, size, tokens = recipe.world_size, recipe.bytes_per_parameter, recipe.longest(stage)
    # A record is mostly two sequences: the worse and the better response.
    sequences = (1 if stage in ONE_ANSWER else 2) * training.batch_size
    shared = {"ranks": ranks, "largest_layer": largest_layer(shape), "bytes_per_parameter": size}
    states = model_states(parameters, zero_stage=training.zero_stage, offload=training.offload, **shared)
    logits = 0 if stage in CLASSIFIERS else FULL_LOGITS * sequences * tokens * shape.vocabulary
    phases = {
        "forward and backward": learning(shape, sequences, tokens, training.gradient_checkpointing, logits, size),
        "the optimiser's step": states.step,
    }
    largest = max(phases, key=phases.__getitem__)
    gpu = {
        "parameters": states.parameters,
        "gradients": states.gradients,
        "optimiser": states.optimizer,
        "ZeRO's buffers": states.buffers,
        f"work: {largest}": phases[largest],
        "reserve": RESERVE,
    }
    if stage == "dpo":  # a frozen copy of the policy, partitioned where the policy is
        frozen = model_states(parameters, zero_stage=3 if training.zero_stage == 3 else 0, trained=False, **shared)
        gpu["reference"] = frozen.parameters + frozen.buffers
    nodes = len(recipe.hosts())
    loading = _loading(parameters, training.zero_stage, ranks / nodes, size)
    return Need(gpu=gpu, host={"offloaded": states.host / nodes, "loading": loading})


def ppo(recipe: Recipe, shape: ModelShape, offload: bool) -> Need:
    """Step 3: four models at once, three where the algorithm has no critic (ReMax).

    The working memory is the largest phase's: sampling, scoring, actor's, critic's.
    """
    ranks, nodes, size = recipe.world_size, len(recipe.hosts()), recipe.bytes_per_parameter
    counts = {
        "actor": (shape.causal_parameters, recipe.actor_zero_stage, True),
        "critic": (shape.classifier_parameters(1), recipe.critic_zero_stage, True),
        "reference": (shape.causal_parameters, recipe.reference_zero_stage, False),
        "reward model": (shape.classifier_parameters(2), recipe.reward_zero_stage, False),
    }
    if not recipe.with_critic:
        del counts["critic"]
    gpu: dict[str, float] = {}
    offloaded, loading, steps = 0.0, 0.0, {}
    for role, (parameters, stage, trained) in counts.items():
        states = model_states(
            parameters,
            zero_stage=stage,
            ranks=ranks,
            trained=trained,
            offload=offload and trained,
            largest_layer=largest_layer(shape),
            bytes_per_parameter=size,
        )
        gpu[role] = states.parameters + states.gradients + states.optimizer + states.buffers
        offloaded += states.host
        steps[role] = states.step
        loading = max(loading, _loading(parameters, stage, ranks / nodes, size))
    gpu["reward model"] *= recipe.reward_models
    tokens, checkpointing = recipe.max_prompt_len + recipe.max_answer_len, recipe.ppo_gradient_checkpointing
    trained_rows, scored_rows = recipe.ppo_batch_size, recipe.generation_batch_size
    chosen = CHOSEN_LOGITS * trained_rows * recipe.max_answer_len * shape.vocabulary
    scored = scored_rows * recipe.max_answer_len * shape.vocabulary
    decoded = 0 if recipe.rollout == "vllm" else recipe.decoded_together  # servers have the cache
    keys_and_values = kv_cache(shape, decoded, tokens, size)
    phases = {
        "sampling (KV cache)": keys_and_values if recipe.actor_zero_stage == 3 else 0,
        "scoring": scored_rows * tokens * layer_activations(shape, tokens, size) + 2 * scored,
        "actor's update": learning(shape, trained_rows, tokens, checkpointing, chosen, size),
        "critic's update": learning(shape, trained_rows, tokens, checkpointing, 0, size) * recipe.with_critic,
        "actor's step": steps["actor"],
        "critic's step": steps.get("critic", 0),
    }
    largest = max(phases, key=phases.__getitem__)
    if recipe.ppo_ema:  # in fp32, of the actor; each rank has a part, where its parameters are
        if offload and recipe.actor_zero_stage == 3:
            offloaded += 4 * shape.causal_parameters
        else:
            gpu["average of weights"] = 4 * shape.causal_parameters / ranks
    if recipe.actor_zero_stage != 3:
        gpu["KV cache"] = keys_and_values  # its place is part of the CUDA graphs that decode
    gpu[f"work: {largest}"] = phases[largest]
    gpu["reserve"] = RESERVE
    return Need(gpu=gpu, host={"offloaded": offloaded / nodes, "loading": loading})


def offloads_ppo(recipe: Recipe, shape: ModelShape) -> bool:
    """Whether step 3 keeps its optimisers in host memory: as PPO_OFFLOAD says, or where it does not fit otherwise."""
    if recipe.ppo_offload is not None:
        return recipe.ppo_offload
    return ppo(recipe, shape, offload=False).gpu_total > recipe.gpu_memory_gb * GIB


def stage_needs(recipe: Recipe, shape: ModelShape) -> dict[str, Need]:
    """Memory of each training stage of the run, by its folder."""
    needs = {}
    for stage, folder in recipe.folders().items():
        if stage in ALONE:
            needs[folder] = trained_alone(recipe, shape, stage)
        elif stage == "step3":
            needs[folder] = ppo(recipe, shape, offloads_ppo(recipe, shape))
    return needs


def _loading(parameters: int, zero_stage: int, ranks_on_node: float, size: int) -> float:
    """Every process of a node reads a whole copy before moving it to its GPU; ZeRO-3 partitions while reading."""
    return 0 if zero_stage == 3 else parameters * size * ranks_on_node
