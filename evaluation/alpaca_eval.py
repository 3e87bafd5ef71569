"""AlpacaEval (Figure 4): answers in the library's form, its own win rates where it is installed, and head-to-heads.

python evaluation/alpaca_eval.py --models sft=OUT/step1_sft tlcr=OUT/step3_ppo_tlcr/actor --prompts alpaca_eval.json \
    --judge gpt-6-luna --out OUTPUT

OUTPUT/alpaca_eval/model_outputs/NAME.json is what `alpaca_eval --model_outputs` takes. Every two models are compared
by the judge in both orders. With --annotators_config the package alpaca_eval (pip install -e '.[eval]') judges too;
evaluation/annotators/ has a configuration of ours for a current model.
"""

import csv
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import read_json
from deepspeed_chat_tlcr.saving import write_json
from evaluation.judging import Judged, Shortfall, Verdicts, check_judge, judge_all, message_id
from evaluation.options import AlpacaOptions, JudgeOptions, PolicyOptions, PromptOptions
from evaluation.pairwise import PairPrompt, pairs, read_pair_prompt
from evaluation.policies import Question, Replies, Reply, parse_models
from evaluation.prompts import answer_prompts, read_prompts
from evaluation.report import part_program
from evaluation.results import save_results
from evaluation.stats import head_to_head, longer_preferred
from evaluation.verdicts import read_preference

EQUAL = "equal answers"
ANNOTATORS = Path(__file__).parent / "annotators"
"""Our own configurations for the package, a folder each."""


@dataclass(frozen=True, kw_only=True)
class Options(AlpacaOptions, PromptOptions, PolicyOptions, JudgeOptions):
    """AlpacaEval: answers, head-to-head win rates, and the package's own."""


