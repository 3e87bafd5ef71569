"""Labelling (paper 4.1, Eq. 3): an external model revises the rejected responses -> OUTPUT_DIR/revisions.jsonl

python labeling/main.py --data_path Dahoas/full-hh-rlhf --model gpt-4-0125-preview --output_dir OUTPUT
python labeling/main.py --data_path pairs.jsonl --data_split 0,10,0 --base_url http://127.0.0.1:8000/v1 --model M \
    --output_dir OUTPUT

Exit codes: 0 every pair is in revisions.jsonl or failures.jsonl; 3 stopped early, the same command continues; 2 wrong
input or settings; 1 anything else.
"""

import asyncio
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.asking.client import agreed, known_price, make_endpoint, run_all, signals_interrupt
from deepspeed_chat_tlcr.asking.endpoint import ChatRequest, Endpoint, Sampling
from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.money import Account, Estimate, Price, estimate
from deepspeed_chat_tlcr.asking.progress import Progress, Totals
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from deepspeed_chat_tlcr.preference_data import Preferences, load_preferences, parse_data_split
from deepspeed_chat_tlcr.record_sources import find_source
from deepspeed_chat_tlcr.tokenization import load_tokenizer
from labeling.importing import import_revisions
from labeling.options import Options, check
from labeling.prompt import TEMPLATE, load_template
from labeling.revising import describe, question
from labeling.selection import Selection, Shard, select, stream, to_ask
from labeling.without_model import copy_chosen

EXIT_COMPLETE, EXIT_OTHER, EXIT_RESUMABLE = 0, 1, 3


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv)
    check(options)
    try:
        with signals_interrupt():
            return label(options)
    except KeyboardInterrupt:
        print("stopped before the first call or after the last; the same command continues", flush=True)
        return EXIT_RESUMABLE


def label(options: Options) -> int:
    if options.import_file is not None:
        return import_revisions(options)
    shard = Shard.parse(options.shard)
    template = load_template(options.prompt_file) if options.prompt_file else TEMPLATE
    preferences = load_pairs(options)
    selection = select(preferences, shard)
    settings = settings_of(options, selection, template)
    if options.reviser == "chosen":
        return copy_chosen(options.output_dir, preferences, selection, settings)
    price = known_price(options, options.model)
    if options.dry_run:
        print(estimate_for(options, price, selection, len(selection) * options.n, template))
        return EXIT_COMPLETE
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p)
    endpoint = make_endpoint(options, options.model, sampling)
    try:
        with RunFolder(options.output_dir, redact=endpoint.redact) as folder:
            return revise(options, folder, endpoint, price, settings, preferences, selection, template)
    except InputError as error:
        raise InputError(endpoint.redact(str(error))) from None
    except Exception:
        # Whatever broke, its message may quote a header: the traceback is shown without secrets.
        print(endpoint.redact(traceback.format_exc()), file=sys.stderr)
        return EXIT_OTHER


def revise(
    options: Options,
    folder: RunFolder,
    endpoint: Endpoint,
    price: Price | None,
    settings: dict,
    preferences: Preferences,
    selection: Selection,
    template: str,
) -> int:
    folder.bind(settings)
    state = folder.read_state(options.n)
    for repair in folder.repairs:
        print(f"repaired: {repair}", flush=True)
    positions, wanted = to_ask(selection, state, options.n, options.retry_failed)
    if options.limit:
        positions, wanted = positions[: options.limit], wanted[: options.limit]
    calls = int(wanted.sum())
    repeated = f" ({selection.duplicates} repeated ones left out)" if selection.duplicates else ""
    print(f"{len(selection)} pairs{repeated}, {len(positions)} to ask about, at {endpoint.shown_url}")
    expected = estimate_for(options, price, selection, calls, template)
    print(f"estimate: {expected}", flush=True)
    if calls and not agreed(options, expected):
        return EXIT_RESUMABLE
    if options.retry_failed:
        # They get their outcome anew; until then their old lines stay, and the next start drops those settled.
        state.attempts.clear()

    def requests() -> Iterator[ChatRequest]:
        pairs = stream(preferences, selection.indices[positions])
        for pair, id, count in zip(pairs, selection.ids[positions], wanted, strict=True):
            for sample in range(options.n - int(count), options.n):
                seed = None if options.seed is None else options.seed + sample
                yield question(pair, id.decode(), options.model, template, options.max_edit_ratio, seed)

    account = Account(price, options.max_cost_usd, state.usd, state.usd_lost)
    about = {"data_path": options.data_path, "base_url": endpoint.shown_url, "estimate": str(expected)}
    failures = len(state.failures) - (calls if options.retry_failed else 0)
    before = Totals(len(selection), len(state.results), failures, state, state.usd, state.usd_lost, state.seconds)
    progress = Progress(folder, settings, about, before, account, calls)
    end = partial(finish, options, folder, settings, about, selection, price is not None)
    try:
        stopped = asyncio.run(run_all(options, endpoint, folder, account, state, requests(), progress))
    except InputError:
        end(progress.seconds, "refused by the endpoint")
        raise
    return end(progress.seconds, stopped)


