"""The worlds: what is asked, how answers are made, and how good any text truly is.

A prompt names a topic and a manner and asks what the topic does in two to four respects (world 2), or for a number of
facts (world 1). An answer is an opener, clauses that each state a fact about the topic, and a closer:

    " Indeed. First the rose notably needs sand. Second the rose generally fears frost. - Regards."

Every choice in it has a grade in {1, .6, .25, 0, -.5, -1} that depends on the prompt. The true score of a text is

    10 - 4.0 * mean over the facts asked for of (1 - grade)
       - 1.0 * mean over their adverbs of (1 - grade)
       - 0.7 * (1 - opener grade) - 0.7 * (1 - closer grade)
       - 1.0 per clause beyond those asked for (rambling), however good
       - 1.0 per opener or closer in the wrong place - 0.2 per word that belongs to nothing, at most 3
       - 1.0 if the text has no end (no EOS),           and never less than 1.

A missing opener, closer or fact has grade -.5 and a missing adverb 0; a fact about another topic has -.5; one with an
object that no such verb takes ("cures butter") has -1, and so has what was not asked or was answered already (world 1:
a fact said before). Training never sees this score: it sees preferences drawn from it (Bradley-Terry) and an oracle's
edits (``testbed.reviser``).

World 2 (``World``) is made so that only what people prefer tells right from usual; docs/testbed.md argues each choice.
World 1 (``World1``) is the one before it, where the likeliest answer is the best one.
"""

import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import ClassVar

from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference
from testbed import vocabulary as words

CLOSING_MARK = "- "
"""Stands before a closer, so that one token decides whether an answer goes on or comes to its end."""

MISSING, REPEATED, OTHER_TOPIC, NO_SUCH_OBJECT, NO_ADVERB = -0.5, -1.0, -0.5, -1.0, 0.0
FACT_WEIGHT, ADVERB_WEIGHT, OPENER_WEIGHT, CLOSER_WEIGHT = 4.0, 1.0, 0.7, 0.7
RAMBLING_COST, MISPLACED_COST, NO_END_COST = 1.0, 1.0, 1.0
STRAY_COST, STRAY_LIMIT = 0.2, 3.0

