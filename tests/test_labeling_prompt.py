"""The question that the external model gets, and everything its answer can look like."""

import doctest
import gzip
import json

import pytest
from conftest import shared

from deepspeed_chat_tlcr.asking.endpoint import ChatAnswer, Unusable
from deepspeed_chat_tlcr.errors import InputError
from deepspeed_chat_tlcr.records import Preference
from labeling import prompt
from labeling.prompt import build_messages, context_of, load_template, parse_answer, prompt_of
from labeling.revising import MAX_EDIT_RATIO, edit_ratio, read_revision

PAIR = Preference(
    "\n\nHuman: How far is it?\n\nAssistant: Not far.\n\nHuman: By car?\n\nAssistant:",
    " It takes ten minutes by car.",
    " It takes ten hours by car, you fool.\n",
)
REASON = "<|Start of Reasoning|>\nIt is rude and wrong.\n<|End of Reasoning|>\n"
START, END = "<|Start of Modified Response|>", "<|End of Modified Response|>"
EDITED = "It takes ten minutes by car, my friend."


def test_the_docstrings_examples():
    results = doctest.testmod(prompt)
    assert results.attempted == 2
    assert results.failed == 0


def test_the_question_shows_the_parts_between_their_tags():
    (message,) = build_messages(PAIR)
    text = message["content"]
    assert message["role"] == "user"
    for part in (
        "<|Start of Context|>\n###Human: How far is it?\n###Assistant: Not far.\n###Human: By car?\n<|End of Context|>",
        "<|Start of Preferred Response|>\nIt takes ten minutes by car.\n<|End of Preferred Response|>",
        "<|Start of Non-Preferred Response|>\nIt takes ten hours by car, you fool.\n<|End of Non-Preferred Response|>",
    ):
        assert part in text
    assert text.index("Start of Reasoning") < text.index("Start of Modified Response")  # first why, then how


def test_braces_in_the_texts_stay_as_they_are():
    pair = Preference("\n\nHuman: {rejected} {x}\n\nAssistant:", " {context}", " {chosen}")
    text = build_messages(pair)[0]["content"]
    assert "###Human: {rejected} {x}\n" in text
    assert "\n{context}\n" in text
    assert "\n{chosen}\n" in text


@pytest.mark.parametrize(
    ("given", "context"),
    [
        ("Just a text", "###Human: Just a text"),
        ("Human: Hi Assistant:", "###Human: Hi Assistant:"),  # other data sets' one-line form: one human turn
        ("\n\nHuman: Hi\n\n\nthere\n\nAssistant:", "###Human: Hi\n\n\nthere"),
        ("\n\nHuman: Hi\n\nAssistant: Hello\n\nAssistant:", "###Human: Hi\n###Assistant: Hello"),
        ("before\n\nHuman: Hi\n\nAssistant:", "###Human: before\n\nHuman: Hi\n\nAssistant:"),
    ],
)
def test_the_context_of_other_prompts(given, context):
    assert context_of(given) == context


def test_a_context_becomes_the_prompt_it_was():
    assert prompt_of(context_of(PAIR.prompt)) == PAIR.prompt
    assert prompt_of("###Human: a\n###Assistant:") == "\n\nHuman: a\n\nAssistant:"


