"""Token labels against an independent slow aligner, on random and on real pairs, with three kinds of tokenizer."""

import doctest
import random
from pathlib import Path

import pytest
from conftest import byte_level_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.records import Revision, read_jsonl
from labeling import token_labels
from labeling.token_labels import edit_targets, label_revision, label_revisions, soft_targets

DATA = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless_base_test.jsonl.gz"


def slow_targets(a, b):
    """The definition, cell by cell: the Wagner-Fischer table, then the trace from the end. Returns cost and targets."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            steps = table[i - 1, j], table[i, j - 1], table[i - 1, j - 1]
            table[i, j] = table[i - 1, j - 1] if x == y else 1 + min(steps)
    i, j = len(a), len(b)
    cost = table[i, j]
    first, second = [0.5] * i, [0.5] * j
    while i or j:
        if i and j and a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            continue
        steps = []
        if i:
            steps.append((table[i - 1, j], 0, i - 1, j))
        if j:
            steps.append((table[i, j - 1], 1, i, j - 1))
        if i and j:
            steps.append((table[i - 1, j - 1], 2, i - 1, j - 1))
        _, _, next_i, next_j = min(steps)
        if next_i < i:
            first[next_i] = 0.0
        if next_j < j:
            second[next_j] = 1.0
        i, j = next_i, next_j
    return cost, (first, second)


def cost_of(a, b, first, second):
    """What the labels cost: between matches, a stretch of x edited and y edited tokens costs max(x, y)."""
    kept_a = [token for token, target in zip(a, first, strict=True) if target == 0.5]
    kept_b = [token for token, target in zip(b, second, strict=True) if target == 0.5]
    assert kept_a == kept_b
    gaps_a, gaps_b = gaps(first), gaps(second)
    return sum(max(x, y) for x, y in zip(gaps_a, gaps_b, strict=True))


def gaps(targets):
    counts = [0]
    for target in targets:
        if target == 0.5:
            counts.append(0)
        else:
            counts[-1] += 1
    return counts


def word_level(texts):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=1000, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def byte_level(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_like(texts):
    """BPE over the SentencePiece meta-space with byte fallback, as in Llama-2."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"sentencepiece": sentencepiece_like, "byte_level": byte_level, "word_level": word_level}


@pytest.fixture(scope="module")
def real_pairs():
    if not DATA.is_file():
        pytest.skip("../shared/data/hh_harmless_base_test.jsonl.gz is not here")
    rows = [row for (_, row), _ in zip(read_jsonl(DATA), range(300), strict=False)]
    return [
        Revision(str(i), r["prompt"], r["chosen"], r["rejected"], r["chosen"], "", "", {}) for i, r in enumerate(rows)
    ]


def test_worked_examples_of_the_docstrings():
    results = doctest.testmod(token_labels)
    assert results.attempted == 2
    assert results.failed == 0
    assert edit_targets([1, 2], [2, 3]) == ([0.0, 0.5], [0.5, 1.0])


@pytest.mark.parametrize(
    ("rejected", "modified", "expected"),
    [
        ([], [], ([], [])),
        ([], [7, 7], ([], [1.0, 1.0])),
        ([7, 7], [], ([0.0, 0.0], [])),
        ([5], [6], ([0.0], [1.0])),
        ([5, 5], [5], ([0.0, 0.5], [0.5])),  # the right-most match is kept
        ([5], [5, 5], ([0.5], [1.0, 0.5])),
        ([1, 9], [9, 1], ([0.5, 0.0], [1.0, 0.5])),  # delete before add: the last 9 goes, 1 matches
    ],
)
def test_small_cases(rejected, modified, expected):
    assert edit_targets(rejected, modified) == expected


