"""Token labels from a revision (paper section 4.1, Eq. 4-5): Levenshtein over tokens, rejected -> modified.

In the rejected response a deleted or substituted token is negative, in the modified one an added or substituted token
is positive, all others are neutral. Usually there are several minimal alignments, so this rule is part of the label:
equal tokens always match; otherwise, of the steps that keep the distance minimal, delete comes before add before
substitute; the trace starts at the end, so the right-most matches are kept.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numba import njit
from transformers import PreTrainedTokenizerFast

from deepspeed_chat_tlcr.records import Revision
from deepspeed_chat_tlcr.tokenization import TokenizedExample, tokenize_response, truncate

NEGATIVE, NEUTRAL, POSITIVE = 0.0, 0.5, 1.0

WHOLE = 1 << 15
"""A ``max_length`` beyond which nobody trains."""
_LEAST_ALIGNED = 1 << 12

_ONE, _TOP, _NONE = np.uint64(1), np.uint64(63), np.uint64(0)
_ALL = ~_NONE
_BUCKETS = 256


def edit_targets(rejected_ids: Sequence[int], modified_ids: Sequence[int]) -> tuple[list[float], list[float]]:
    """Targets of both responses, one per token: 0.0 negative, 0.5 neutral, 1.0 positive.

    Worked example, ``[1, 2] -> [2, 3]``: the distance is 2, reached either by substituting both tokens or by deleting
    the 1, matching the 2 and adding the 3. Traced from the end, at (2, 3) a deletion would cost more than the minimum,
    an addition does not, so 3 is added; then 2 matches 2; then 1 is deleted:

    >>> edit_targets([1, 2], [2, 3])
    ([0.0, 0.5], [0.5, 1.0])
    """
    count = len(rejected_ids)
    # Packed bytes become an array in half the time that numpy takes for a list, which is a third of the whole.
    packed = struct.pack(f"{count + len(modified_ids)}q", *rejected_ids, *modified_ids)
    targets = _align(np.frombuffer(packed, np.int64), count).tolist()
    return targets[:count], targets[count:]


def soft_targets(
    rejected_ids: Sequence[int], modified_ids: Sequence[Sequence[int]]
) -> tuple[list[float], list[list[float]]]:
    """Soft labels from several revisions of one rejected response: the share of revisions that make the edit.

    A rejected token that the share ``f`` of revisions deletes or substitutes gets ``0.5 - f / 2``. A token that a
    revision adds or substitutes, and that the share ``f`` of revisions (itself counted) has too, gets ``0.5 + f / 2``.
    With one revision these are the targets of ``edit_targets``. Raises ``ValueError`` without a revision.

    >>> soft_targets([1, 2], [[1, 3], [4, 3]])
    ([0.25, 0.0], [[0.5, 1.0], [0.75, 1.0]])
    """
    if not modified_ids:
        raise ValueError("soft targets need at least one revision")
    count = len(modified_ids)
    pairs = [edit_targets(rejected_ids, modified) for modified in modified_ids]
    rejected = [sum(column) / count for column in zip(*(targets for targets, _ in pairs), strict=True)]
    soft = []
    for index, (_, targets) in enumerate(pairs):
        sharing = [1] * len(targets)  # how many revisions have this token, itself counted
        for other in (*modified_ids[:index], *modified_ids[index + 1 :]):
            kept, _ = edit_targets(modified_ids[index], other)
            sharing = [number + (target == NEUTRAL) for number, target in zip(sharing, kept, strict=True)]
        labelled = zip(targets, sharing, strict=True)
        soft.append([target if target == NEUTRAL else 0.5 + number / count / 2 for target, number in labelled])
    return rejected, soft


def label_revision(
    tokenizer: PreTrainedTokenizerFast, revision: Revision, max_length: int
) -> tuple[TokenizedExample | None, TokenizedExample | None]:
    """The rejected and the modified example of a revision, with targets for the response's tokens, EOS included.

    The tokens are labelled in context and before the cut, which therefore does not change the remaining labels.
    Aligning n with m tokens takes n m / 4 bytes, so only the first 2 ``max_length`` tokens of a response (at least
    4,096) are aligned. An example whose prompt alone fills ``max_length`` tokens is None.
    """
    rejected, modified = label_revisions(tokenizer, [revision], max_length)
    return rejected, modified[0]


def label_revisions(
    tokenizer: PreTrainedTokenizerFast, revisions: Sequence[Revision], max_length: int
) -> tuple[TokenizedExample | None, list[TokenizedExample | None]]:
    """As ``label_revision``, for several revisions of the same pair (equal ``id``), with soft targets."""
    first, longest = revisions[0], max(2 * max_length, _LEAST_ALIGNED)
    texts = (first.rejected, *(revision.modified for revision in revisions))
    examples = (tokenize_response(tokenizer, first.prompt, text) for text in texts)
    rejected, *modified = (replace(e, input_ids=e.input_ids[: e.response_start + longest]) for e in examples)
    rejected_targets, modified_targets = soft_targets(rejected.response_ids, [m.response_ids for m in modified])
    return _cut(rejected, rejected_targets, max_length), [
        _cut(example, targets, max_length) for example, targets in zip(modified, modified_targets, strict=True)
    ]


def _cut(example: TokenizedExample, targets: list[float], max_length: int) -> TokenizedExample | None:
    return truncate(TokenizedExample(example.input_ids, example.response_start, targets), max_length)


@njit(cache=True)
def _align(ids, n):
    """Targets of all ``ids``, of which the first ``n`` are the rejected ones (a), the others the modified ones (b).

    Only the steps of the Wagner-Fischer table D matter to the trace, and each is -1, 0 or 1, so a column of D is held
    as bits, 64 rows to a word (Hyyro 2003): ``down[j, w]`` has bit i set where D[i + 1, j + 1] = D[i, j + 1] + 1, a
    deletion on a minimal path; ``right[j, w]`` where D[i + 1, j + 1] = D[i + 1, j] + 1, an addition.
    """
    a, b = ids[:n], ids[n:]
    m = len(b)
    words = (n + 63) // 64
    targets = np.full(n + m, NEUTRAL)
    # Positions of each token of `a`, as chains by the token's low bits.
    last, before = np.full(_BUCKETS, -1, np.int64), np.empty(n, np.int64)
    for i in range(n):
        bucket = a[i] & (_BUCKETS - 1)
        before[i] = last[bucket]
        last[bucket] = i
    down, right = np.empty((m, words), np.uint64), np.empty((m, words), np.uint64)
    plus, minus = np.full(words, _ALL), np.zeros(words, np.uint64)  # vertical steps of the current column
    equal = np.zeros(words, np.uint64)
    for j in range(m):
        equal[:] = _NONE
        i = last[b[j] & (_BUCKETS - 1)]
        while i >= 0:
            if a[i] == b[j]:
                equal[i >> 6] |= _ONE << np.uint64(i & 63)
            i = before[i]
        carry_plus, carry_minus = _ONE, _NONE  # the table's first row grows by one each column
        for w in range(words):
            up, dn = plus[w], minus[w]
            match = equal[w] | carry_minus
            diagonal = (((match & up) + up) ^ up) | match | dn  # D does not grow along the diagonal
            across, across_minus = dn | ~(diagonal | up), diagonal & up
            right[j, w] = across
            shifted, shifted_minus = (across << _ONE) | carry_plus, (across_minus << _ONE) | carry_minus
            carry_plus, carry_minus = across >> _TOP, across_minus >> _TOP
            plus[w] = shifted_minus | ~(diagonal | shifted)
            minus[w] = shifted & diagonal
            down[j, w] = plus[w]
    i, j = n - 1, m - 1
    while i >= 0 or j >= 0:
        if i >= 0 and j >= 0 and a[i] == b[j]:
            i -= 1
            j -= 1
        elif j < 0 or (i >= 0 and (down[j, i >> 6] >> np.uint64(i & 63)) & _ONE):
            targets[i] = NEGATIVE
            i -= 1
        elif i < 0 or (right[j, i >> 6] >> np.uint64(i & 63)) & _ONE:
            targets[n + j] = POSITIVE
            j -= 1
        else:
            targets[i] = NEGATIVE
            targets[n + j] = POSITIVE
            i -= 1
            j -= 1
    return targets
