"""Look for everything that could stop a run before it starts, and list it all at once, each with what to do.

training_scripts/run_7b.sh and run_tiny.sh call it with the variables of recipe.sh. It exits with 0, or with 2 after
listing the problems. Like ``machine_checks``, it starts with the standard library alone.
"""

import datetime
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from deepspeed_chat_tlcr.asking.models import (
    ask_listing,
    check_base_url,
    known_model,
    reason_not_to_start,
    served_models,
)
from deepspeed_chat_tlcr.asking.redaction import printable, without_secrets
from deepspeed_chat_tlcr.errors import EXIT_INPUT, InputError, exits_cleanly
from deepspeed_chat_tlcr.records import read_json
from training_scripts.planning.hours import work_of
from training_scripts.planning.machine_checks import MACHINE, ROOT, Check, Problem, known_shape, package_problems
from training_scripts.planning.memory import GIB
from training_scripts.planning.plan import disk_needs, label_price, most_disk
from training_scripts.planning.recipe import Recipe

RUN_HOURS = 72.0  # from the preflight to the last pair labelled: SFT comes first

# ---- labelling -------------------------------------------------------------------------------------------------------


def check_labelling(recipe: Recipe) -> Iterator[Problem]:
    """The key is set (its value is never shown), and an endpoint on this machine answers."""
    own, labels = Path(recipe.output) / "labeling", "label" in recipe.folders()
    if labels and Path(recipe.revisions).parent != own:
        if not Path(recipe.revisions).is_file():
            yield Problem(f"REVISIONS={recipe.revisions}: no such file", "name a revisions.jsonl of labeling/main.py")
        labels = False
    if not recipe.span_model and (not labels or labelling_is_complete(own)):
        return
    key = os.environ.get(recipe.api_key_env, "").strip()
    address = recipe.label_base_url.rstrip("/") or None
    if address is None and not key:
        yield Problem(
            f"{recipe.api_key_env}, the variable with the API key for {recipe.label_model}, is not set",
            f"export {recipe.api_key_env}=...; or name another variable with API_KEY_ENV, another endpoint with "
            "LABEL_BASE_URL, or revisions you already have with REVISIONS",
        )
        return
    if address is not None:
        try:
            check_base_url(recipe.label_base_url, "LABEL_BASE_URL")
        except InputError as error:
            yield Problem(str(error), "mend the address, or leave it empty for OpenAI's")
            return
        if urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1") and not _answers(address):
            shown = without_secrets(address)
            yield Problem(f"LABEL_BASE_URL {shown}: nothing answers there", "start the server before the run")
            return
    yield from _check_reviser(recipe, address, key)


def _check_reviser(recipe: Recipe, address: str | None, key: str) -> Iterator[Problem]:
    """The endpoint serves the model until the run can have ended, and its price is known."""
    if address is not None and not recipe.label_model:
        names = list(served_models(address, key))
        if len(names) != 1:
            told = ", ".join(printable(name)[:80] for name in names[:10]) or "it lists none"
            shown = without_secrets(address)
            yield Problem(f"LABEL_MODEL is empty, and {shown} does not serve just one model ({told})", "name one")
        return
    known = known_model(recipe.label_model)
    if label_price(recipe) is None:
        yield Problem(
            f"the price of LABEL_MODEL={recipe.label_model} is not known",
            "LABEL_PRICE=IN,OUT in US$ per million tokens (0,0 if it costs nothing)",
        )
    listing = ask_listing(recipe.label_model, address, key)
    if reason := reason_not_to_start(recipe.label_model, listing, RUN_HOURS, "LABEL_MODEL", known):
        found, _, remedy = reason.partition(": set ")
        yield Problem(found, f"set {remedy}")
    elif address is None and known and (end := known.end(datetime.date.today())):
        print(f"preflight: warning: {end} (LABEL_MODEL)", file=sys.stderr)


