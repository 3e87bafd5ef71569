"""A chat model asked many questions, none of them twice: endpoint, pace, money, journal, and one run to its end.

Knows nothing of revisions or ratings: a request brings the function that reads its answer.
"""
