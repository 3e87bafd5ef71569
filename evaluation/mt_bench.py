"""MT-Bench (Table 1): two-turn answers of the user's models, rated 1 to 10 by a judge, in FastChat's files.

python evaluation/mt_bench.py --models sft=OUT/step1_sft tlcr=OUT/step3_ppo_tlcr/actor --mt_bench_dir FASTCHAT \
    --judge gpt-6-luna --out OUTPUT

OUTPUT/mt_bench/model_answer/NAME.jsonl and model_judgment/JUDGE_single.jsonl are FastChat's; its show_result.py reads
them. Questions, prompts and reference answers come from --mt_bench_dir: a checkout of FastChat, or its llm_judge/data.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from deepspeed_chat_tlcr.asking.journal import replace_file
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_jsonl
from evaluation.judging import Judged, Shortfall, Verdicts, check_judge, file_name, judge_all, message_id
from evaluation.options import JudgeOptions, MtBenchOptions, PolicyOptions
from evaluation.policies import Question, Replies, answers_of, is_text, parse_models, read_replies
from evaluation.report import part_program
from evaluation.results import save_results
from evaluation.stats import bootstrap_interval
from evaluation.verdicts import read_rating

NEEDS_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
# FastChat's sampling temperatures; a category that it does not know gets 0.7.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "arena-hard-200": 0.0}
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
TURNS = ("turn 1", "turn 2")
PROMPTS = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
NOT_RATED = -1  # FastChat's score of a judgment without a rating, which show_result.py leaves out


@dataclass(frozen=True, kw_only=True)
class Options(MtBenchOptions, PolicyOptions, JudgeOptions):
    """MT-Bench: answers, ratings, Table 1."""


@dataclass(frozen=True)
class Bench:
    """What FastChat's folder holds: ``questions`` in order, judge prompts by name, reference turns by question id."""

    questions: list[dict]
    prompts: dict[str, dict]
    references: dict[int | str, list[str]]

    @cached_property
    def asked(self) -> list[Question]:
        return [Question(q["question_id"], q["turns"], TEMPERATURES.get(q["category"], 0.7)) for q in self.questions]

    def prompt_name(self, question: dict, turn: int) -> str:
        kind = "single-math-v1" if question["category"] in NEEDS_REFERENCE else "single-v1"
        return kind if turn == 1 else f"{kind}-multi-turn"

    def messages(self, question: dict, answers: Sequence[str], turn: int) -> list[dict]:
        """What the judge is sent about turn 1 or 2 of an answered question."""
        prompt = self.prompts[self.prompt_name(question, turn)]
        turns, reference = question["turns"], self.references.get(question["question_id"], ["", ""])
        fields = {"question": turns[0], "answer": answers[0]}
        for number in range(turn):
            fields[f"question_{number + 1}"], fields[f"answer_{number + 1}"] = turns[number], answers[number]
            fields[f"ref_answer_{number + 1}"] = reference[number]
        user = prompt["prompt_template"].format(**fields)
        return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": user}]


def find(folder: Path, *names: str) -> Path:
    """A file of FastChat's, whichever of the folders above it the user names."""
    for place in ("", "mt_bench", "llm_judge/data", "fastchat/llm_judge/data", "data"):
        for name in names:
            for inner in ("", "mt_bench"):
                if (path := folder / place / inner / name).is_file():
                    return path
    raise InputError(f"--mt_bench_dir {folder}: no {names[-1]} in it; give FastChat's checkout or its llm_judge/data")


def read_bench(mt_bench_dir: str | None, judge: str | None = None) -> Bench:
    """Raises ``InputError`` naming file and line, or what is missing, before any model is loaded."""
    if not mt_bench_dir:
        raise InputError("--mt_bench_dir is missing: FastChat's checkout (github.com/lm-sys/FastChat), or its data")
    folder = Path(mt_bench_dir)
    questions = read_questions(find(folder, "question.jsonl"))
    path = find(folder, "judge_prompts.jsonl")
    prompts = {record.get("name"): record for _, record in read_jsonl(path)}
    if absent := [name for name in PROMPTS if name not in prompts]:
        raise InputError(f"{path}: no judge prompt {', '.join(absent)}")
    own = [f"reference_answer/{judge}.jsonl"] if judge else []
    references_path = find(folder, *own, "reference_answer/gpt-4.jsonl")
    references = {id: reply.turns for id, reply in read_replies(references_path)}
    bench = Bench(questions, prompts, references)
    for question in questions:
        id, turns = question["question_id"], question["turns"]
        if question["category"] in NEEDS_REFERENCE and len(references.get(id, ())) < len(turns):
            raise InputError(f"{references_path}: no reference answer to each turn of question {id}")
        for turn in range(1, len(turns) + 1):
            try:
                bench.messages(question, [""] * len(turns), turn)
            except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
                name = bench.prompt_name(question, turn)
                raise InputError(f"{path}: the prompt {name} does not fit question {id} ({error!r})") from None
    return bench


def read_questions(path: Path) -> list[dict]:
    """FastChat's ``question.jsonl``. Raises ``InputError`` naming the line."""
    questions: dict[int | str, dict] = {}
    for line, record in read_jsonl(path):
        id, category, turns = record.get("question_id"), record.get("category", ""), record.get("turns")
        fits = isinstance(id, int | str) and isinstance(category, str) and isinstance(turns, list)
        if not fits or len(turns) not in (1, 2) or not all(map(is_text, turns)):
            raise InputError(f"{path}:{line}: expected question_id, category and one or two turns, which are texts")
        if id in questions:
            raise InputError(f"{path}:{line}: question_id {id} is there twice")
        questions[id] = {**record, "category": category}
    if not questions:
        raise InputError(f"{path}: no questions")
    return list(questions.values())


