"""Pictures of token rewards, training and results, for a page, a terminal and a paper.

``TokenScores`` is drawn by ``heatmap_html``, ``heatmap_terminal`` and ``heatmap_png``; ``Series`` by ``line_chart``.
Functions that make ``Html`` escape every other string they are given: what a model wrote is hostile input.
"""

from deepspeed_chat_tlcr.pictures.charts import (
    Series,
    bar_chart,
    histogram,
    line_chart,
    missing_chart,
    point_chart,
    smooth,
)
from deepspeed_chat_tlcr.pictures.colors import DARK, LIGHT, token_color
from deepspeed_chat_tlcr.pictures.heatmap import (
    Sample,
    TokenScores,
    explained,
    heatmap_html,
    heatmap_terminal,
    legend_html,
    sample_html,
)
from deepspeed_chat_tlcr.pictures.page import cards, columns, number, origin, page, paragraph, table_html, write_page
from deepspeed_chat_tlcr.pictures.radar import radar_chart
from deepspeed_chat_tlcr.pictures.text import Html, escape, join, long_text, shorten, token_strings, visible
