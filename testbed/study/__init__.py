"""The study: what ``registration`` has fixed, as chains of the real entry points over shared artefacts (``methods``)."""
