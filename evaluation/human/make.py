"""One page for each annotator: blind, each item's answers in a shuffled order, offline, exported as JSON.

python evaluation/human/make.py --answers sft=OUT/answers/…/sft.jsonl tlcr=OUT/answers/…/tlcr.jsonl \
    --prompts OUT/answers/….jsonl --annotators ann bob cy --out OUTPUT

Writes OUTPUT/human/pages/NAME.html, to be sent to the annotators, and OUTPUT/human/key.json, which says whose answer is
whose and is not sent to them. evaluation/human/count.py counts what comes back.
"""

import base64
import hashlib
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from importlib import resources
from pathlib import Path

from deepspeed_chat_tlcr.arguments import option, parse, seed_option
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.pictures import escape, visible
from deepspeed_chat_tlcr.pictures.page import theme_style
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.saving import write_json
from evaluation.options import OutOptions
from evaluation.policies import ASSISTANT, read_replies
from evaluation.prompts import prompts_of_file

MOST_MODELS = 9  # a key each


@dataclass(frozen=True, kw_only=True)
class Options(OutOptions):
    """Make the voting pages."""

    answers: list[str] = option(MISSING, "NAME=FILE of each model: answers as the other parts write them")
    prompts: str = option(MISSING, "file of the prompts that were answered ('instruction' or 'prompt')")
    annotators: list[str] = option(MISSING, "names, a page each")
    items: int = option(50, "most prompts to vote on, drawn at random; 0: all", least=0)
    question: str = option("Which answer is better?", "what the annotator is asked")
    no_tie: bool = option(False, "every item must be decided: no key for “no preference”")
    seed: int = seed_option(1234, "seed of the draw and of all shuffling")


@dataclass(frozen=True)
class Item:
    """A prompt and every model's answer, by name."""

    id: str
    prompt: str
    answers: Mapping[str, str]


def read_items(options: Options) -> list[Item]:
    """The prompts that every model has answered. Raises ``InputError`` for files that do not belong together."""
    models: dict[str, dict] = {}
    for entry in options.answers:
        name, equals, path = entry.partition("=")
        if not equals or not name or name in models:
            raise InputError(f"--answers {entry}: expected NAME=FILE, each name once")
        models[name] = dict(read_replies(Path(path)))
    if not 2 <= len(models) <= MOST_MODELS:
        raise InputError(f"--answers: {len(models)} models; a vote needs 2 to {MOST_MODELS}")
    items = []
    for question in prompts_of_file(options.prompts, 1.0, for_models=False):
        if all(question.id in given for given in models.values()):
            answers = {name: given[question.id].turns[0].strip() for name, given in models.items()}
            prompt = question.turns[0].strip().removesuffix(ASSISTANT.strip()).rstrip()
            items.append(Item(question.id, prompt, answers))
    if not items:
        raise InputError(f"--prompts {options.prompts}: none of its prompts was answered by every model")
    items = list({item.id: item for item in items}.values())
    random.Random(options.seed).shuffle(items)
    return items[: options.items or None]


def study_id(items: Sequence[Item]) -> str:
    """Changes with any prompt or answer: a vote belongs to exactly these texts."""
    content = [[item.id, item.prompt, sorted(item.answers.items())] for item in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def slots(items: Sequence[Item], annotator: str, seed: int) -> dict[str, list[str]]:
    """For one annotator: each item's models in the order in which their answers are shown; items shuffled too."""
    draw = random.Random(f"{seed} {annotator}")
    order = list(items)
    draw.shuffle(order)
    return {item.id: draw.sample(list(item.answers), len(item.answers)) for item in order}


def page(items: Sequence[Item], shown: Mapping[str, list[str]], study: str, annotator: str, options: Options) -> str:
    """A whole HTML document that knows no model's name."""
    by_id = {item.id: item for item in items}
    data = {
        "study": study,
        "annotator": annotator,
        "question": visible(options.question),
        "tie": not options.no_tie,
        "items": [
            {
                "id": id,
                "prompt": visible(by_id[id].prompt),
                "answers": [visible(by_id[id].answers[name]) for name in names],
            }
            for id, names in shown.items()
        ],
    }
    files = resources.files(__package__ or "evaluation.human")
    style = theme_style() + (files / "vote.css").read_text("utf-8")
    script = (files / "vote.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    # Inside a script element only "<" could end the data.
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    title = escape(visible(options.question))
    parts = {"POLICY": policy, "TITLE": title, "STYLE": style, "SCRIPT": script, "DATA": content}
    template = (files / "vote.html").read_text("utf-8")
    return re.sub("|".join(parts), lambda found: parts[found[0]], template)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(Options, argv)
    names = options.annotators
    if not names or len(set(names)) != len(names) or not all(re.fullmatch(r"[\w.+-]+", name) for name in names):
        raise InputError("--annotators: one or more different names of letters, digits and . + - _")
    items = read_items(options)
    study, folder = study_id(items), Path(options.out) / "human"
    key = {"study": study, "models": list(items[0].answers), "seed": options.seed, "tie": not options.no_tie}
    key["slots"] = {name: slots(items, name, options.seed) for name in names}
    if (folder / "key.json").exists() and read_json(folder / "key.json") != key:
        raise InputError(f"{folder / 'key.json'} belongs to other pages, whose votes it counts; choose another --out")
    (folder / "pages").mkdir(parents=True, exist_ok=True)
    write_json(folder / "key.json", key)
    for name in names:
        path = folder / "pages" / f"{name}.html"
        path.write_text(page(items, key["slots"][name], study, name, options), encoding="utf-8")
        print(path)
    print(f"{len(items)} items, {len(key['models'])} models; keep {folder / 'key.json'} secret: it names them")


if __name__ == "__main__":
    sys.exit(main())