def test_same_labels_as_the_slow_aligner_on_random_pairs():
    draw = random.Random(0)
    for _ in range(500):
        alphabet = draw.choice([2, 4, 10, 300])
        a = [draw.randrange(alphabet) for _ in range(draw.randrange(90))]
        b = [draw.randrange(alphabet) for _ in range(draw.randrange(90))]
        cost, expected = slow_targets(a, b)
        assert edit_targets(a, b) == expected
        assert cost_of(a, b, *expected) == cost


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 200])
def test_same_labels_at_the_edges_of_machine_words(length):
    draw = random.Random(length)
    a = [draw.randrange(5) for _ in range(length)]
    b = [token for token in a if draw.random() > 0.2] + [draw.randrange(5) for _ in range(20)]
    assert edit_targets(a, b) == slow_targets(a, b)[1]
    assert edit_targets(b, a) == slow_targets(b, a)[1]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_same_labels_as_the_slow_aligner_on_real_pairs(kind, real_pairs):
    tokenizer = TOKENIZERS[kind]([text for r in real_pairs for text in (r.prompt, r.chosen, r.rejected)])
    for revision in real_pairs:
        rejected, modified = label_revision(tokenizer, revision, max_length=100_000)
        cost, expected = slow_targets(rejected.response_ids, modified.response_ids)
        assert (rejected.targets, modified.targets) == expected
        assert cost_of(rejected.response_ids, modified.response_ids, *expected) == cost
        assert rejected.input_ids[-1] == tokenizer.eos_token_id
        assert rejected.targets[-1] == modified.targets[-1] == 0.5  # both end: EOS matches EOS


def revision(prompt, rejected, modified):
    return Revision("x", prompt, "", rejected, modified, "", "", {})


TEXTS = ["\n\nHuman: is it far?\n\nAssistant: it is not far, it is near. it is very far away, go by bus."] * 4


def test_labels_are_made_before_the_cut():
    tokenizer = word_level(TEXTS)
    one = revision("\n\nHuman: is it far?\n\nAssistant:", " it is very far", " it is not far")
    whole, _ = label_revision(tokenizer, one, 512)
    start = whole.response_start
    assert whole.targets == [0.5, 0.5, 0.0, 0.5, 0.5]
    rejected, modified = label_revision(tokenizer, one, start + 3)
    assert rejected.targets == [0.5, 0.5, 0.0]
    assert modified.targets == [0.5, 0.5, 1.0]
    assert rejected.input_ids == whole.input_ids[: start + 3]
    assert label_revision(tokenizer, one, start) == (None, None)


def test_soft_labels_are_the_share_of_revisions_that_edit():
    tokenizer = word_level(TEXTS)
    prompt = "\n\nHuman: is it far?\n\nAssistant:"
    same = revision(prompt, " it is very far", " it is very far")
    edited = revision(prompt, " it is very far", " it is not far")
    rejected, modified = label_revisions(tokenizer, [edited, same, edited, edited], 512)
    assert rejected.targets == [0.5, 0.5, 0.125, 0.5, 0.5]  # 3 of 4 edit `very`
    assert modified[0].targets == [0.5, 0.5, 0.875, 0.5, 0.5]
    assert modified[1].targets == [0.5] * 5
    with pytest.raises(ValueError, match="at least one revision"):
        soft_targets([1], [])


def test_memory_is_bounded_by_the_length_asked_for(monkeypatch):
    """A record of a million characters: only as much as training could use is aligned, and its labels stay."""
    byte_level = byte_level_tokenizer(["a b c d"])
    prompt, sizes = "\n\nHuman: Say a.\n\nAssistant:", []
    align = token_labels._align
    monkeypatch.setattr(token_labels, "_align", lambda ids, n: sizes.append((n, len(ids) - n)) or align(ids, n))
    long = Revision("i", prompt, " a", " b" + " c d" * 250_000, " a" + " c d" * 250_000, "", "m", {})
    rejected, modified = label_revision(byte_level, long, 64)
    assert sizes == [(4096, 4096)]
    assert len(rejected.input_ids) == len(modified.input_ids) == 64
    short = Revision("i", prompt, " a", " b" + " c d" * 50, " a" + " c d" * 50, "", "m", {})
    assert (rejected.targets, modified.targets) == tuple(e.targets for e in label_revision(byte_level, short, 64))