def labelling_is_complete(folder: Path) -> bool:
    """Whether labeling/main.py finished there."""
    try:
        return bool(read_json(folder / "run.json").get("complete"))
    except (OSError, ValueError, AttributeError):
        return False


def _answers(base_url: str) -> bool:
    try:
        urllib.request.urlopen(base_url.rstrip("/") + "/models", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it asks for a key or lacks this page, but it is there
    except (OSError, ValueError):
        return False
    return True


# ---- data, model, disk -----------------------------------------------------------------------------------------------


def check_model(recipe: Recipe) -> Iterator[Problem]:
    """Config, weights and tokenizer are available, and the tokenizer can end a response."""
    try:
        from deepspeed_chat_tlcr.models import load_config
        from deepspeed_chat_tlcr.tokenization import load_tokenizer
    except (ImportError, OSError):
        return
    remedy = (
        "MODEL is a folder saved by save_pretrained or a Hugging Face name; a gated model (Llama) needs its licence "
        "accepted on its page and `hf auth login`; without network, copy the model and name its folder"
    )
    try:
        load_config(recipe.model)
    except InputError as error:
        yield Problem(f"MODEL={recipe.model}: {error}", remedy)
        return
    try:
        load_tokenizer(recipe.model)
    except InputError as error:
        yield Problem(f"MODEL={recipe.model}: {error}", "put a fast tokenizer with an EOS token beside the model")
    if not _has_weights(recipe.model):
        yield Problem(f"MODEL={recipe.model}: its weights are neither here nor available from the hub", remedy)


def _has_weights(model: str) -> bool:
    if Path(model).is_dir():
        return any(file.suffix in (".safetensors", ".bin") for file in Path(model).iterdir())
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(model, name), str) for name in names):
        return True
    try:
        huggingface_hub.auth_check(model)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return False
    return True


def check_data(recipe: Recipe) -> Iterator[Problem]:
    """All of the data can be read, and every part of it fills a batch."""
    try:
        from deepspeed_chat_tlcr.data.preferences import load_preferences
        from deepspeed_chat_tlcr.tokenization import load_tokenizer
    except (ImportError, OSError):
        return
    try:
        tokenizer = load_tokenizer(recipe.model)
    except InputError:
        tokenizer = None  # check_model reports it, and only chat messages need one to be read
    print("preflight: reading the data (downloads it once, if it is on the hub)", flush=True)
    try:
        records = len(load_preferences(recipe.data.split(), "all", "train", recipe.data_split, tokenizer=tokenizer))
        parts = work_of(recipe, records)
    except InputError as error:
        remedy = "name local files or folders, or a data set on the hub"
        if recipe.brings_revisions:
            remedy += ": the one that REVISIONS come from, in whose SFT and RL parts their prompts must not be"
        yield Problem(f"DATA={recipe.data}: {error}", remedy)
        return
    for stage, work in parts.items():
        part, batch = {"step1": "SFT", "step3": "RL"}.get(stage, "reward"), work.batch
        if stage == "step3":
            batch = recipe.generation_batch_size * recipe.generation_batches * recipe.world_size
        if work.records < batch:
            yield Problem(
                f"the {part} part of the data ({work.records} of {records} records at {recipe.data_split}) does not "
                f"fill one batch of {batch}",
                "lower the batch size or NUM_GPUS, use more data, or change DATA_SPLIT",
            )


