"""Tiny real models, tokenizers and data, made on the spot."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Before anything imports DeepSpeed: the tests are about CPU, also on a machine that has more.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports datasets, which reads it once: what tests read is not kept in the user's own cache.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tlcr-tests-")

import pytest
import warm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]

NOUNS = ["the cat", "the dog", "a bird", "my house", "this tree", "the sea"]
GOOD = ["is lovely", "can rest", "likes you", "stands tall"]
BAD = ["is awful", "must go", "hates you", "falls down"]


def shared(name: str) -> Path:
    """A file of the shared data; the test skips, saying so, where the folder is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there: this test needs the shared data")
    return path


def preferences(count: int, seed: int = 0) -> list[dict]:
    """Pairs that differ by a word or two, so that a revision is a small edit."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        noun, other = rng.sample(NOUNS, 2)
        good, bad = rng.choice(GOOD), rng.choice(BAD)
        records.append(
            {
                "prompt": f"\n\nHuman: Tell me of {noun} ({number}).\n\nAssistant:",
                "chosen": f" I think {noun} {good} and {other} {rng.choice(GOOD)}.",
                "rejected": f" I think {noun} {bad} and {other} {rng.choice(GOOD)}.",
            }
        )
    return records


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def byte_level_tokenizer(texts: list[str], vocab_size: int = 320) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_sessionfinish():
    shutil.rmtree(DATASETS_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_environment():
    """Each test leaves the environment as it was: an entry point run in this process makes itself rank 0 of 1."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with data.jsonl (60 pairs), revisions.jsonl of all its reward pairs, and a tiny Llama in model/."""
    from deepspeed_chat_tlcr.data.preferences import load_preferences
    from deepspeed_chat_tlcr.records import Revision

    folder = tmp_path_factory.mktemp("tiny")
    data = write_jsonl(folder / "data.jsonl", preferences(60))
    records = load_preferences([str(data)], "reward", "train")
    revisions = [Revision(r.id, r.prompt, r.chosen, r.rejected, r.chosen, "It is unkind.", "test", {}) for r in records]
    (folder / "revisions.jsonl").write_text("".join(revision.to_json() + "\n" for revision in revisions))
    texts = [record["prompt"] + record["chosen"] + record["rejected"] for record in preferences(60)]
    tiny_llama(folder / "model", byte_level_tokenizer(texts))
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Lets entry points run in this process, one after the other: ``main(arguments)``, ten times faster than a start.

    They stay in one process group of one rank; DeepSpeed cannot join another once it has left the first.
    """
    import torch.distributed

    from deepspeed_chat_tlcr.runtime import Runtime

    monkeypatch.setattr(Runtime, "finish", lambda self: torch.distributed.barrier())

    def run(main, *arguments: object) -> None:
        main([str(argument) for argument in arguments])

    before = signal.getsignal(signal.SIGTERM)
    yield run
    # A stage heeds SIGTERM by saving; the test run itself is to end.
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def quick_workers(monkeypatch):
    """``--num_processes`` and ``workers.spread`` fork their processes from the one of warm.py."""
    monkeypatch.setattr("deepspeed_chat_tlcr.workers.multiprocessing.get_context", lambda method: warm.forks)


def patience(seconds: float) -> float:
    """A limit for what takes at most ``seconds`` on an idle machine: it grows with how many wait for a processor."""
    return seconds * (1 + os.getloadavg()[0] / (os.cpu_count() or 1))


def launch(
    script: str, *arguments: object, ranks: int = 1, launcher: bool = False, fresh: bool = False, check: bool = True
) -> subprocess.CompletedProcess:
    """Run an entry point in a process of its own, or as several ranks.

    ``launcher``: by DeepSpeed's own. ``fresh``: in a new interpreter, not a fork of one that has made the imports.
    """
    script = str(ROOT / script)
    if launcher or fresh:
        command = [sys.executable]
        if launcher:
            command += [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
            command += ["--master_port", warm.free_port()]
        command += [script, *map(str, arguments)]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=patience(300))
    else:
        done = warm.run(script, *arguments, ranks=ranks, timeout=patience(300))
    if check:
        words = " ".join(map(str, done.args))
        assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done


def bytes_of_tensors(content: object) -> int:
    """Of all tensors in what ``torch.load`` gave."""
    import torch

    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return sum(map(bytes_of_tensors, parts))