# ---- judgments -------------------------------------------------------------------------------------------------------


def requests(bench: Bench, replies: Replies) -> dict[tuple, Judged]:
    """What is asked, by (model, question's place, turn)."""
    asked = {}
    for name, given in replies.items():
        for place, question in enumerate(bench.questions):
            answers = given[question["question_id"]].turns
            for turn in range(1, len(question["turns"]) + 1):
                asked[name, place, turn] = Judged(bench.messages(question, answers, turn), answers[:turn])
    return asked


def judge(bench: Bench, replies: Replies, folder: Path, options: JudgeOptions) -> tuple[dict[tuple, float], Verdicts]:
    """Ratings by (model, question's place, turn), NaN where there is none; FastChat's file of them is written."""
    asked = requests(bench, replies)
    ids = {key: message_id(one.messages) for key, one in asked.items()}
    questions = {ids[key]: one for key, one in asked.items()}
    verdicts = judge_all(folder, questions, read_rating, options)
    lines, ratings = [], {}
    for key, one in asked.items():
        name, place, turn = key
        verdict, question = verdicts.by_id.get(ids[key]), bench.questions[place]
        ratings[key] = verdict["score"] if verdict else math.nan
        if verdict or verdicts.stopped is None:
            record = {
                "question_id": question["question_id"],
                "model": name,
                "judge": [options.judge, bench.prompt_name(question, turn)],
                "user_prompt": one.messages[-1]["content"],
                "judgment": verdict["judgment"] if verdict else "",
                "score": verdict["score"] if verdict else NOT_RATED,
                "turn": turn,
                "tstamp": verdict["tstamp"] if verdict else 0.0,
            }
            lines.append(json.dumps(record) + "\n")
    (folder / "model_judgment").mkdir(parents=True, exist_ok=True)
    replace_file(folder / "model_judgment" / f"{file_name(options.judge)}_single.jsonl", lines)
    return ratings, verdicts


def summarise(bench: Bench, ratings: dict[tuple, float], names: Sequence[str]) -> dict:
    """Table 1 of the user's models with 95 % intervals; by category; differences to the first model, paired."""
    columns = {}  # (Q, 2) ratings by question and turn
    for name in names:
        rows = [
            [ratings.get((name, place, turn), math.nan) for turn in (1, 2)] for place in range(len(bench.questions))
        ]
        columns[name] = np.array(rows)
    categories = list(dict.fromkeys(question["category"] for question in bench.questions))
    inside = {c: np.array([q["category"] == c for q in bench.questions]) for c in categories}
    models = {}
    for name, rows in columns.items():
        parts = {"turn 1": rows[:, :1], "turn 2": rows[:, 1:], "overall": rows}
        models[name] = {
            **{part: mean(values) for part, values in parts.items()},
            "intervals": {part: bootstrap_interval(values) for part, values in parts.items()},
            "categories": {c: mean(rows[inside[c]]) for c in categories},
            "rated": int(np.isfinite(rows).sum()),
        }
    first, *others = names
    differences = {
        name: {
            "against": first,
            "overall": mean(columns[name]) - mean(columns[first]),
            "interval": bootstrap_interval(columns[name] - columns[first]),
        }
        for name in others
    }
    return {"models": models, "differences": differences, "categories": categories}


def mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


# ---- the part --------------------------------------------------------------------------------------------------------


def run(options: Options) -> Shortfall | None:
    """Answers, verdicts, results.json; what the verdicts lack, where there was a judge."""
    models, bench = parse_models(options.models), read_bench(options.mt_bench_dir, options.judge)
    check_judge(options)
    folder = Path(options.out) / "mt_bench"
    replies = answers_of(models, bench.asked, options, folder / "model_answer")
    if not options.judge:
        print(f"{folder / 'model_answer'}: answers of {', '.join(models)}; --judge NAME rates them")
        return None
    ratings, verdicts = judge(bench, replies, folder, options)
    missing = sum(map(math.isnan, ratings.values()))
    results = {
        **summarise(bench, ratings, list(models)),
        "judge": options.judge,
        "questions": len(bench.questions),
        "verdicts": len(ratings),
        "missing": missing,
        "usd": verdicts.usd,
        "stopped": verdicts.stopped,
        "empty_answers": {name: sum(r.turns.count("") for r in given.values()) for name, given in replies.items()},
        "attn_implementation": options.attn_implementation,
    }
    save_results(options.out, "mt_bench", results)
    show(results)
    return Shortfall(len(ratings), missing, verdicts.stopped)


def show(results: dict) -> None:
    print(f"{'MT-Bench':<20} {'turn 1':>7} {'turn 2':>7} {'overall':>8}   95 % interval")
    each = results["verdicts"] // len(results["models"])
    for name, row in results["models"].items():
        low, high = row["intervals"]["overall"]
        line = (
            f"{name:<20} {row['turn 1']:>7.2f} {row['turn 2']:>7.2f} {row['overall']:>8.2f}   {low:.2f} to {high:.2f}"
        )
        print(line + (f"; only {row['rated']} of {each} ratings" if row["rated"] < each else ""))


main = part_program("MT-Bench", Options, run)


if __name__ == "__main__":
    sys.exit(main())
