"""What a run will cost, before it starts: labelling in calls, tokens and US$, memory, steps and disk.

``PLAN=1 bash training_scripts/run_7b.sh`` prints it. Needs no GPU, API key, network or installed package; local data is
counted exactly where the packages are there. All numbers are estimates: memory.py has the formulas for memory,
deepspeed_chat_tlcr/asking/money.py those for calls.
"""

import dataclasses
import datetime
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deepspeed_chat_tlcr.asking.models import BATCH_DISCOUNT, Price, known_model, price_of
from deepspeed_chat_tlcr.asking.money import BYTES_PER_TOKEN, EXPLANATION_TOKENS, Estimate, estimate
from deepspeed_chat_tlcr.asking.redaction import without_secrets
from deepspeed_chat_tlcr.data.split import part_sizes
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from labeling.prompt import TEMPLATE
from training_scripts.planning import duration, hours, memory
from training_scripts.planning.hours import CLASSIFIERS, optimizer_steps
from training_scripts.planning.memory import GIB, Need
from training_scripts.planning.model_shapes import ModelShape, shape_of
from training_scripts.planning.recipe import ALONE, Recipe

HUB_RECORDS = {"dahoas/full-hh-rlhf": 112_052, "dahoas/rm-static": 76_256}
"""Training records of hub data sets that the plan knows without the network."""

LABEL_CONCURRENCY = 32  # calls in flight, labeling/main.py's default
REVISERS = ("gpt-6-luna", "gpt-6.1-terra", "gpt-6-sol")  # whose price a plan shows beside that of the chosen one

HH_CHARACTERS = (650, 310, 310)
"""Mean length of prompt, chosen and rejected in HH-RLHF, from the byte counts published with its hub copies."""


@dataclass(frozen=True)
class Texts:
    """How many records the data holds, and the mean lengths in characters of prompt, chosen and rejected."""

    records: int
    prompt: float
    chosen: float
    rejected: float
    exact: bool


def labelling(recipe: Recipe, texts: Texts) -> Estimate:
    """Calls, tokens and US$ of revising the reward part, one call a record."""
    calls = part_sizes(texts.records, recipe.data_split)[1]
    question = len(TEMPLATE) + texts.prompt + texts.chosen + texts.rejected
    known = known_model(recipe.label_model)
    price, effort = label_price(recipe), recipe.label_effort
    if effort == "lowest":
        effort = known.efforts[0] if known and known.efforts else "none"
    if price and recipe.label_batch:
        price = price.discounted(known.batch if known else BATCH_DISCOUNT)
    sizes = (calls, round(calls * question), round(calls * texts.rejected))
    return estimate(*sizes, price, concurrency=LABEL_CONCURRENCY, effort=effort)


def label_price(recipe: Recipe) -> Price | None:
    """US$ per million tokens of what labels; 0 on a machine of the user's own, None where nobody has said it."""
    if recipe.label_price:
        return Price.parse(recipe.label_price, "LABEL_PRICE")
    return price_of(recipe.label_model, recipe.label_base_url or None)


