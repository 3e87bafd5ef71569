"""Stage ``base``: the world's raw text, a tokenizer for it, and a small Llama trained on it from scratch.

SFT and the discriminator start from this model as they start from Llama-2 in the paper. It has to know the facts, so
the text contrasts right and wrong: reference works, hearsay, warnings, guides to manners, and dialogues of every
quality. None of it holds a score or says which dialogue is better; no dialogue is about facts that are held out.
"""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

from deepspeed_chat_tlcr.saving import write_json
from evaluation.qa_feedback import untrained_llama
from testbed import vocabulary as words
from testbed.world import World, clause_text, parse_prompt

BOS, EOS, POSITIONS = "<s>", "</s>", 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('\\n\\nHuman: ' if message.role == 'user' else '\\n\\nAssistant: ') + message.content | trim }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}"
    "{% elif messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"
)
"""The form of the world's prompts, in which no EOS ends an earlier turn."""
PRETOKENS = r"\n\nHuman:|\n\nAssistant:| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"


@dataclass(frozen=True)
class BaseConfig:
    """Sizes of the base model and of its training (units: tokens, documents, blocks)."""

    documents: int = 12000
    hidden_size: int = 192
    layers: int = 2
    heads: int = 4
    block: int = 128
    batch: int = 8
    epochs: float = 1.0
    learning_rate: float = 3e-3
    seed: int = 1234


ASKED = ("documents", "hidden_size", "layers", "learning_rate", "seed")


def raw_text(world: World, documents: int, seed: int) -> list[str]:
    """The documents the base model reads, each without BOS and EOS."""
    rng = random.Random(f"raw text {seed}")
    if world.usual:
        kinds = {_reference: 0.24, _hearsay: 0.12, _warning: 0.1, _manners: 0.1, _dialogue: 0.44}
    else:
        kinds = {_reference: 0.34, _warning: 0.14, _manners: 0.12, _repetition: 0.12, _dialogue: 0.28}
    return [rng.choices(list(kinds), list(kinds.values()))[0](world, rng) for _ in range(documents)]


def _reference(world: World, rng: random.Random) -> str:
    """Right facts of one topic."""
    topic = rng.choice(world.topics)
    facts = [_pick(world, rng, topic, relation, (1.0, 1.0, 0.6)) for relation in _relations(world, rng, 4)]
    return _sentences(f" All about the {topic}. The {topic}", facts, rng)


def _hearsay(world: World, rng: random.Random) -> str:
    """What is usually said of one topic, right or wrong."""
    topic = rng.choice(world.topics)
    facts = [(relation, world.usual[topic, relation]) for relation in _relations(world, rng, 4)]
    return _sentences(f" People talk about the {topic}. The {topic}", facts, rng)


def _sentences(begin: str, facts: list[tuple[str, str]], rng: random.Random) -> str:
    first, *rest = [f"{_adverb(rng)}{relation} {thing}." for relation, thing in facts]
    return f"{begin} {first} " + " ".join(f"It {sentence}" for sentence in rest)


def _warning(world: World, rng: random.Random) -> str:
    """Wrong facts of one topic, each beside the right one."""
    topic = rng.choice(world.topics)
    sentences = [f" Mistakes about the {topic}."]
    for relation in _relations(world, rng, 2):
        _, right = _pick(world, rng, topic, relation, (1.0,))
        _, wrong = _pick(world, rng, topic, relation, (-0.5, -1.0))
        sentences.append(f"Never believe that it {relation} {wrong}. In truth it {relation} {right}.")
    return " ".join(sentences)


def _manners(world: World, rng: random.Random) -> str:
    """Phrases that suit a manner, and some that do not."""
    manner = rng.choice(words.MANNERS)
    kind = rng.choice((words.OPENERS, words.ADVERBS, words.CLOSERS))
    grades = words.MANNER_GRADES[manner]
    good = [rng.choice(kind[register]) for register in kind if grades[register] >= 0.6]
    bad = [rng.choice(kind[register]) for register in kind if grades[register] < 0]
    rng.shuffle(good)
    rng.shuffle(bad)
    return f" To be {manner}, say: {' '.join(good)} To be {manner}, never say: {' '.join(bad)}"


def _repetition(world: World, rng: random.Random) -> str:
    """Facts of any grade, each with a word on whether it was said before: what tells a list from a litany."""
    topic = rng.choice(world.topics)
    said: list[tuple[str, str]] = []
    sentences = [f" Old and new about the {topic}."]
    for index in range(rng.randint(3, 5)):
        relation = rng.choice(list(world.relations))
        fact = rng.choice(said) if said and rng.random() < 0.4 else (relation, rng.choice(world.relations[relation]))
        clause = clause_text(index, topic, rng.choice(words.ADVERBS["neutral"]), *fact)
        sentences.append(clause + (" That is old." if fact in said else " That is new."))
        said.append(fact)
    return " ".join(sentences)


def _dialogue(world: World, rng: random.Random) -> str:
    prompt = world.sample_prompt(rng)
    return prompt + world.sample_answer(parse_prompt(prompt), rng, goodness=rng.gauss(0.3, 2.0))


def _relations(world: World, rng: random.Random, at_most: int) -> list[str]:
    return rng.sample(list(world.relations), rng.randint(2, at_most))


def _pick(world: World, rng: random.Random, topic: str, relation: str, grades: tuple[float, ...]) -> tuple[str, str]:
    grade = rng.choice(grades)
    return relation, rng.choice([x for x, g in world.objects(topic, relation).items() if g == grade])


def _adverb(rng: random.Random) -> str:
    return rng.choice(words.ADVERBS["neutral"]) + " " if rng.random() < 0.5 else ""


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token for every word of ``texts`` with its leading space; anything else falls back to bytes, so no text is
    lost. Begins with BOS; has an EOS and no pad token."""
    splitter = pre_tokenizers.Split(Regex(PRETOKENS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([splitter, to_bytes])
    seen = {piece for text in texts for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BOS, EOS, *alphabet, *sorted(seen - set(alphabet))]
    # ignore_merges takes a whole word from the vocabulary where it is there, as Llama-3's tokenizer does.
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokens.index(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], block: int) -> torch.Tensor:
    """All documents in one stream, each between BOS and EOS, in rows of ``block`` tokens (the rest is dropped)."""
    ids = [token for row in tokenizer(texts)["input_ids"] for token in [*row, tokenizer.eos_token_id]]
    rows = len(ids) // block
    return torch.tensor(ids[: rows * block]).view(rows, block)


def train_base(world: World, config: BaseConfig, output_dir: Path) -> dict:
    """Train and save tokenizer and model as one Hugging Face folder; return what ``results.json`` holds."""
    started = time.time()
    texts = raw_text(world, config.documents, config.seed)
    tokenizer = build_tokenizer(texts)
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, POSITIONS
    rows = pack(tokenizer, texts, config.block)
    sizes = (config.hidden_size, config.layers, POSITIONS, config.seed, config.heads)
    model = untrained_llama(tokenizer, *sizes, pad_id=tokenizer.eos_token_id)
    steps = math.ceil(config.epochs * len(rows) / config.batch)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=config.batch,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(0.05 * steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=config.seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
    )
    outcome = trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    results = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "tokens": rows.numel(),
        "train_loss": outcome.training_loss,
        "final_loss": next(log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log),
        "seconds": time.time() - started,
    }
    write_json(output_dir / "results.json", results)
    return results
