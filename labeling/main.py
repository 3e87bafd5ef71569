"""Labelling (paper 4.1, Eq. 3): an external model revises the rejected responses -> OUTPUT_DIR/revisions.jsonl

python labeling/main.py --data_path Dahoas/full-hh-rlhf --model gpt-6-luna --output_dir OUTPUT
python labeling/main.py --data_path pairs.jsonl --data_split 0,10,0 --base_url http://127.0.0.1:8000/v1 \
    --output_dir OUTPUT

Exit codes: 0 every pair is in revisions.jsonl or failures.jsonl; 3 stopped early, the same command continues; 4 too
many failures (--max_failure_share); 2 wrong input or settings; 1 anything else.
"""

import asyncio
import errno
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from deepspeed_chat_tlcr.arguments import parse
from deepspeed_chat_tlcr.asking.client import (
    agreed,
    ask_about_model,
    discount,
    expected_effort,
    known_price,
    listed_price,
    make_endpoint,
    resolve_model,
    run_all,
    signals_interrupt,
    warn_of_end,
)
from deepspeed_chat_tlcr.asking.endpoint import ChatRequest, Endpoint, Sampling
from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.models import Price, known_model
from deepspeed_chat_tlcr.asking.money import Account, Estimate, estimate
from deepspeed_chat_tlcr.asking.progress import Progress, Totals
from deepspeed_chat_tlcr.data.preferences import Preferences, load_preferences, parse_data_split
from deepspeed_chat_tlcr.data.sources import find_source
from deepspeed_chat_tlcr.errors import InputError, exits_cleanly
from labeling.importing import import_revisions
from labeling.options import Options, check
from labeling.prompt import TEMPLATE, load_template
from labeling.revising import describe, question
from labeling.selection import Selection, Shard, select, stream, to_ask
from labeling.without_model import copy_chosen

EXIT_COMPLETE, EXIT_OTHER, EXIT_RESUMABLE, EXIT_FAILURES = 0, 1, 3, 4


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
    if options.reviser == "openai":
        options = replace(options, model=resolve_model(options, options.model, "--model"))
    shard = Shard.parse(options.shard)
    template = load_template(options.prompt_file) if options.prompt_file else TEMPLATE
    preferences = load_pairs(options)
    selection = select(preferences, shard)
    settings = settings_of(options, selection, template)
    if options.reviser == "chosen":
        return copy_chosen(options.output_dir, preferences, selection, settings)
    warn_of_end(known_model(options.model, options.prices), options.address)
    if options.dry_run:
        price = listed_price(options, options.model)
        print(estimate_for(options, price, selection, len(selection) * options.n, template))
        return EXIT_COMPLETE
    price = known_price(options, options.model)
    sampling = Sampling(options.max_tokens, options.temperature, options.top_p, options.reasoning_effort)
    endpoint = make_endpoint(options, options.model, sampling)
    try:
        with RunFolder(options.output_dir, redact=endpoint.redact) as folder:
            return revise(options, folder, endpoint, price, settings, preferences, selection, template)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        message = f"error: {options.output_dir} cannot be written ({error.strerror}); nothing that was paid for is lost"
        print(f"{message}: make room, and the same command continues", file=sys.stderr, flush=True)
        return EXIT_RESUMABLE
    except InputError as error:
        raise InputError(endpoint.redact(str(error))) from None
    except Exception:
        # The message may quote a header: print the traceback without secrets.
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
    if calls:
        hours = expected.hours
        endpoint.dialect.context = ask_about_model(options, options.model, hours, "--model (LABEL_MODEL)")
    if options.retry_failed:
        # Their old lines stay until there is a new outcome; the next start drops them.
        state.attempts.clear()

    def requests() -> Iterator[ChatRequest]:
        pairs = stream(preferences, selection.indices[positions])
        for pair, id, count in zip(pairs, selection.ids[positions], wanted, strict=True):
            for sample in range(options.n - int(count), options.n):
                seed = None if options.seed is None else options.seed + sample
                yield question(pair, id.decode(), options.model, template, options.max_edit_ratio, seed)

    share = discount(options, options.model)
    account = Account(price, options.max_cost_usd, state.usd, state.usd_lost, share, state.overrun)
    about = {"data_path": options.data_path, "base_url": endpoint.shown_url, "estimate": str(expected)}
    failures = len(state.failures) - (calls if options.retry_failed else 0)
    before = Totals(len(selection), len(state.results), failures, state, state.usd, state.usd_lost, state.seconds)
    progress = Progress(folder, settings, about, before, account, calls)
    end = partial(finish, options, folder, settings, about, selection)
    try:
        stopped = asyncio.run(run_all(options, endpoint, folder, account, state, requests(), progress))
    except InputError:
        end(progress.seconds, "refused by the endpoint")
        raise
    return end(progress.seconds, stopped)


def finish(options, folder, settings, about, selection, seconds, stopped) -> int:
    """Print and write what the files now hold. Returns the exit code."""
    state = folder.read_state(options.n)
    left = int(to_ask(selection, state, options.n, False)[1].sum())
    failed, done = len(state.failures), len(state.failures) + len(state.results)
    totals = Totals(len(selection), len(state.results), failed, state, state.usd, state.usd_lost, seconds)
    if left and not stopped:
        stopped = "--limit"
    too_many = left == 0 and failed > options.max_failure_share * done
    if too_many:
        stopped = stopped or "too many failures"
    summary = totals.summary(settings, about, left == 0 and not too_many, stopped)
    folder.write_summary(summary)
    print(describe(summary, folder.path), flush=True)
    if too_many:
        print(
            f"{failed} of {done} failed, more than --max_failure_share {options.max_failure_share:g}: not complete. "
            "failures.jsonl has the reasons; --retry_failed asks again, a larger share accepts the rest",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_FAILURES
    if left == 0 and not (stopped and options.retry_failed):
        return EXIT_COMPLETE
    to_go = f"{left} revisions to go" if left else "not all failed pairs were asked again"
    print(f"stopped early ({stopped}): {to_go}; the same command continues", flush=True)
    return EXIT_RESUMABLE


def load_pairs(options: Options) -> Preferences:
    """The reward part of the data. With nothing for SFT and RL, as in 0,10,0, that is every pair, also the tenth that
    other stages hold out of data without an eval split.
    """
    from deepspeed_chat_tlcr.tokenization import load_tokenizer  # brings PyTorch, which --help need not wait for

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
        # Very little data may have nothing held out.
        with suppress(InputError):
            pairs += load(whole, split="eval")
    return pairs


def settings_of(options: Options, selection: Selection, template: str) -> dict:
    """The settings that must not change in an output folder."""
    asked = options.reviser == "openai"
    return {
        "reviser": options.reviser,
        "model": options.model if asked else None,
        "prompt": template if asked else None,
        "n": options.n if asked else 1,
        "temperature": options.temperature if asked else None,
        "top_p": options.top_p if asked else None,
        "reasoning_effort": options.reasoning_effort if asked else None,
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
    charged = price and price.discounted(discount(options, options.model))
    effort = expected_effort(options, options.model)
    return estimate(calls, question_bytes, rejected_bytes, charged, *limits, effort)


if __name__ == "__main__":
    sys.exit(main())