def find_texts(recipe: Recipe) -> Texts | str:
    """The data's size, or a sentence that says why it is not known."""
    paths = recipe.data.split()
    if any(Path(path).exists() for path in paths):
        try:
            from deepspeed_chat_tlcr.data.preferences import load_preferences
        except ImportError as error:
            return f"the data cannot be counted without the packages ({error.name} is missing)"
        records = load_preferences(paths, "all", "train", recipe.data_split)
        sample = [records[index] for index in range(0, len(records), max(1, len(records) // 2000))]
        lengths = ([len(getattr(record, part)) for record in sample] for part in ("prompt", "chosen", "rejected"))
        return Texts(len(records), *(sum(column) / len(sample) for column in lengths), exact=True)
    if recipe.made_here:
        return "the run makes its own data, of the size that its commands say"
    known = [HUB_RECORDS.get(path.lower()) for path in paths]
    if None in known:
        return f"how many records {paths[known.index(None)]} has is not known here"
    return Texts(sum(known), *HH_CHARACTERS, exact=False)


def offloads_ppo(recipe: Recipe, shape: ModelShape) -> bool:
    """Whether step 3 keeps its optimisers in host memory: as PPO_OFFLOAD says, or where it does not fit otherwise."""
    if recipe.ppo_offload is not None:
        return recipe.ppo_offload
    needs = stage_needs(dataclasses.replace(recipe, stages="step3", ppo_offload=False), shape)
    return needs[recipe.ppo_folder].gpu_total > recipe.gpu_memory_gb * GIB


def stage_needs(recipe: Recipe, shape: ModelShape) -> dict[str, Need]:
    """Memory of each training stage of the run, by its folder."""
    offload_ppo = "step3" in recipe.folders() and offloads_ppo(recipe, shape)
    ranks, nodes, size = recipe.world_size, len(recipe.hosts()), recipe.bytes_per_parameter
    shared = {"ranks": ranks, "nodes": nodes, "size": size}
    needs = {}
    for stage, folder in recipe.folders().items():
        if stage in ALONE:
            training = recipe.trainings[stage]
            labels = CLASSIFIERS.get(stage)
            needs[folder] = memory.trained_alone(
                shape,
                shape.classifier_parameters(labels) if labels else shape.causal_parameters,
                # A record is two sequences everywhere but in SFT: the worse and the better response.
                sequences=(1 if stage == "step1" else 2) * training.batch_size,
                tokens=recipe.max_seq_len,
                scored_logits=not labels,
                zero_stage=training.zero_stage,
                offload=training.offload,
                checkpointing=training.gradient_checkpointing,
                **shared,
            )
            if stage == "dpo":
                needs[folder] = memory.with_reference(needs[folder], shape, training.zero_stage, ranks, size)
        elif stage == "step3":
            needs[folder] = memory.ppo(
                shape,
                with_critic=recipe.with_critic,
                decoded_sequences=0 if recipe.rollout == "vllm" else recipe.decoded_together,  # servers have the cache
                generated_sequences=recipe.generation_batch_size,
                trained_sequences=recipe.ppo_batch_size,
                prompt_tokens=recipe.max_prompt_len,
                answer_tokens=recipe.max_answer_len,
                actor_stage=recipe.actor_zero_stage,
                critic_stage=recipe.critic_zero_stage,
                reference_stage=recipe.reference_zero_stage,
                reward_stage=recipe.reward_zero_stage,
                offload=offload_ppo,
                checkpointing=recipe.ppo_gradient_checkpointing,
                averaged=recipe.ppo_ema,
                **shared,
            )
    return needs


@dataclass(frozen=True)
class Disk:
    """Bytes that a stage writes under OUTPUT: what stays, and what it deletes when it is finished."""

    model: int
    checkpoints: int


def disk_needs(recipe: Recipe, shape: ModelShape) -> dict[str, Disk]:
    """Disk by stage. A new checkpoint is whole before the old one goes, so for a moment there are two."""
    written = {
        "step2": shape.classifier_parameters(2),
        "step2_sequence": shape.classifier_parameters(1),
        "step3": shape.causal_parameters + (shape.classifier_parameters(1) if recipe.with_critic else 0),
    }
    parameters = {
        folder: written.get(stage, shape.causal_parameters)
        for stage, folder in recipe.folders().items()
        if stage != "label"
    }
    size = recipe.bytes_per_parameter
    needs = {
        stage: Disk(memory.saved_model(count, size), 2 * memory.saved_training_state(count))
        for stage, count in parameters.items()
    }
    if recipe.ppo_ema and recipe.ppo_folder in needs:  # a third model; in checkpoints its fp32 numbers
        step3, count = needs[recipe.ppo_folder], shape.causal_parameters
        needs[recipe.ppo_folder] = Disk(
            step3.model + memory.saved_model(count, size), step3.checkpoints + 2 * 4 * count
        )
    return needs


def most_disk(needs: Iterable[Disk]) -> int:
    """The most that stages run one after the other have on disk at a time: all models, and one stage's checkpoints."""
    needs = list(needs)
    return sum(need.model for need in needs) + max((need.checkpoints for need in needs), default=0)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(f"  {line}" for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def labelling_report(recipe: Recipe, texts: Texts | str, today: datetime.date | None = None) -> str:
    where = f" at {without_secrets(recipe.label_base_url)}" if recipe.label_base_url else ""
    title = f"Labelling by {recipe.label_model or 'the model served'}{where}"
    known = known_model(recipe.label_model)
    end = known and not recipe.label_base_url and known.end(today or datetime.date.today())
    warning = f"\n  warning: {end} (LABEL_MODEL)" if end else ""
    if isinstance(texts, str):
        return f"{title}: {texts}{warning}"
    names = [recipe.label_model]
    if not recipe.label_base_url and not recipe.label_price:
        names += [name for name in REVISERS if name != recipe.label_model]
    rows = [_reviser_row(recipe, texts, name) for name in names]
    source = "lengths of the data" if texts.exact else "mean lengths of HH-RLHF"
    read = f"; prices read on {known.read}" if known and known.read and not recipe.label_price else ""
    return (
        f"{title}, for the reward part of {recipe.data} at {recipe.data_split} ({texts.records:,} records)\n"
        + table(("reviser", "calls", "input tokens", "output tokens", "hours", "US$", "US$ by Batch"), rows)
        + f"\n  (from the {source}, {BYTES_PER_TOKEN:g} characters a token, {EXPLANATION_TOKENS} tokens of explanation "
        f"and\n  hidden reasoning as usual at LABEL_EFFORT={recipe.label_effort}; {LABEL_CONCURRENCY} calls at a time; "
        f"retries not\n  counted{read})" + warning
    )


def _reviser_row(recipe: Recipe, texts: Texts, name: str) -> tuple[str, ...]:
    """What labelling costs by one model, plain and by the Batch API."""
    chosen = replace(recipe, label_model=name, label_batch=False)
    cost, batch = labelling(chosen, texts), labelling(replace(chosen, label_batch=True), texts)
    usd = [f"{each.usd:,.2f}" if each.usd else "unknown" for each in (cost, batch)]
    if cost.usd == 0:
        usd = ["none", "none"]
    tokens = (f"{cost.calls:,}", f"{cost.prompt_tokens:,}", f"{cost.completion_tokens:,}", f"{cost.hours:.1f}")
    return (name or "(the one served)", *tokens, *usd)


def steps_report(recipe: Recipe, texts: Texts | str) -> str:
    if isinstance(texts, str):
        return f"Optimiser steps: {texts}"
    sft, reward, rl = part_sizes(texts.records, recipe.data_split)
    ranks = recipe.world_size
    rows = []
    for stage, folder in recipe.folders().items():
        if stage in ALONE:
            training = recipe.trainings[stage]
            examples = sft if stage == "step1" else reward
            per_device, accumulation, epochs = training.batch_size, training.accumulation_steps, training.epochs
        elif stage == "step3":
            examples, per_device = rl, recipe.ppo_batch_size
            accumulation, epochs = recipe.ppo_accumulation_steps, recipe.prompt_epochs
        else:
            continue
        batch = per_device * accumulation * ranks
        steps = optimizer_steps(examples, per_device, accumulation, ranks, epochs)
        rows.append((folder, f"{examples:,}", f"{batch:,}", str(epochs), f"{steps:,}"))
    return "Optimiser steps, at most (records that are too long are left out)\n" + table(
        ("stage", "records", "global batch", "epochs", "steps"), rows
    )


def stage_seconds(recipe: Recipe, shape: ModelShape, texts: Texts) -> dict[str, dict[str, float]]:
    """Seconds of each stage that trains, by part."""
    sft, reward, rl = part_sizes(texts.records, recipe.data_split)
    prompt, answer = _mean_tokens(texts)
    seconds = {}
    for stage, folder in recipe.folders().items():
        if stage in ALONE:
            examples = sft if stage == "step1" else reward
            seconds[folder] = hours.trained_alone(recipe, shape, stage, examples, prompt, answer)
        elif stage == "step3":
            sizes = recipe.ppo_batch_size, recipe.ppo_accumulation_steps, recipe.world_size, recipe.prompt_epochs
            steps = optimizer_steps(rl, *sizes)
            step = hours.ppo_step(recipe, shape, prompt, answer, offloads_ppo(recipe, shape))
            seconds[folder] = {part: steps * each for part, each in step.items()}
            seconds[folder]["files"] = hours.ppo_saving(recipe, shape, steps)
    return seconds


def hours_report(recipe: Recipe, shape: ModelShape, texts: Texts | str) -> str:
    """Hours of each stage that trains, US$ where GPU_HOUR_USD is set, and where the time goes."""
    if isinstance(texts, str):
        return f"Hours: {texts}"
    try:
        price = float(recipe.gpu_hour_usd or 0)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise InputError(f"GPU_HOUR_USD={recipe.gpu_hour_usd}: expected a number of US$, such as 2.5")
    card = duration.CARDS[recipe.gpu_card]
    seconds, ranks, factor = stage_seconds(recipe, shape, texts), recipe.world_size, duration.UNCERTAINTY
    order = ("decoding", "scoring", "learning", "between GPUs", "Adam", "Adam on the host", "files")
    columns = [part for part in order if any(part in parts for parts in seconds.values())]
    rows = []
    for folder, parts in [*seconds.items(), ("together", _sums(seconds.values()))]:
        whole = sum(parts.values()) / 3600
        dollars = [f"{whole * ranks * price:,.0f}"] if price else []
        minutes = (f"{parts[part] / 60:.1f}" if part in parts else "" for part in columns)
        rows.append((folder, f"{whole:.2f}", f"{whole / factor:.2f}-{whole * factor:.2f}", *dollars, *minutes))
    priced = f", at US$ {price:g} per GPU hour" if price else " (GPU_HOUR_USD=… adds US$)"
    header = ("stage", "hours", "between", *(["US$"] if price else []), *columns)
    notes = []
    if (folder := recipe.folders().get("step3")) in seconds:
        step = hours.ppo_step(recipe, shape, *_mean_tokens(texts), offloads_ppo(recipe, shape))
        parts = ", ".join(f"{name} {part:.2f}" for name, part in step.items())
        notes.append(f"a step of {folder}: {sum(step.values()):.1f} s ({parts})")
    notes.append(
        f"by arithmetic, not measured: {card.utilisation:.0%} of the card's operations, {card.share:.0%} of its "
        f"bandwidth; files at {duration.FILES / 1e9:g} GB/s;\n  "
        "evaluation and starting up are not counted; duration.py has the figures and where they come from"
    )
    return (
        f"Hours on {ranks} x {recipe.gpu_card}, within a factor of {factor:g}{priced}; minutes by part\n"
        + table(header, rows)
        + "".join(f"\n  {note}" for note in notes)
    )


def _mean_tokens(texts: Texts) -> tuple[float, float]:
    """Of a prompt and of an answer."""
    return texts.prompt / BYTES_PER_TOKEN, (texts.chosen + texts.rejected) / 2 / BYTES_PER_TOKEN


def _sums(many: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in many:
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return total


def memory_report(recipe: Recipe, shape: ModelShape) -> str:
    parts = []
    settings = {}
    for stage, folder in recipe.folders().items():
        if stage in ALONE:
            training = recipe.trainings[stage]
            settings[folder] = f"ZeRO-{training.zero_stage}" + ", offload" * training.offload
        elif stage == "step3":
            critic = f"critic {recipe.critic_zero_stage}, " if recipe.with_critic else "no critic, "
            offloaded = "actor and critic" if recipe.with_critic else "actor"
            settings[folder] = (
                f"ZeRO actor {recipe.actor_zero_stage}, {critic}"
                f"reference {recipe.reference_zero_stage}, reward {recipe.reward_zero_stage}"
            ) + f", offload of {offloaded}" * offloads_ppo(recipe, shape)
    for name, need in stage_needs(recipe, shape).items():
        rows = [(label, gib(size)) for label, size in need.gpu.items() if size]
        rows.append((f"total per GPU (of {recipe.gpu_memory_gb:g})", gib(need.gpu_total)))
        rows += [(f"host memory per node: {label}", gib(size)) for label, size in need.host.items() if size]
        note = ""
        if need.gpu_total > recipe.gpu_memory_gb * GIB:
            note = "\n  does not fit: lower the batch size, raise the ZeRO stage, or switch offload or checkpointing on"
        parts.append(f"Memory of {name} ({settings[name]})\n" + table((name, "GiB"), rows) + note)
    return "\n\n".join(parts)


def disk_report(recipe: Recipe, shape: ModelShape) -> str:
    needs = disk_needs(recipe, shape)
    rows = [(stage, gib(need.model), gib(need.checkpoints)) for stage, need in needs.items()]
    total = ("the most at a time", gib(most_disk(needs.values())), "")
    return (
        f"Disk under {recipe.output}, in GiB (2^30 bytes) as df -h; checkpoints go when their stage is finished\n"
        + table(("GiB", "models", "checkpoints"), [*rows, total])
    )


def training_reports(recipe: Recipe, texts: Texts | str) -> list[str]:
    """Steps, memory and disk of the stages that train."""
    sections = [steps_report(recipe, texts)]
    try:
        shape = shape_of(recipe.model, recipe.model_config)
    except InputError as error:
        unknown = "the run makes its own model, a small one" if recipe.made_here else error
        return [*sections, f"Memory and disk: {unknown}"]
    ranks = f"{recipe.world_size} process(es) on {len(recipe.hosts())} node(s), {recipe.dtype}"
    told = f"{recipe.model}: {shape.causal_parameters:,} parameters; {ranks}. What follows is estimated, not measured."
    sections.append(hours_report(recipe, shape, texts))
    return [*sections, told, memory_report(recipe, shape), disk_report(recipe, shape)]


def decide_offload(recipe: Recipe) -> None:
    """Print 1 or 0 for step3.sh, and why on stderr."""
    try:
        offload = offloads_ppo(recipe, shape_of(recipe.model, recipe.model_config))
        fits = "does not fit" if offload else "fits"
        why = f"without it the plan {fits} into GPU_MEMORY_GB={recipe.gpu_memory_gb:g}"
    except InputError as error:
        offload, why = True, str(error)
    print(f"PPO_OFFLOAD=auto: optimisers {'in host' if offload else 'in GPU'} memory ({why})", file=sys.stderr)
    print(int(offload))


@exits_cleanly
def main() -> None:
    recipe = Recipe.from_environment()
    if sys.argv[1:] == ["--decide_offload"]:
        decide_offload(recipe)
        return
    texts = find_texts(recipe)
    sections = [labelling_report(recipe, texts)] if recipe.labels_here else []
    if set(recipe.folders()) - {"label"}:
        sections += training_reports(recipe, texts)
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