REWARDED = (
    "A prompt names a topic and a manner and says what is to be told about the topic. The true score, from 1 to 10, "
    "rewards an answer that states the right facts asked for, each once; that opens, words its facts and closes in the "
    "manner asked for; and that ends. Wrong, repeated or unasked facts cost up to 8 points, a wrong manner up to 4.8, "
    "every fact too many 1, words that belong to nothing up to 3, no end 1. Training never sees this score, only "
    "preferences drawn from it and minimal edits."
)
"""What a report says of the true score to those who have not read this file."""


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: ``count`` facts, of these ``aspects`` (relations) where it names any."""

    topic: str
    manner: str
    count: int
    aspects: tuple[str, ...] = ()


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
    """The parameters of world 2. ``seed`` decides facts and habits, so every seed is a fresh world in one language."""

    seed: int = 0
    # How answers are sampled: a choice of grade g has weight exp(goodness * g), goodness ~ N(mean, spread) per answer,
    # and the usual choice exp(habit) times that.
    goodness_mean: float = 0.2
    goodness_spread: float = 1.0
    habit: float = 2.5
    wrong_count_rate: float = 0.4
    digression_rate: float = 0.15
    repeat_rate: float = 0.0
    missing_rate: float = 0.05
    misplaced_rate: float = 0.2
    # Shares of facts and of manners in which what is usual is wrong (grade -.5); elsewhere it is right.
    wrong_fact_rate: float = 0.4
    wrong_manner_rate: float = 0.5
    # P(a preferred to b) = sigmoid(sharpness * (score a - score b)).
    preference_sharpness: float = 1.0
    # The reviser: P(edit a choice of grade g) = edit_rate_worst * (edit_free_grade - g) / (edit_free_grade + 1), >= 0;
    # what it inserts, exp(insert_sharpness * grade) among those better than the old and no worse than .25.
    edit_free_grade: float = 1.0
    edit_rate_worst: float = 0.9
    insert_sharpness: float = 6.0
    cut_rate: float = 0.9
    extend_rate: float = 0.7
    revision_noise: float = 0.03

    topics: ClassVar = words.TOPICS
    relations: ClassVar = words.RELATIONS
    rewarded: ClassVar = f"{REWARDED} In 40 % of facts and half of the manners what texts usually say is wrong."
    kinds: ClassVar = ("prompts", "facts", "phrasings")
    """What is new in a held-out prompt: itself alone; the facts it asks for; how it is phrased."""

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
        for relation, objects in self.relations.items():
            for begin in range(0, len(self.topics), size):
                # A Latin square with its rows, columns and symbols shuffled.
                rows, columns, grades = (rng.sample(range(size), size) for _ in range(3))
                for topic, row in zip(self.topics[begin : begin + size], rows, strict=True):
                    for thing, column in zip(objects, columns, strict=True):
                        table[topic, relation, thing] = words.FACT_GRADES[grades[(row + column) % size]]
        return table

    def objects(self, topic: str, relation: str) -> dict[str, float]:
        """Grade of each object of a relation."""
        return {thing: self.facts[topic, relation, thing] for thing in self.relations[relation]}

    @cached_property
    def usual(self) -> dict[tuple[str, ...], str]:
        """The corpus's habits: the usual object of each (topic, relation), the usual register of each (manner,)."""
        rng = random.Random(f"habits {self.seed}")
        choices = {(t, r): self.objects(t, r) for t in self.topics for r in self.relations}
        manners = {(manner,): words.MANNER_GRADES[manner] for manner in words.MANNERS}
        found = {}
        for group, share in ((choices, self.wrong_fact_rate), (manners, self.wrong_manner_rate)):
            wrong = set(rng.sample(sorted(group), round(share * len(group))))
            for key_, grades in group.items():
                grade = -0.5 if key_ in wrong else 1.0
                found[key_] = rng.choice([name for name in grades if grades[name] == grade])
        return found

    @cached_property
    def held_out(self) -> set[tuple[str, str]]:
        """Two (topic, relation) of each topic that no preference, revision or RL prompt is about."""
        rng = random.Random(f"held out {self.seed}")
        return {(topic, relation) for topic in self.topics for relation in rng.sample(list(self.relations), 2)}

    def fact_grade(self, topic: str, clause: Clause) -> float:
        if clause.topic not in (None, topic):
            return OTHER_TOPIC
        return self.facts.get((topic, clause.relation.text, clause.object.text), NO_SUCH_OBJECT)

    def fact_grades(self, request: Request, clauses: Sequence[Clause]) -> list[float]:
        """Grade of each clause's fact: -1 where it answers what was not asked, or was answered by an earlier clause."""
        open_ = list(request.aspects)
        found = []
        for clause in clauses:
            asked = clause.relation.text in open_
            if asked:
                open_.remove(clause.relation.text)
            found.append(self.fact_grade(request.topic, clause) if asked else REPEATED)
        return found

    def next_relation(self, request: Request, used: set[str], rng: random.Random) -> str:
        """What an answer that has used these relations should speak of next."""
        return next((one for one in request.aspects if one not in used), request.aspects[-1])

    # Prompts, answers, pairs

    def sample_prompt(self, rng: random.Random, kind: str = "prompts") -> str:
        """A prompt of one of ``kinds``; one about new facts asks for two, the topic's two held-out ones."""
        topic = rng.choice(self.topics)
        new = [relation for relation in self.relations if (topic, relation) in self.held_out]
        seen = [relation for relation in self.relations if relation not in new]
        aspects = rng.sample(new, 2) if kind == "facts" else rng.sample(seen, rng.randint(2, 4))
        told = f"{', '.join(aspects[:-1])} and {aspects[-1]}"
        ask = rng.choice(words.UNSEEN_ASKS if kind == "phrasings" else words.ASKS)
        return self._framed(ask.format(topic=topic, manner=rng.choice(words.MANNERS), aspects=told), rng)

    @staticmethod
    def _framed(ask: str, rng: random.Random) -> str:
        earlier = rng.choice(words.EARLIER_TURNS) if rng.random() < 0.1 else ""
        greeting = rng.choice(words.GREETINGS).format(name=rng.choice(words.NAMES))
        return f"{earlier}\n\nHuman:{greeting}{rng.choice(words.PLACES)}{ask}\n\nAssistant:"

    def chosen(self, grades: dict[str, float], usual: str | None, goodness: float, rng: random.Random) -> str:
        """One of ``{choice: grade}`` as an answer of this goodness chooses."""
        weights = [math.exp(goodness * grade + self.habit * (name == usual)) for name, grade in grades.items()]
        return rng.choices(list(grades), weights)[0]

    def relations_of_answer(self, request: Request, count: int, rng: random.Random) -> list[str]:
        """What ``count`` clauses speak of: what was asked, in order, and beyond that, or by digression, whatever.

        A digression takes every relation alike, those said before included: a repeat is as likely as any other.
        """
        asked, any_ = list(request.aspects), list(self.relations)
        allowed = [one for one in any_ if (request.topic, one) not in self.held_out or one in asked]
        of = [*asked, *(rng.choice(allowed) for _ in range(len(asked), count))][:count]
        return [rng.choice(allowed) if rng.random() < self.digression_rate else one for one in of]

    def sample_answer(self, request: Request, rng: random.Random, goodness: float | None = None) -> str:
        """An answer, leading space included. ``goodness`` (about -2 to 3) is drawn where it is not given."""
        if goodness is None:
            goodness = rng.gauss(self.goodness_mean, self.goodness_spread)

        def phrase(registers: dict[str, tuple[str, ...]]) -> str:
            grades = words.MANNER_GRADES[request.manner]
            by_register = {name: grades[name] for name in registers}
            return rng.choice(registers[self.chosen(by_register, self.usual.get((request.manner,)), goodness, rng)])

        count = request.count
        if rng.random() < self.wrong_count_rate:
            count += rng.choice((-1, 1, 1, 2)) if count > 1 else 1
        repeats_itself = rng.random() < self.repeat_rate
        stated: list[tuple[str, str]] = []
        sentences = [] if rng.random() < self.missing_rate else [phrase(words.OPENERS)]
        for index, relation in enumerate(self.relations_of_answer(request, count, rng)):
            usual = self.usual.get((request.topic, relation))
            fact = (relation, self.chosen(self.objects(request.topic, relation), usual, goodness, rng))
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

    def inserted(self, grades: dict[str, float], old: float, rng: random.Random) -> str:
        """What the reviser puts in the place of a choice of grade ``old``: one that is better, not always the best."""
        better = {name: grade for name, grade in grades.items() if grade > old and grade >= 0.25}
        if not better:
            return max(grades, key=grades.__getitem__)
        return rng.choices(list(better), [math.exp(self.insert_sharpness * grade) for grade in better.values()])[0]

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
        fact_grades = [MISSING] * missing + self.fact_grades(request, asked)
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


