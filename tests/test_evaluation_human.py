"""Voting pages used in a real browser, and the counting of what comes back."""

import json
import time

import numpy as np
import pytest
from chromium import browsing
from conftest import patience, write_jsonl

from deepspeed_chat_tlcr.pictures import visible
from evaluation.human import count, make
from evaluation.policies import Reply, answer_line
from evaluation.prompts import prompt_id
from evaluation.stats import fleiss_kappa, share_interval, wilson_interval

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u202e\ud800😀 $& POLICY DATA"
PROMPTS = ["What is a tree?", HOSTILE, "Third", "Fourth"]


def study(folder, annotators=("ann", "bob"), models=("sft", "tlcr", "dpo"), *more):
    write_jsonl(folder / "prompts.jsonl", [{"instruction": text} for text in PROMPTS])
    entries = []
    for name in models:
        lines = [
            answer_line(name, prompt_id(text), Reply([f"{name[::-1]}#{i} {HOSTILE}"], [3], [True]))
            for i, text in enumerate(PROMPTS)
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        entries.append(f"{name}={folder / f'{name}.jsonl'}")
    arguments = ["--answers", *entries, "--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / "out")]
    make.main([*arguments, "--annotators", *annotators, *more])
    return folder / "out" / "human"


def test_the_question_cannot_act_on_the_page(tmp_path):
    """A right-to-left override in it would turn round what is asked; it is spelled out, as in prompts and answers."""
    human = study(tmp_path, ("ann",), ("sft", "tlcr"), "--question", "Which is \u202eretteb\x1b\u2066?")
    page = (human / "pages" / "ann.html").read_text()
    assert not any(mark in page for mark in "\u202e\x1b\u2066")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["question"] == "Which is \\u202eretteb\\x1b\\u2066?"


def vote_for(human, annotator: str, choices: list[str]) -> dict:
    """The file that a page exports after votes for these models, item by item in the key's order."""
    key = json.loads((human / "key.json").read_text())
    shown = key["slots"][annotator]
    votes = {
        id: name if name == "tie" else names.index(name)
        for (id, names), name in zip(shown.items(), choices, strict=True)
    }
    return {"study": key["study"], "annotator": annotator, "items": len(shown), "votes": votes}


def save(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_vote_reload_go_on_export_in_a_browser(tmp_path):
    human = study(tmp_path)
    page = human / "pages" / "ann.html"
    assert not any(name in page.read_text() for name in ("sft", "tlcr", "dpo"))
    key = json.loads((human / "key.json").read_text())
    order = list(key["slots"]["ann"])
    with browsing(tmp_path) as tab:
        place = "document.getElementById('place').textContent"
        tab.open(page)
        assert tab.run("document.title") == "Which answer is better?"
        tab.until(f"{place} === '1 of 4, 0 voted on'")
        first = PROMPTS[[prompt_id(text) for text in PROMPTS].index(order[0])]
        assert tab.run("document.getElementById('prompt').textContent") == visible(first)
        tab.press("ArrowRight")  # not before there is a vote
        assert tab.run(place).startswith("1 of 4")
        tab.press("2")
        tab.press("0")
        tab.press("9")  # no such answer
        tab.until(f"{place} === '3 of 4, 2 voted on'")

        tab.reload()
        tab.until(f"{place} === '3 of 4, 2 voted on'")
        tab.press("ArrowLeft")
        tab.press("ArrowLeft")
        pressed = "[...document.querySelectorAll('.answer')].map((one) => one.getAttribute('aria-pressed'))"
        tab.until(f"String({pressed}) === 'false,true,false'")
        tab.press("3")  # another mind
        tab.press("ArrowRight")
        tab.press("1")
        tab.run("document.querySelectorAll('.answer')[1].click()")
        tab.until("!document.getElementById('end').hidden")
        tab.press("e")
        file = tmp_path / "votes-ann.json"
        deadline = time.monotonic() + patience(20)
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)
        votes = json.loads(file.read_text())
        assert votes == {
            "study": key["study"],
            "annotator": "ann",
            "items": 4,
            "votes": dict(zip(order, [2, "tie", 0, 1], strict=True)),
        }
        assert tab.run("document.title") == "Which answer is better?"
        assert tab.complaints == []
        for width, mobile in ((390, True), (1280, False)):
            tab.screen(width, 800, mobile=mobile)
            assert tab.run("document.documentElement.scrollWidth") <= width
    annotator, chosen = count.read_votes(str(file), key)
    assert (annotator, chosen[order[0]]) == ("ann", key["slots"]["ann"][order[0]][2])


def test_answers_are_shuffled_by_item_and_annotator(tmp_path):
    key = json.loads((study(tmp_path, ("ann", "bob", "cy")) / "key.json").read_text())
    orders = [tuple(names) for shown in key["slots"].values() for names in shown.values()]
    assert len(set(orders)) > 3
    assert all(sorted(names) == ["dpo", "sft", "tlcr"] for names in orders)
    assert len({tuple(shown) for shown in key["slots"].values()}) > 1


def test_votes_are_counted(tmp_path):
    human = study(tmp_path)
    files = [
        save(tmp_path / "a.json", vote_for(human, "ann", ["tlcr", "tlcr", "sft", "tie"])),
        save(tmp_path / "b.json", vote_for(human, "bob", ["tlcr", "tlcr", "tlcr", "tlcr"])),
    ]
    count.main(["--votes", *files, "--out", str(tmp_path / "out")])
    results = json.loads((human / "results.json").read_text())
    assert results["shares"] == {"sft": 1 / 8, "tlcr": 6 / 8, "dpo": 0, "tie": 1 / 8}
    assert (results["votes"], results["items"], results["annotators"]) == (8, 4, 2)
    assert results["by_annotator"]["ann"]["tlcr"] == 0.5
    low, high = results["intervals"]["tlcr"]
    assert low < 0.75 <= high
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Preferred answers" in page
    assert "45.23" in page


def corrupt(votes: dict, what: str) -> dict:
    first = next(iter(votes["votes"]))
    changed = {**votes, "votes": dict(votes["votes"])}
    if what == "incomplete":
        del changed["votes"][first]
    elif what == "foreign":
        changed["votes"]["x"] = 0
    elif what == "slot":
        changed["votes"][first] = 3
    elif what == "negative":
        changed["votes"][first] = -1
    elif what == "study":
        changed["study"] = "x"
    elif what == "stranger":
        changed["annotator"] = "eve"
    return changed


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("incomplete", "incomplete, 1 of 4 items"),
        ("foreign", "not on the page"),
        ("slot", "3 is not a vote"),
        ("negative", "-1 is not a vote"),
        ("study", "votes on other items"),
        ("stranger", "'eve' has no page"),
    ],
)
def test_files_that_cannot_be_counted_are_refused(tmp_path, what, words, capsys):
    human = study(tmp_path, ("ann",))
    file = save(tmp_path / "a.json", corrupt(vote_for(human, "ann", ["sft"] * 4), what))
    with pytest.raises(SystemExit) as exit:
        count.main(["--votes", file, "--out", str(tmp_path / "out")])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_duplicates_absent_people_and_other_files_are_refused(tmp_path, capsys):
    human = study(tmp_path)
    file = save(tmp_path / "a.json", vote_for(human, "ann", ["sft"] * 4))
    other = save(tmp_path / "other.json", [1])
    for files, words in [
        ([file, file], "ann is counted already"),
        ([file], "nothing from bob"),
        ([other], "not a file that a voting page exported"),
        (["/no/such"], "cannot be read"),
    ]:
        with pytest.raises(SystemExit):
            count.main(["--votes", *files, "--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().err
    count.main(["--votes", file, "--allow_missing_annotators", "--out", str(tmp_path / "out")])
    results = json.loads((human / "results.json").read_text())
    assert results["absent"] == ["bob"]
    assert results["fleiss_kappa"] is None


def test_pages_of_another_study_are_not_overwritten(tmp_path, capsys):
    study(tmp_path)
    with pytest.raises(SystemExit):
        study(tmp_path, ("ann", "eve"))
    assert "belongs to other pages" in capsys.readouterr().err


# The example of Fleiss (1971) as it is usually given: 14 annotators, 10 items, 5 categories, kappa = 0.210.
FLEISS = """0 0 0 0 14 / 0 2 6 4 2 / 0 0 3 5 6 / 0 3 9 2 0 / 2 2 8 1 1
 / 7 7 0 0 0 / 3 2 6 3 0 / 2 5 3 2 2 / 6 5 2 1 0 / 0 2 2 3 7"""


def test_fleiss_kappa_is_the_published_one_and_that_of_pairs():
    counts = np.array([[int(n) for n in row.split()] for row in FLEISS.split("/")])
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    # Independently: the chance that two annotators of an item agree, against two votes of the whole study.
    votes = [[k for k, n in enumerate(row) for _ in range(n)] for row in counts]
    agree = np.mean([np.mean([a == b for i, a in enumerate(v) for j, b in enumerate(v) if i != j]) for v in votes])
    everything = np.concatenate(votes)
    chance = np.mean(everything[:, None] == everything[None, :])
    assert fleiss_kappa(counts) == pytest.approx((agree - chance) / (1 - chance))
    assert fleiss_kappa([[2, 0], [0, 2]]) == 1
    assert np.isnan(fleiss_kappa([[2, 0], [2, 0]]))
    for bad in ([[1, 0], [0, 1]], [[2, 0], [0, 3]], []):
        with pytest.raises(ValueError, match="same number of annotators"):
            fleiss_kappa(np.array(bad))


def test_intervals_of_shares():
    assert share_interval(np.array([1, 0, 1, 1]), 1) == pytest.approx(wilson_interval(3, 4))
    # Three annotators who always agree are one measurement an item, not three.
    votes = np.random.default_rng(0).integers(0, 2, 200) * 3
    low, high = share_interval(votes, 3)
    share = votes.mean() / 3
    half = 1.96 * np.sqrt(share * (1 - share) / 200)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.01)
    assert share_interval(np.zeros(50), 3) == pytest.approx(wilson_interval(0, 50))