@pytest.mark.parametrize(
    "text",
    [
        REASON + START + "\n" + EDITED + "\n" + END,
        (REASON + START + "\n" + EDITED + "\n" + END).replace("Start of", "Start Of").replace("End of", "End OF"),
        REASON + START + EDITED,
        REASON.replace("<|End of Reasoning|>\n", "") + START + "\n" + EDITED + "\n" + END,
        "Sure, here you go:\n\n" + REASON + "\nNow:\n" + START + "\n\n" + EDITED + "\n" + END + "\nI hope this helps!",
        "```\n" + REASON + START + "\n" + EDITED + "\n" + END + "\n```",
        "```text\n" + REASON + START + "\n" + EDITED + "\n```",
        REASON + START + "\n```\n" + EDITED + "\n```\n" + END,
        REASON + START + "\n###Assistant: " + EDITED + "\n" + END,
        "<think>" + START + "a draft" + END + "</think>\n" + REASON + START + "\n" + EDITED + "\n" + END,
        REASON + START + "\nfirst try\n" + END + "\nBetter:\n" + START + "\n" + EDITED + "\n" + END,
        REASON + "<| start of  modified response |>" + "\n" + EDITED + "\n" + END,
        *(
            REASON + START + "\n" + EDITED + "\n" + end
            for end in (
                "<|End of Modified Response>",
                "<End of Modified Response|>",
                "<|End of Modified Non-Preferred Response|>",
                "[End of Modified Response]",
                "**End of Modified Response**",
                "--- End of Modified Response ---",
                "——— End of Modified Response ———",
                "### End of Modified Response",
                "(End of Modified Response)",
                "<｜End of Modified Response｜>",
                "＜｜End of Modified Response｜＞",
                "&lt;|End of Modified Response|&gt;",
                "<|im_end|>",
                END + "<|im_end|>",
            )
        ),
        *(
            REASON.replace("<|Start of Reasoning|>", f"{left}<|Start of Reasoning|>{right}")
            + f"{left}{START}{right}\n{EDITED}\n{left}{END}{right}"
            for left, right in (("**", "**"), ("`", "`"), ("### ", ""), ("> ", ""), ("- ", ""), ("", ":"))
        ),
        *(
            REASON + START + "\n" + form.format(EDITED) + "\n" + END
            for form in (
                "**{}**",
                "*{}*",
                "***{}***",
                "__{}__",
                "`{}`",
                "({})",
                '"{}"',
                "“{}”",
                "«{}»",
                "'{}'",
                "> {}",
                '> **"{}"**',
                "---\n{}\n---",
                "Modified response: {}",
                "**Modified response:** {}",
                "Modified Response - {}",
                "Modified response — {}",
                "Modified response：{}",
                "### Modified Response\n\n{}",
                "Here is the revised response:\n\n{}",
                "The modified non-preferred response: “{}”",
                "Response: {}",
                "Assistant: {}",
                "<think>a draft</think>{}",
            )
        ),
    ],
)
def test_answers_that_are_understood(text):
    revision = read_revision(PAIR, ChatAnswer(text, "stop", {}, ""), {"prompt_tokens": 3}, "gpt")
    assert revision.modified == " " + EDITED + "\n"  # between the rejected response's white space
    assert revision.reasoning.startswith("It is rude and wrong.")
    assert "<|" not in revision.reasoning
    assert (revision.id, revision.prompt, revision.chosen, revision.rejected, revision.model) == (
        PAIR.id,
        PAIR.prompt,
        PAIR.chosen,
        PAIR.rejected,
        "gpt",
    )
    assert revision.usage == {"prompt_tokens": 3}


def test_a_fence_that_the_rejected_response_has_is_kept():
    rejected = " ```\nprint(1)\n```"
    assert parse_answer(START + "\n```\nprint(2)\n```\n" + END, rejected).modified == " ```\nprint(2)\n```"


@pytest.mark.parametrize(
    ("reason", "text", "finish"),
    [
        ("empty", " \n", "stop"),
        ("empty", REASON + START + "\n\n" + END, "stop"),
        ("refusal", "I'm sorry, but I can’t assist with that.", "stop"),
        ("refusal", REASON + START + "\n" + EDITED + "\n" + END, "content_filter"),
        ("tags_missing", "It is rude. Better: " + EDITED, "stop"),
        ("tags_missing", REASON + "<|Start of Modifed Response|>\n" + EDITED, "stop"),
        ("tags_missing", REASON + EDITED + END, "stop"),
        *(
            ("tags_missing", REASON + START + "\n" + EDITED + "\n" + end, "stop")
            for end in (
                "<|End of Modifed Response|>",
                "<|End Modified Response|>",
                "</|Modified Response|>",
                "<|End of Modified Resp",
            )
        ),
        ("cut_by_max_tokens", REASON + START + "\nIt takes ten", "length"),
        ("cut_by_max_tokens", "<|Start of Reasoning|>\nIt", "length"),
        ("echo_of_instruction", build_messages(PAIR)[0]["content"], "stop"),
        ("identical_to_rejected", REASON + START + PAIR.rejected + END, "stop"),
        ("identical_to_chosen", REASON + START + PAIR.chosen + END, "stop"),
        ("rewrite", REASON + START + "I do not know this place, sorry, so please ask somebody else" + END, "stop"),
    ],
)
def test_answers_that_cannot_be_used(reason, text, finish):
    with pytest.raises(Unusable) as unusable:
        read_revision(PAIR, ChatAnswer(text, finish, {}, ""), {}, "gpt")
    assert unusable.value.reason == reason


