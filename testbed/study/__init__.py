"""The study: every method of the paper's table, several seeds, on worlds whose true score is known.

A run is a chain of commands of the real entry points over artefacts that methods share (``artefacts``); ``methods``
names the chains, ``main`` runs them, ``analysis`` and ``pages`` say what came out.
"""