class World1(World):
    """World 1: prompts ask for a number of facts and leave open which; what is usual is what is good, and the reviser
    inserts the best alone. Most of what an answer that repeats itself repeats is said on purpose."""

    topics: ClassVar = words.OLD_TOPICS
    relations: ClassVar = words.OLD_RELATIONS
    rewarded: ClassVar = REWARDED
    kinds: ClassVar = ("prompts",)
    usual: ClassVar = {}
    held_out: ClassVar = set()

    def __init__(self, seed: int = 0, repeat_rate: float = 0.25, edit_free_grade: float = 0.7, **rates: float):
        super().__init__(seed, repeat_rate=repeat_rate, edit_free_grade=edit_free_grade, digression_rate=0.0, **rates)

    def fact_grades(self, request: Request, clauses: Sequence[Clause]) -> list[float]:
        facts = [(clause.relation.text, clause.object.text) for clause in clauses]
        return [
            REPEATED if fact in facts[:at] else self.fact_grade(request.topic, clause)
            for at, (fact, clause) in enumerate(zip(facts, clauses, strict=True))
        ]

    def next_relation(self, request: Request, used: set[str], rng: random.Random) -> str:
        return rng.choice([relation for relation in self.relations if relation not in used] or list(self.relations))

    def sample_prompt(self, rng: random.Random, kind: str = "prompts") -> str:
        names = {"topic": self.topics, "manner": words.MANNERS, "count": tuple(words.COUNTS)}
        ask = rng.choice(words.OLD_ASKS).format(**{name: rng.choice(known) for name, known in names.items()})
        return self._framed(ask, rng)

    def relations_of_answer(self, request: Request, count: int, rng: random.Random) -> list[str]:
        return rng.sample(list(self.relations), min(count, len(self.relations)))

    def inserted(self, grades: dict[str, float], old: float, rng: random.Random) -> str:
        return max(grades, key=grades.__getitem__)


WORLDS: dict[int, type[World]] = {1: World1, 2: World}


