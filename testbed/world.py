"""The world: what is asked, how answers are made, and how good any text truly is.

A prompt names a topic and a manner and asks for a number of facts. An answer is an opener, clauses that each state a
fact about the topic, and a closer:

    " Indeed. First the rose notably needs sand. Second the rose generally fears frost. - Regards."

Every choice in it has a grade in {1, .6, .25, 0, -.5, -1} that depends on the prompt. The true score of a text is

    10 - 4.0 * mean over the facts asked for of (1 - grade)
       - 1.0 * mean over their adverbs of (1 - grade)
       - 0.7 * (1 - opener grade) - 0.7 * (1 - closer grade)
       - 1.0 per clause beyond those asked for (rambling), however good
       - 1.0 per opener or closer in the wrong place - 0.2 per word that belongs to nothing, at most 3
       - 1.0 if the text has no end (no EOS),           and never less than 1.

A missing opener, closer or fact has grade -.5 and a missing adverb 0; a fact about another topic has -.5; one said
before, or with an object that no such verb takes ("cures butter"), has -1. Training never sees this score: it sees
preferences drawn from it (Bradley-Terry) and an oracle's edits (``testbed.reviser``).
"""

import math
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference
from testbed import vocabulary as words

CLOSING_MARK = "- "
"""Stands before a closer, so that one token decides whether an answer goes on or comes to its end."""

MISSING = -0.5
REPEATED = -1.0
OTHER_TOPIC = -0.5
NO_SUCH_OBJECT = -1.0
NO_ADVERB = 0.0

FACT_WEIGHT = 4.0
ADVERB_WEIGHT = 1.0
OPENER_WEIGHT = 0.7
CLOSER_WEIGHT = 0.7
RAMBLING_COST = 1.0
MISPLACED_COST = 1.0
STRAY_COST = 0.2
STRAY_LIMIT = 3.0
NO_END_COST = 1.0

REWARDED = (
    "A prompt names a topic and a manner and asks for a number of facts. The true score, from 1 to 10, rewards an "
    "answer that states as many right facts about the topic as asked for, none of them twice; that opens, words its "
    "facts and closes in the manner asked for; and that ends. Wrong or repeated facts cost up to 8 points, a wrong "
    "manner up to 4.8, every fact too many 1, words that belong to nothing up to 3, no end 1. Training never sees this "
    "score, only preferences drawn from it and minimal edits."
)
"""What a report says of the true score to those who have not read this file."""


@dataclass(frozen=True)
class Request:
    """What a prompt asks for."""

    topic: str
    manner: str
    count: int