def check_batches(recipe: Recipe) -> Iterator[Problem]:
    prompts = recipe.generation_batches * recipe.generation_batch_size
    if recipe.decode_batch_size % recipe.generation_batch_size:
        yield Problem(
            f"DECODE_BATCH_SIZE={recipe.decode_batch_size} is not a multiple of "
            f"GENERATION_BATCH_SIZE={recipe.generation_batch_size}",
            "make it one, or 0 to decode the whole set of rollouts together",
        )
    if recipe.generation_batch_size % recipe.ppo_batch_size:
        yield Problem(
            f"GENERATION_BATCH_SIZE={recipe.generation_batch_size} is not a multiple of "
            f"PPO_BATCH_SIZE={recipe.ppo_batch_size}: some rollouts would be left over",
            "make it one",
        )
    elif (micro_batches := prompts // recipe.ppo_batch_size) % recipe.ppo_accumulation_steps:
        yield Problem(
            f"GENERATION_BATCHES x GENERATION_BATCH_SIZE / PPO_BATCH_SIZE = {micro_batches} "
            f"is not a multiple of PPO_ACCUMULATION_STEPS={recipe.ppo_accumulation_steps}",
            "make it one",
        )


def check_rollout_servers(recipe: Recipe) -> Iterator[Problem]:
    """With ROLLOUT=vllm: every server of ROLLOUT_HOSTS answers, or will be there when step 3 begins."""
    if recipe.rollout != "vllm" or "step3" not in recipe.folders():
        return
    remedy = "start one with training_scripts/serve_rollouts.sh (docs/vllm.md), and give it like http://10.0.0.7:8000"
    addresses = recipe.rollout_hosts.split()
    if not addresses:
        yield Problem("ROLLOUT=vllm, but ROLLOUT_HOSTS names no server", remedy)
    for address in addresses:
        try:
            check_base_url(address, f"ROLLOUT_HOSTS: {without_secrets(address)}")
        except InputError as error:
            yield Problem(str(error), remedy)
            continue
        if not _answers(f"{address.rstrip('/')}/v1"):
            yield Problem(f"ROLLOUT_HOSTS: nothing answers at {without_secrets(address)}", remedy)


def check_output(recipe: Recipe) -> Iterator[Problem]:
    """OUTPUT can be written and its disk holds what the unfinished stages will write."""
    output = Path(recipe.output).absolute()
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Problem(f"OUTPUT={recipe.output}: {existing} is not a writable folder", "choose another OUTPUT")
        return
    shape = known_shape(recipe)
    if shape is None:
        return
    needed = most_disk(need for stage, need in disk_needs(recipe, shape).items() if not recipe.is_complete(stage))
    free = shutil.disk_usage(existing).free
    if free < needed:
        yield Problem(
            f"OUTPUT={recipe.output} has {free / GIB:.0f} GiB free, the run writes up to {needed / GIB:.0f} GiB",
            "free some, or put OUTPUT on a larger disk (PLAN=1 lists what is written)",
        )


def go_offline_if_need_be(recipe: Recipe) -> None:
    """Where the hub does not answer, look only at what is cached, rather than retry for a minute and a half.

    Call it before anything imports the hub's client, which reads the variable once.
    """
    named = [path for path in [recipe.model, *recipe.data.split()] if not Path(path).expanduser().exists()]
    if not named or os.environ.get("HF_HUB_OFFLINE"):
        return
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(hub, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        print(f"preflight: {hub} does not answer ({error}); only what is cached counts", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"


MADE_BY_RUN: tuple[Check, ...] = (check_labelling, check_model, check_data)
"""Checks of what run_tiny.sh makes itself: model, data and reviser."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--packages_only"]:
        problems = list(package_problems(ROOT / "requirements.txt", argv[1:]))
        checked = 1
    elif argv not in ([], ["--without_inputs"]):
        raise InputError("usage: preflight [--without_inputs | --packages_only [PACKAGE ...]]")
    else:
        recipe = Recipe.from_environment()
        recipe.hosts()
        checks = [*MACHINE, check_batches, check_rollout_servers, check_output, *([] if argv else MADE_BY_RUN)]
        if not argv:
            go_offline_if_need_be(recipe)
        problems, checked = [problem for check in checks for problem in check(recipe)], len(checks)
    if not problems:
        print(f"preflight: {checked} checks, nothing stands in the way")
        return
    print(f"preflight: {len(problems)} problem(s)", file=sys.stderr)
    for number, problem in enumerate(problems, 1):
        print(f"  {number}. {problem.found}\n     -> {problem.remedy}", file=sys.stderr)
    sys.exit(EXIT_INPUT)


if __name__ == "__main__":
    main()
