"""Revisions that no model is asked for: the chosen response in the modified one's place (--reviser chosen)."""

from collections.abc import Iterator

from deepspeed_chat_tlcr.asking.journal import RunFolder
from deepspeed_chat_tlcr.asking.progress import Totals
from deepspeed_chat_tlcr.data.preferences import Preferences
from deepspeed_chat_tlcr.records import Revision
from labeling.revising import describe
from labeling.selection import Selection, stream, to_ask


def copy_chosen(output_dir: str, preferences: Preferences, selection: Selection, settings: dict) -> int:
    """The ablation the paper argues against: y_m = y_c, so labels come from comparing two unrelated responses."""
    with RunFolder(output_dir) as folder:
        folder.bind(settings)
        state = folder.read_state()
        positions, _ = to_ask(selection, state, 1, False)

        def lines() -> Iterator[str]:
            pairs = stream(preferences, selection.indices[positions])
            for pair, id in zip(pairs, selection.ids[positions], strict=True):
                revision = Revision(id.decode(), pair.prompt, pair.chosen, pair.rejected, pair.chosen, "", "chosen", {})
                yield revision.to_json()

        folder.add_lines(folder.results, lines())
        totals = Totals(len(selection), len(selection), 0, state, None, 0.0, 0.0)
        summary = totals.summary(settings, {}, complete=True, stopped=None)
        folder.write_summary(summary)
        print(describe(summary, folder.path))
    return 0
