"""Revisions without a model: the chosen response as the modified one (--reviser chosen)."""

from collections.abc import Iterator

from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.progress import Totals
from deepspeed_chat_tlcr.data.preferences import Preferences
from labeling.revising import describe, revision_of
from labeling.selection import Selection, stream, to_ask


def copy_chosen(output_dir: str, preferences: Preferences, selection: Selection, settings: dict) -> int:
    """The ablation that the paper argues against: y_m = y_c, so that labels compare two unrelated responses."""
    with RunFolder(output_dir) as folder:
        folder.bind(settings)
        state = folder.read_state()
        positions, _ = to_ask(selection, state, 1, False)

        def lines() -> Iterator[str]:
            pairs = stream(preferences, selection.indices[positions])
            for pair in pairs:
                yield revision_of(pair, pair.chosen, "", "chosen", {}).to_json()

        folder.add_lines(folder.results, lines())
        totals = Totals(len(selection), len(selection), 0, state, None, 0.0, 0.0)
        summary = totals.summary(settings, {}, complete=True, stopped=None)
        folder.write_summary(summary)
        print(describe(summary, folder.path))
    return 0