def write_outputs(folder: Path, name: str, questions: Sequence[Question], replies: Mapping[int | str, Reply]) -> Path:
    """A model's answers in the library's ``model_outputs`` form."""

    def inert(text: str) -> str:
        # The package splits its prompt into messages at <|im_start|> and <|im_end|>, also where an answer has them.
        return text.replace("<|im_", "<| im_")

    records = [
        {
            "instruction": inert(q.turns[0]),
            "output": inert(replies[q.id].turns[0]),
            "generator": name,
            "dataset": "user",
        }
        for q in questions
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", records)
    return folder / f"{name}.json"


# ---- head to head ----------------------------------------------------------------------------------------------------


def compare(
    questions: Sequence[Question], replies: Replies, prompt: PairPrompt, folder: Path, options: JudgeOptions
) -> tuple[list[dict], Verdicts]:
    """A record of ``HeadToHead`` for every pair of models, judged in both orders, with the number of items left out.

    Equal answers are a tie, without asking the judge.
    """
    asked: dict[str, Judged] = {}

    def ask(question: Question, first: str, second: str) -> str:
        one, other = (replies[name][question.id].turns[0].strip() for name in (first, second))
        if one == other:
            return EQUAL
        messages = prompt.messages(question.turns[0].strip(), one, other)
        asked[id := message_id(messages)] = Judged(messages, [one, other])
        return id

    ids = {
        (one, other): [(ask(question, one, other), ask(question, other, one)) for question in questions]
        for one, other in pairs(list(replies))
    }
    verdicts = judge_all(folder, asked, read_preference, options)
    said = {EQUAL: "tie", **{id: line["verdict"] for id, line in verdicts.by_id.items()}}
    records = []
    for (one, other), both in ids.items():
        kept = [(q, said[a], said[b]) for q, (a, b) in zip(questions, both, strict=True) if a in said and b in said]
        judged = [(first, second) for _, first, second in kept]
        lengths = [tuple(len(replies[name][q.id].turns[0].strip()) for name in (one, other)) for q, *_ in kept]
        bias = {"longer_preferred": longer_preferred(judged, lengths), "missing": len(both) - len(judged)}
        record = {"model": one, "against": other, **asdict(head_to_head(judged)), **bias}
        if bias["missing"] and not verdicts.by_id.keys() & set(itertools.chain(*both)):
            # Without any verdict there is no comparison, even if some answers are equal.
            record |= {"win_rate": math.nan, "interval": (math.nan, math.nan), "p_value": math.nan}
        records.append(record)
    return records, verdicts


# ---- the package -----------------------------------------------------------------------------------------------------


def package_command() -> list[str]:
    """How the package is started. Raises ``InputError`` where it is not installed."""
    # Not by importing it here: this file has the package's name, and comes first on the path as a script.
    beside = Path(sys.executable).with_name("alpaca_eval")
    program = str(beside) if beside.exists() else shutil.which("alpaca_eval")
    if program is None:
        raise InputError("--annotators_config needs the package alpaca_eval: pip install -e '.[eval]'")
    return [program, "evaluate"]


def judge_by_package(outputs: Mapping[str, Path], options: AlpacaOptions, folder: Path) -> list[dict]:
    """The package's win rates of every model against the reference, from its leaderboard.csv."""
    reference = absolute(options.reference_outputs or next(iter(outputs.values())))
    rows = []
    for name, path in outputs.items():
        if absolute(path) == reference:
            continue
        where = (folder / "package" / name).resolve()
        where.mkdir(parents=True, exist_ok=True)
        arguments = {
            "model_outputs": absolute(path),
            "reference_outputs": reference,
            "annotators_config": annotator(options.annotators_config),
            "name": name,
            "output_path": where,
            "precomputed_leaderboard": None,
            "fn_metric": "get_length_controlled_winrate" if options.length_controlled else "get_winrate",
            # Or it writes the weights of its length model into its own installation.
            "metric_kwargs": {"save_weights_dir": None} if options.length_controlled else None,
            "sort_by": "win_rate",
            "is_overwrite_leaderboard": True,
            "caching_path": where / "cache.json",
        }
        command = package_command() + [f"--{key}={value}" for key, value in arguments.items()]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
        boards = sorted(where.rglob("leaderboard.csv"))
        if done.returncode or not boards:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
            raise InputError(f"alpaca_eval failed on {name}: {last[0]}")
        rows.append({**leaderboard_row(boards[0], name, reference), **annotations_of(boards[0].parent)})
    return rows


def annotator(name: str) -> str:
    """Our annotator of that name, a folder of the user's, or a name that the package knows."""
    return str(ANNOTATORS / name) if (ANNOTATORS / name / "configs.yaml").is_file() else absolute(name)


def absolute(path: str | Path) -> str:
    """An absolute path, since the package runs in another folder; names that the package knows stay as they are."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def leaderboard_row(path: Path, name: str, reference: str) -> dict:
    with path.open(newline="", encoding="utf-8") as file:
        row = next(line for line in csv.DictReader(file) if line[""] == name)
    controlled = row.get("length_controlled_winrate")
    return {
        "model": name,
        "reference": Path(reference).stem,
        "win_rate": float(row["win_rate"]) / 100,
        "standard_error": float(row["standard_error"]) / 100,
        "items": int(float(row["n_total"])),
        "length_controlled": float(controlled) / 100 if controlled else None,
    }


def annotations_of(folder: Path) -> dict:
    """US$ by the package's count, None where it knows no price; how many verdicts it could not read."""
    annotations = read_json(folder / "annotations.json")
    prices = [record.get("preference_price_per_example") for record in annotations]
    known = [price for price in prices if price is not None]
    missing = sum(record.get("preference") is None for record in annotations)
    return {"usd": sum(known) if known else None, "missing": missing}


# ---- the part --------------------------------------------------------------------------------------------------------


def run(options: Options) -> Shortfall | None:
    """Answers, verdicts, results.json; what the verdicts lack, where there was a judge."""
    models = parse_models(options.models)
    prompt = read_pair_prompt(options.judge_prompts)
    check_judge(options)
    if options.annotators_config:
        package_command()
    questions = read_prompts(options, next(iter(models.values())))
    if options.annotators_config and any(question.raw for question in questions):
        raise InputError("--annotators_config: alpaca_eval needs --prompts with plain texts as 'instruction'")
    folder = Path(options.out) / "alpaca_eval"
    replies = answer_prompts(models, questions, options)
    outputs = {name: write_outputs(folder / "model_outputs", name, questions, given) for name, given in replies.items()}
    results: dict = {"questions": len(questions), "models": list(models), "judge": options.judge, "usd": None}
    results |= {"head_to_head": [], "package": [], "annotators_config": options.annotators_config}
    lacks = Shortfall(0, 0)
    if options.judge and len(models) > 1:
        found, verdicts = compare(questions, replies, prompt, folder, options)
        results |= {"head_to_head": found, "usd": verdicts.usd}
        lacks = verdicts.shortfall
    if options.annotators_config:
        if options.max_cost_usd is not None:
            print("note: --max_cost_usd does not limit what the package alpaca_eval spends", flush=True)
        results["package"] = judge_by_package(outputs, options, folder)
        unread = sum(row["missing"] for row in results["package"])
        lacks = Shortfall(lacks.asked + len(results["package"]) * len(questions), lacks.missing + unread, lacks.stopped)
    results |= {"verdicts": lacks.asked, "missing": lacks.missing, "stopped": lacks.stopped}
    results["attn_implementation"] = options.attn_implementation
    if not results["head_to_head"] and not results["package"]:
        print(
            f"{folder / 'model_outputs'}: answers; --judge compares two or more models, --annotators_config rates them"
        )
        return None
    save_results(options.out, "alpaca_eval", results)
    show(results)
    return lacks


def show(results: dict) -> None:
    for row in results["head_to_head"]:
        print(f"{row['model']} against {row['against']}: {described(row, results['questions'])}")
    for row in results["package"]:
        controlled = "" if row["length_controlled"] is None else f", length-controlled {row['length_controlled']:.1%}"
        gap = f"; {row['missing']} of {results['questions']} verdicts are missing" if row["missing"] else ""
        print(f"{row['model']} against {row['reference']}, by alpaca_eval: {row['win_rate']:.1%}{controlled}{gap}")


def described(row: dict, questions: int) -> str:
    """A head-to-head in a line, the missing verdicts first."""
    gap = f"{row['missing']} of {questions} prompts left out, their verdicts are missing; " if row["missing"] else ""
    if math.isnan(row["win_rate"]):
        return f"{gap}no win rate"
    low, high = row["interval"]
    counts = f"{row['wins']} wins, {row['ties']} ties, {row['losses']} losses"
    bias = f"first shown preferred {row['first_shown_preferred']:.1%}".replace("nan%", "in no verdict")
    return f"{gap}{row['win_rate']:.1%} ({low:.1%} to {high:.1%}); {counts}; {bias}"


main = part_program("AlpacaEval", Options, run)


if __name__ == "__main__":
    sys.exit(main())
