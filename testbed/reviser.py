"""The oracle reviser: the external language model's part (paper section 4.1), played by one who knows the truth.

It changes few choices of the rejected answer, the bad ones most often, now and then wrongly, and leaves all other
text as it stands.
"""

import random
from dataclasses import dataclass

from testbed import vocabulary as words
from testbed.world import (
    CLOSING_MARK,
    MISSING,
    NO_ADVERB,
    REGISTER,
    World,
    clause_text,
    key,
    parse_answer,
    parse_prompt,
)


@dataclass(frozen=True)
class Edit:
    """Put ``text`` in place of ``answer[start:end]``, for this reason."""

    start: int
    end: int
    text: str
    reason: str


def edit_probability(world: World, grade: float) -> float:
    """Chance that the reviser edits a choice of this grade: 0 from 1 upwards (world 1: .7), .9 at -1, linear."""
    worst = world.edit_free_grade + 1
    return world.edit_rate_worst * min(max((world.edit_free_grade - grade) / worst, 0.0), 1.0)


def revise(world: World, prompt: str, rejected: str, rng: random.Random) -> tuple[str, str]:
    """Edit ``rejected`` minimally towards what ``prompt`` asks for; return the modified response and the reasoning."""
    edits = propose_edits(world, prompt, rejected, rng)
    modified = rejected
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end), reverse=True):
        modified = modified[: edit.start] + edit.text + modified[edit.end :]
    reasons = list(dict.fromkeys(edit.reason for edit in edits)) or ["It is acceptable as it stands."]
    return modified, " ".join(reasons)


def propose_edits(world: World, prompt: str, rejected: str, rng: random.Random) -> list[Edit]:
    """The edits of one revision: no two overlap."""
    request, parts = parse_prompt(prompt), parse_answer(rejected)
    manner = words.MANNER_GRADES[request.manner]
    edits: list[Edit] = []

    def wants_edit(grade: float) -> str | None:
        """``"wrong"`` for a slip of the reviser, ``"right"`` for a wish to mend, None to leave the choice alone."""
        if rng.random() < world.revision_noise:
            return "wrong"
        return "right" if rng.random() < edit_probability(world, grade) else None

    def phrase(registers: dict[str, tuple[str, ...]], kind: str, old: str | None, grade: float) -> str:
        """A phrase that suits the manner asked for better than grade ``grade``; by a slip, any other one."""
        if kind == "right":
            return rng.choice(registers[world.inserted(manner, grade, rng)])
        return rng.choice([other for phrases in registers.values() for other in phrases if key(other) != old])

    def right_fact() -> tuple[str, str]:
        """A good fact that the answer does not have yet."""
        relation = world.next_relation(request, used, rng)
        used.add(relation)
        return relation, world.inserted(world.objects(request.topic, relation), MISSING, rng)

    # Sentences at the ends: replaced, or supplied where they are missing.
    for name, span, registers in (("opening", parts.opener, words.OPENERS), ("ending", parts.closer, words.CLOSERS)):
        grade = manner[REGISTER[span.text]] if span else MISSING
        kind = wants_edit(grade)
        if kind is None or (span is None and kind == "wrong"):
            continue
        text = phrase(registers, kind, span.text if span else None, grade)
        if name == "ending":
            text = CLOSING_MARK + text
        if span:
            edits.append(Edit(span.start, span.end, text, f"The {name} does not sound {request.manner}."))
        elif name == "opening":
            edits.append(Edit(_indent(rejected), _indent(rejected), text + " ", "It has no opening."))
        else:
            edits.append(Edit(_body_end(rejected), _body_end(rejected), " " + text, "It has no ending."))

    # Clauses: rambling is cut from the end, what is left is mended choice by choice, a short answer is continued.
    clauses = parts.clauses
    if len(clauses) > request.count and rng.random() < world.cut_rate:
        for clause in clauses[request.count :]:
            start = clause.start - (clause.start > 0 and rejected[clause.start - 1] == " ")
            edits.append(Edit(start, clause.end, "", f"It says more than {request.count} things."))
        clauses = clauses[: request.count]
    used = {clause.relation.text for clause in clauses}
    for clause, grade in zip(clauses, world.fact_grades(request, clauses), strict=True):
        relation, thing = clause.relation.text, clause.object.text
        # Repeated, not asked for, or of no such world.
        out_of_place = grade != world.fact_grade(request.topic, clause) or relation not in world.relations
        kind = wants_edit(grade)
        if kind is not None:
            about = f"about the {request.topic}"
            if kind == "wrong":
                other = rng.choice([other for other in words.RELATIONS[relation] if other != thing])
                edits.append(Edit(clause.object.start, clause.object.end, other, f"{thing!r} is not true {about}."))
            elif out_of_place:
                text = " ".join(right_fact())
                edits.append(Edit(clause.relation.start, clause.object.end, text, f"{thing!r} has no place here."))
            else:
                other = world.inserted(world.objects(request.topic, relation), grade, rng)
                edits.append(Edit(clause.object.start, clause.object.end, other, f"{thing!r} is not true {about}."))
        adverb = clause.adverb
        grade = manner[REGISTER[adverb.text]] if adverb else NO_ADVERB
        kind = wants_edit(grade)
        if kind is not None and adverb:
            text = phrase(words.ADVERBS, kind, adverb.text, grade)
            edits.append(Edit(adverb.start, adverb.end, text, f"{adverb.text!r} does not sound {request.manner}."))
        elif kind == "right":
            text = phrase(words.ADVERBS, kind, None, grade) + " "
            at = clause.relation.start
            edits.append(Edit(at, at, text, f"It could sound more {request.manner}."))
    if len(clauses) < request.count and rng.random() < world.extend_rate:
        at = parts.closer.start if parts.closer else _body_end(rejected)
        added = []
        for index in range(len(clauses), request.count):
            adverb = phrase(words.ADVERBS, "right", None, NO_ADVERB)
            added.append(clause_text(index, request.topic, adverb, *right_fact()))
        text = " ".join(added) + " " if parts.closer else " " + " ".join(added)
        edits.append(Edit(at, at, text, f"It says fewer than {request.count} things."))

    # What does not belong there goes.
    for span in (*parts.misplaced, *parts.stray):
        if rng.random() < world.cut_rate:
            start = span.start - (span.start > 0 and rejected[span.start - 1] == " ")
            edits.append(Edit(start, span.end, "", f"{span.text!r} has no place here."))
    return edits


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _body_end(text: str) -> int:
    return len(text.rstrip())