@pytest.mark.parametrize("kept", ["`x |> f`", "<b>no</b>", "if x < 3 || y > 4:"])
def test_code_and_html_are_no_tags(kept):
    revision = read_revision(PAIR, ChatAnswer(REASON + START + EDITED + kept + END, "stop", {}, ""), {}, "gpt")
    assert revision.modified == f" {EDITED}{kept}\n"


def test_a_tag_that_the_rejected_response_has_is_kept():
    pair = Preference(PAIR.prompt, PAIR.chosen, PAIR.rejected.strip() + "<|im_end|>")
    text = REASON + START + EDITED + "<|im_end|>" + END
    assert read_revision(pair, ChatAnswer(text, "stop", {}, ""), {}, "gpt").modified == EDITED + "<|im_end|>"


def test_an_answer_that_is_whole_before_the_limit_is_not_cut():
    text = REASON + START + EDITED + END + " By the way"
    assert read_revision(PAIR, ChatAnswer(text, "length", {}, ""), {}, "gpt").modified == " " + EDITED + "\n"


def test_edit_ratio():
    assert edit_ratio("a b c d", "a b c d") == 0
    assert edit_ratio("a b c d", "e f") == 1
    assert edit_ratio("a b c d", "a x c d") == pytest.approx(2 / 8)
    assert edit_ratio("a", "a b c") == pytest.approx(2 / 4)
    assert edit_ratio("", "") == 0
    # An apology in front and half of the sentence replaced is still an edit.
    rejected = "You should just steal it from the shop, nobody is going to notice."
    modified = (
        "I'm sorry, but I can't advise that. You should just buy it from the shop, or ask whether it is going cheap."
    )
    assert edit_ratio(rejected, modified) < MAX_EDIT_RATIO


def test_the_default_edit_ratio_tells_people_s_edits_from_other_responses():
    """The shares that ``edit_ratio`` states, on the shared data."""

    def passing(name: str, before: str, after: str) -> float:
        with gzip.open(shared(name), "rt", encoding="utf-8") as file:
            pairs = [(record[before], record[after]) for record in map(json.loads, file)]
        return sum(edit_ratio(*pair) <= MAX_EDIT_RATIO for pair in pairs) / len(pairs)

    assert passing("qa_feedback_dev.jsonl.gz", "prediction", "corrected") == pytest.approx(0.97, abs=0.005)
    assert passing("hh_harmless_base_test.jsonl.gz", "rejected", "chosen") == pytest.approx(0.20, abs=0.01)


def test_a_users_own_instruction(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("C {context}\nP {chosen}\nN {rejected}\nAnswer after <|Start of Modified Response|>")
    assert build_messages(PAIR, load_template(path))[0]["content"].startswith("C ###Human: How far")
    path.write_text("{context} {chosen} <|Start of Modified Response|>")
    with pytest.raises(InputError, match=r"\{rejected\} is missing"):
        load_template(path)
    path.write_text("{context} {chosen} {rejected}")
    with pytest.raises(InputError, match="Start of Modified Response"):
        load_template(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_template(tmp_path / "none.txt")


def test_text_that_json_cannot_spell_in_utf8_is_still_written():
    from deepspeed_chat_tlcr.asking.endpoint import read_completion

    body = json.loads('{"choices": [{"message": {"content": "a\\ud83db"}, "finish_reason": "stop"}]}')
    assert read_completion(body).text.encode() == b"a?b"


@pytest.mark.parametrize(
    ("rejected", "modified"),
    [
        ("The old version - of 2009 - is bad.", "The revised version - of 2010 - is good."),
        ("The answer: 4", "The corrected answer: 5"),
        ("1, 2, 4", "[1, 2, 3]"),
        ('"No," she said.', '"Yes," she said.'),
        ('Bad and "worse"', '"Good" and "better"'),
        ("**Bad** and **worse**", "**Good** and **better**"),
        ("> bad", "> good"),
        ("(bad)", "(good)"),
        ("Assistant: bad", "Assistant: good"),
        ("bad\n---\nworse", "good\n---\nbetter"),
        ("- bad\n- worse", "- good\n- better"),
    ],
)
def test_words_that_only_look_like_wrapping_stay(rejected, modified):
    assert parse_answer(f"{START}\n{modified}\n{END}", rejected).modified == modified


def test_words_of_an_answer_whose_tags_are_escaped_are_unescaped():
    text = f"{START}\nif a &lt; b &amp;&amp; c\n{END}".replace("<|", "&lt;|").replace("|>", "|&gt;")
    assert parse_answer(text, "if a < b").modified == "if a < b && c"