@dataclass(frozen=True)
class Span:
    """A piece of an answer: ``answer[start:end]`` says ``text`` (lower case, single spaces, no final punctuation)."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Clause:
    """``[ordinal] (the topic | it) [adverb] relation object``; ``topic`` is None where the clause says "it"."""

    start: int
    end: int
    topic: str | None
    adverb: Span | None
    relation: Span
    object: Span


@dataclass(frozen=True)
class Parts:
    """What an answer consists of. Opener and closer only where they belong; everything else out of place or stray."""

    opener: Span | None
    clauses: tuple[Clause, ...]
    closer: Span | None
    misplaced: tuple[Span, ...]
    stray: tuple[Span, ...]


@dataclass(frozen=True)
class World:
    """The parameters of a world. ``seed`` decides the facts, so every seed is a fresh world in the same language."""

    seed: int = 0
    # How answers are sampled: a choice of grade g has weight exp(goodness * g), goodness ~ N(mean, spread) per answer.
    goodness_mean: float = 0.2
    goodness_spread: float = 1.0
    wrong_count_rate: float = 0.4
    repeat_rate: float = 0.25
    missing_rate: float = 0.05
    misplaced_rate: float = 0.2
    # P(a preferred to b) = sigmoid(sharpness * (score a - score b)).
    preference_sharpness: float = 1.0
    # The reviser: P(edit a choice of grade g) = edit_rate_worst * (edit_free_grade - g) / (edit_free_grade + 1), >= 0.
    edit_free_grade: float = 0.7
    edit_rate_worst: float = 0.9
    cut_rate: float = 0.9
    extend_rate: float = 0.7
    revision_noise: float = 0.03

    def __post_init__(self):
        for name in (field.name for field in fields(self) if field.name.endswith(("_rate", "_worst", "_noise"))):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")

    @cached_property
    def facts(self) -> dict[tuple[str, str, str], float]:
        """Grade of every (topic, relation, object) that the language can state about a topic."""
        rng = random.Random(f"facts {self.seed}")
        size = len(words.FACT_GRADES)
        table = {}
        for relation, objects in words.RELATIONS.items():
            # A Latin square with its rows, columns and symbols shuffled.
            rows, columns, grades = (rng.sample(range(size), size) for _ in range(3))
            for topic, row in zip(words.TOPICS, rows, strict=True):
                for thing, column in zip(objects, columns, strict=True):
                    table[topic, relation, thing] = words.FACT_GRADES[grades[(row + column) % size]]
        return table

    def fact_grade(self, topic: str, clause: Clause) -> float:
        if clause.topic not in (None, topic):
            return OTHER_TOPIC
        return self.facts.get((topic, clause.relation.text, clause.object.text), NO_SUCH_OBJECT)

    # Prompts, answers, pairs

    def sample_prompt(self, rng: random.Random) -> str:
        earlier = rng.choice(words.EARLIER_TURNS) if rng.random() < 0.1 else ""
        greeting = rng.choice(words.GREETINGS).format(name=rng.choice(words.NAMES))
        ask = rng.choice(words.ASKS).format(
            topic=rng.choice(words.TOPICS), manner=rng.choice(words.MANNERS), count=rng.choice(tuple(words.COUNTS))
        )
        return f"{earlier}\n\nHuman:{greeting}{rng.choice(words.PLACES)}{ask}\n\nAssistant:"

    def sample_answer(self, request: Request, rng: random.Random, goodness: float | None = None) -> str:
        """An answer, leading space included. ``goodness`` (about -2 to 3) is drawn where it is not given."""
        if goodness is None:
            goodness = rng.gauss(self.goodness_mean, self.goodness_spread)

        def phrase(registers: dict[str, tuple[str, ...]]) -> str:
            grades = words.MANNER_GRADES[request.manner]
            register = rng.choices(list(registers), [math.exp(goodness * grades[name]) for name in registers])[0]
            return rng.choice(registers[register])

        count = request.count
        if rng.random() < self.wrong_count_rate:
            count += rng.choice((-1, 1, 1, 2)) if count > 1 else 1
        relations = rng.sample(list(words.RELATIONS), min(count, len(words.RELATIONS)))
        repeats_itself = rng.random() < self.repeat_rate
        stated: list[tuple[str, str]] = []
        sentences = [] if rng.random() < self.missing_rate else [phrase(words.OPENERS)]
        for index, relation in enumerate(relations):
            objects = words.RELATIONS[relation]
            weights = [math.exp(goodness * self.facts[request.topic, relation, thing]) for thing in objects]
            fact = (relation, rng.choices(objects, weights)[0])
            if stated and repeats_itself and rng.random() < 0.6:
                fact = rng.choice(stated)
            stated.append(fact)
            adverb = None if rng.random() < self.missing_rate else phrase(words.ADVERBS)
            sentences.append(clause_text(index, request.topic, adverb, *fact))
        if rng.random() >= self.missing_rate:
            sentences.append(CLOSING_MARK + phrase(words.CLOSERS))
        if rng.random() < self.misplaced_rate:  # most often an answer that does not stop after its closer
            for _ in range(rng.choice((1, 1, 2, 3))):
                at = len(sentences) if rng.random() < 0.7 else rng.randint(1, len(sentences))
                closing = rng.random() < 0.7
                sentences.insert(at, CLOSING_MARK + phrase(words.CLOSERS) if closing else phrase(words.OPENERS))
        return " " + " ".join(sentences)

    def sample_pair(self, prompt: str, rng: random.Random) -> Preference:
        """Two different answers; which one is chosen is Bradley-Terry on the true score."""
        request = parse_prompt(prompt)
        one, other = self.sample_answer(request, rng), self.sample_answer(request, rng)
        while other == one:
            other = self.sample_answer(request, rng)
        difference = self.score(prompt, one) - self.score(prompt, other)
        if rng.random() >= self.preference_probability(difference):
            one, other = other, one
        return Preference(prompt, one, other)

    def preference_probability(self, score_difference: float) -> float:
        """Bradley-Terry: probability that the answer that scores higher by ``score_difference`` is preferred."""
        return 1 / (1 + math.exp(-self.preference_sharpness * score_difference))

    # The truth

    def costs(self, prompt: str, response: str, ended: bool = True) -> dict[str, float]:
        """What each kind of flaw takes from 10 (see the module's formula). Takes any text as ``response``."""
        request, parts = parse_prompt(prompt), parse_answer(response)
        asked = parts.clauses[: request.count]
        missing = request.count - len(asked)
        manner = words.MANNER_GRADES[request.manner]
        fact_grades, stated = [MISSING] * missing, set()
        for clause in asked:
            fact = (clause.relation.text, clause.object.text)
            fact_grades.append(REPEATED if fact in stated else self.fact_grade(request.topic, clause))
            stated.add(fact)
        adverbs = [clause.adverb for clause in asked]
        adverb_grades = [manner[REGISTER[adverb.text]] if adverb else NO_ADVERB for adverb in adverbs]
        adverb_grades += [NO_ADVERB] * missing
        opener, closer = (manner[REGISTER[span.text]] if span else MISSING for span in (parts.opener, parts.closer))
        return {
            "facts": FACT_WEIGHT * sum(1 - grade for grade in fact_grades) / request.count,
            "adverbs": ADVERB_WEIGHT * sum(1 - grade for grade in adverb_grades) / request.count,
            "opener": OPENER_WEIGHT * (1 - opener),
            "closer": CLOSER_WEIGHT * (1 - closer),
            "rambling": RAMBLING_COST * (len(parts.clauses) - len(asked)),
            "misplaced": MISPLACED_COST * len(parts.misplaced),
            "stray": min(STRAY_COST * len(parts.stray), STRAY_LIMIT),
            "no_end": 0.0 if ended else NO_END_COST,
        }

    def score(self, prompt: str, response: str, ended: bool = True) -> float:
        """True score in [1, 10] of any text. Raises ``InputError`` if the prompt is not of this world."""
        return max(1.0, 10.0 - sum(self.costs(prompt, response, ended).values()))


def true_score(prompt: str, response: str, ended: bool) -> float:
    """True score, 1-10, in the world of seed ``TESTBED_WORLD_SEED`` (an environment variable, default 0).

    The scorer to name where one is wanted as ``python:testbed.world:true_score``.
    """
    return World(seed=int(os.environ.get("TESTBED_WORLD_SEED", "0"))).score(prompt, response, ended)


def distinct_prompts(world: World, rng: random.Random, taken: set[str] | None = None) -> Iterator[str]:
    """Endless prompts, no two alike, none in ``taken``: no prompt stands in two parts of the data."""
    seen = set() if taken is None else taken
    while True:
        prompt = world.sample_prompt(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def repeats_a_fact(response: str) -> bool:
    """Whether a text states some fact (relation and object) more than once."""
    stated = [(clause.relation.text, clause.object.text) for clause in parse_answer(response).clauses]
    return len(set(stated)) < len(stated)


def clause_text(index: int, topic: str, adverb: str | None, relation: str, thing: str) -> str:
    """The ``index``-th clause (from 0) of an answer as a sentence."""
    ordinal = words.ORDINALS[min(index, len(words.ORDINALS) - 1)]
    return " ".join(word for word in (ordinal, "the", topic, adverb, relation, thing) if word) + "."


# Reading text


def key(text: str) -> str:
    """How a phrase is compared: its words in lower case, without punctuation."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


class _Phrases:
    """A set of phrases to look up at a place in a text, longest first so that no phrase hides a longer one."""

    def __init__(self, texts: Iterable[str]):
        self.known = {tuple(key(text).split()) for text in texts}
        self.lengths = sorted({len(phrase) for phrase in self.known}, reverse=True)


REGISTER = {
    key(phrase): register
    for registers in (words.OPENERS, words.ADVERBS, words.CLOSERS)
    for register, phrases in registers.items()
    for phrase in phrases
}
_OPENERS = _Phrases(phrase for phrases in words.OPENERS.values() for phrase in phrases)
_CLOSERS = _Phrases(phrase for phrases in words.CLOSERS.values() for phrase in phrases)
_ADVERBS = _Phrases(phrase for phrases in words.ADVERBS.values() for phrase in phrases)
_ORDINALS = _Phrases(words.ORDINALS)
_SUBJECTS = _Phrases([*(f"the {topic}" for topic in words.TOPICS), "it"])
_RELATIONS = _Phrases(words.RELATIONS)
_OBJECTS = _Phrases(thing for objects in words.RELATIONS.values() for thing in objects)


def parse_prompt(prompt: str) -> Request:
    """Read topic, manner and count from the last human turn. Raises ``InputError`` where one is not to be found."""
    turn = set(re.findall(r"[a-z]+", prompt.rpartition("Human:")[2].lower()))
    found = []
    for name, known in (("topic", words.TOPICS), ("manner", words.MANNERS), ("count", tuple(words.COUNTS))):
        named = [word for word in known if word in turn]
        if len(named) != 1:
            raise InputError(
                f"the last turn of the prompt {prompt!r} names {len(named)} {name}s of this world, not one"
            )
        found.append(named[0])
    return Request(found[0], found[1], words.COUNTS[found[2]])


_PUNCTUATION = re.compile(r"[.!?:,;]*")


class _Reader:
    """Words of a text with a position that moves only over what was recognised."""

    def __init__(self, text: str):
        self.text = text
        self.words = [(match.group().lower(), match.start(), match.end()) for match in re.finditer(r"[^\W_]+", text)]
        self.position = 0

    def take(self, phrases: _Phrases, sentence: bool = False) -> Span | None:
        """The longest of ``phrases`` that stands here, or None. A ``sentence`` takes its final punctuation along."""
        for length in phrases.lengths:
            here = self.words[self.position : self.position + length]
            phrase = tuple(word for word, _, _ in here)
            if phrase in phrases.known:
                self.position += len(phrase)
                end = _PUNCTUATION.match(self.text, here[-1][2]).end() if sentence else here[-1][2]
                return Span(" ".join(phrase), here[0][1], end)
        return None

    def clause(self) -> Clause | None:
        before = self.position
        ordinal = self.take(_ORDINALS)
        subject = self.take(_SUBJECTS)
        adverb = self.take(_ADVERBS)
        relation = self.take(_RELATIONS)
        thing = self.take(_OBJECTS)
        if not (subject and relation and thing):
            self.position = before
            return None
        topic = None if subject.text == "it" else subject.text.removeprefix("the ")
        end = _PUNCTUATION.match(self.text, thing.end).end()
        return Clause((ordinal or subject).start, end, topic, adverb, relation, thing)


def parse_answer(response: str) -> Parts:
    """Read any text as an answer; what cannot be read is stray words. Case and punctuation do not matter.

    The opener is the first one, if it stands before all clauses; the closer is the first one behind all of them.
    """
    reader = _Reader(response)
    clauses: list[Clause] = []
    openers: list[Span] = []
    closers: list[Span] = []
    stray: list[Span] = []
    while reader.position < len(reader.words):
        if clause := reader.clause():
            clauses.append(clause)
        elif opener := reader.take(_OPENERS, sentence=True):
            openers.append(opener)
        elif closer := reader.take(_CLOSERS, sentence=True):
            mark = CLOSING_MARK if response.endswith(CLOSING_MARK, 0, closer.start) else ""
            closers.append(Span(closer.text, closer.start - len(mark), closer.end))
        else:
            word, start, end = reader.words[reader.position]
            stray.append(Span(word, start, end))
            reader.position += 1
    first, last = (clauses[0].start, clauses[-1].start) if clauses else (len(response), 0)
    opener = next((span for span in openers[:1] if span.start < first), None)
    closer = next((span for span in closers if span.start >= last), None)
    misplaced = tuple(span for span in (*openers, *closers) if span not in (opener, closer))
    return Parts(opener, tuple(clauses), closer, misplaced, tuple(stray))
