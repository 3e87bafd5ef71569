"""The study: what ``registration`` has fixed, as chains of the real entry points over artefacts that they share."""