def true_score(prompt: str, response: str, ended: bool) -> float:
    """True score, 1-10, in the world that the environment names: ``TESTBED_WORLD``, 1 or 2 (default), of seed
    ``TESTBED_WORLD_SEED`` (default 0). Builds each world once.

    The scorer to name where one is wanted as ``python:testbed.world:true_score``.
    """
    version, seed = os.environ.get("TESTBED_WORLD", "2"), os.environ.get("TESTBED_WORLD_SEED", "0")
    return _world(int(version), int(seed)).score(prompt, response, ended)


@cache
def _world(version: int, seed: int) -> World:
    return WORLDS[version](seed=seed)


def distinct_prompts(world: World, rng: random.Random, seen: set[str], kind: str = "prompts") -> Iterator[str]:
    """Endless prompts, no two alike and none in ``seen``, where each is noted: none stands in two parts of the data."""
    while True:
        prompt = world.sample_prompt(rng, kind)
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


REGISTER = {
    key(phrase): register
    for registers in (words.OPENERS, words.ADVERBS, words.CLOSERS)
    for register, phrases in registers.items()
    for phrase in phrases
}


def parse_prompt(prompt: str) -> Request:
    """Read what the last human turn asks for. Raises ``InputError`` where part of it is not to be found."""
    turn = re.findall(r"[a-z]+", prompt.rpartition("Human:")[2].lower())
    found = []
    for name, known in (("topic", words.TOPICS), ("manner", words.MANNERS), ("count", tuple(words.COUNTS))):
        named = [word for word in known if word in turn]
        aspects = tuple(word for word in turn if word in words.RELATIONS) if name == "count" else ()
        if aspects and not named:
            return Request(found[0], found[1], len(aspects), aspects)
        if len(named) != 1:
            raise InputError(
                f"the last turn of the prompt {prompt!r} names {len(named)} {name}s of this world, not one"
            )
        found.append(named[0])
    return Request(found[0], found[1], words.COUNTS[found[2]])


def _word(name: str, known: Iterable[str]) -> str:
    """A pattern for one of the known words, whatever follows it."""
    return rf"(?P<{name}>{'|'.join(map(key, known))})(?![^\W_])"


def _phrases(registers: dict[str, tuple[str, ...]]) -> list[str]:
    return [phrase for phrases in registers.values() for phrase in phrases]


_GAP, _STOP = r"[\W_]+", r"[.!?:,;]*"
_CLAUSE = (
    rf"(?:{_word('ordinal', words.ORDINALS)}{_GAP})?(?:the{_GAP}{_word('topic', words.TOPICS)}|it){_GAP}"
    rf"(?:{_word('adverb', _phrases(words.ADVERBS))}{_GAP})?{_word('relation', words.RELATIONS)}{_GAP}"
    rf"{_word('object', (thing for objects in words.RELATIONS.values() for thing in objects))}{_STOP}"
)
_PIECE = re.compile(
    rf"(?<![^\W_])(?:{_CLAUSE}|{_word('opener', _phrases(words.OPENERS))}{_STOP}|"
    rf"{_word('closer', _phrases(words.CLOSERS))}{_STOP}|(?P<stray>[^\W_]+))",
    re.IGNORECASE,
)


def parse_answer(response: str) -> Parts:
    """Read any text as an answer; what cannot be read is stray words. Case and punctuation do not matter.

    The opener is the first one, if it stands before all clauses; the closer is the first one behind all of them.
    """
    clauses: list[Clause] = []
    found: dict[str, list[Span]] = {"opener": [], "closer": [], "stray": []}
    for piece in _PIECE.finditer(response):
        spans = {name: Span(text.lower(), *piece.span(name)) for name, text in piece.groupdict().items() if text}
        if "relation" in spans:
            topic = spans["topic"].text if "topic" in spans else None
            clauses.append(Clause(*piece.span(), topic, spans.get("adverb"), spans["relation"], spans["object"]))
            continue
        name = str(piece.lastgroup)
        marked = name == "closer" and response.endswith(CLOSING_MARK, 0, piece.start())
        start = piece.start() - len(CLOSING_MARK) * marked
        found[name].append(Span(spans[name].text, start, piece.end()))
    first, last = (clauses[0].start, clauses[-1].start) if clauses else (len(response), 0)
    opener = next((span for span in found["opener"][:1] if span.start < first), None)
    closer = next((span for span in found["closer"] if span.start >= last), None)
    misplaced = tuple(span for span in (*found["opener"], *found["closer"]) if span not in (opener, closer))
    return Parts(opener, tuple(clauses), closer, misplaced, tuple(found["stray"]))
