"""What the evaluation tests share: a small bench in FastChat's form, a second tiny model, judges."""

import json
import re
from pathlib import Path

import torch
from conftest import tiny_llama, write_jsonl

from deepspeed_chat_tlcr.models import load_token_classifier
from deepspeed_chat_tlcr.tokenization import load_tokenizer

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Tell me of the sea.", "Shorter."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Can a bird rest?", "Why?"]},
    {"question_id": 111, "category": "math", "turns": ["One and one?", "And two?"]},
    {"question_id": 141, "category": "stem", "turns": ["What is a tree?", "And a cat?"]},
]


def write_bench(folder: Path) -> Path:
    """FastChat's llm_judge/data with four questions and prompts of our own under its names."""
    inner = folder / "mt_bench"
    (inner / "reference_answer").mkdir(parents=True)
    write_jsonl(inner / "question.jsonl", QUESTIONS)
    references = [
        {"question_id": q["question_id"], "choices": [{"index": 0, "turns": ["REFERENCE ONE", "REFERENCE TWO"]}]}
        for q in QUESTIONS[1:3]
    ]
    write_jsonl(inner / "reference_answer" / "gpt-4.jsonl", references)
    first, both = "Q: {question} A: {answer}", "Q: {question_1} {question_2} A: {answer_1} || {answer_2}"
    templates = {
        "single-v1": first,
        "single-math-v1": first + " R: {ref_answer_1}",
        "single-v1-multi-turn": both,
        "single-math-v1-multi-turn": both + " R: {ref_answer_1} {ref_answer_2}",
    }
    prompts = [
        {"name": name, "type": "single", "system_prompt": f"You judge by {name}.", "prompt_template": template}
        for name, template in templates.items()
    ]
    write_jsonl(folder / "judge_prompts.jsonl", prompts)
    return folder


def expected_rating(prompt: str) -> int:
    """What the scripted judge thinks of a prompt: 1 to 10, by its letters."""
    return sum(prompt.encode()) % 10 + 1


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(page: Path) -> str:
    """A page's text without its tags, scripts and styles."""
    body = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page.read_text())
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def other_model(folder: Path, tiny: Path, seed: int = 7) -> Path:
    """A tiny Llama with other weights and the same tokenizer."""
    return tiny_llama(folder, load_tokenizer(tiny / "model"), seed)


def reward_model(folder: Path, tiny: Path, labels: int, scale: float = 40.0) -> Path:
    """A token classifier with a head of random weights, large enough that its opinions differ between tokens."""
    torch.manual_seed(labels)
    tokenizer = load_tokenizer(tiny / "model")
    model = load_token_classifier(str(tiny / "model"), labels, torch.float32, new_head=True)
    with torch.no_grad():
        model.score.weight.mul_(scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
