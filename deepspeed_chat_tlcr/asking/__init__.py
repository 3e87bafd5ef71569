"""Ask a chat model many questions, none of them twice: endpoint, pace, money, journal, and a whole run.

Independent of revisions and ratings: a request brings the function that reads its answer.
"""