def finish(options, folder, settings, about, selection, priced, seconds, stopped) -> int:
    """Say and write what the files now hold; the exit code."""
    state = folder.read_state(options.n)
    left = int(to_ask(selection, state, options.n, False)[1].sum())
    usd = state.usd if priced else None
    totals = Totals(len(selection), len(state.results), len(state.failures), state, usd, state.usd_lost, seconds)
    if left and not stopped:
        stopped = "--limit"
    summary = totals.summary(settings, about, left == 0, stopped)
    folder.write_summary(summary)
    print(describe(summary, folder.path), flush=True)
    if left == 0 and not (stopped and options.retry_failed):
        return EXIT_COMPLETE
    to_go = f"{left} revisions to go" if left else "not all failed pairs were asked again"
    print(f"stopped early ({stopped}): {to_go}; the same command continues", flush=True)
    return EXIT_RESUMABLE


def load_pairs(options: Options) -> Preferences:
    """The reward part of the data. With nothing for SFT and RL, as in 0,10,0, that is every pair there is: also the
    tenth that other stages hold out of data without an eval split of its own.
    """
    load = partial(
        load_preferences,
        part="reward",
        data_split=options.data_split,
        data_seed=options.data_seed,
        tokenizer=load_tokenizer(options.tokenizer) if options.tokenizer else None,
    )
    pairs = load(options.data_path, split=options.split)
    for_sft, _, for_rl = parse_data_split(options.data_split)
    whole = [path for path in options.data_path if find_source(path).eval is None]
    if options.split == "train" and for_sft == for_rl == 0 and whole:
        # Of very little data nothing may have been held out.
        with suppress(InputError):
            pairs += load(whole, split="eval")
    return pairs


def settings_of(options: Options, selection: Selection, template: str) -> dict:
    """What must not change under one output folder."""
    asked = options.reviser == "openai"
    return {
        "reviser": options.reviser,
        "model": options.model if asked else None,
        "prompt": template if asked else None,
        "n": options.n if asked else 1,
        "temperature": options.temperature if asked else None,
        "top_p": options.top_p if asked else None,
        "seed": options.seed if asked else None,
        "data": selection.fingerprint,
        "data_split": options.data_split,
        "data_seed": options.data_seed,
        "split": options.split,
        "shard": options.shard,
    }


def estimate_for(options: Options, price: Price | None, selection: Selection, calls: int, template: str) -> Estimate:
    """Scaled from the whole selection to the calls left."""
    texts = selection.prompt_bytes + selection.chosen_bytes + selection.rejected_bytes
    pairs = max(len(selection) + selection.duplicates, 1)
    question_bytes = round(calls * (texts / pairs + len(template.encode())))
    rejected_bytes = round(calls * selection.rejected_bytes / pairs)
    limits = (options.concurrency, options.requests_per_minute, options.tokens_per_minute)
    return estimate(calls, question_bytes, rejected_bytes, price, *limits)


if __name__ == "__main__":
    sys.exit(main())
