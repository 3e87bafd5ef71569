"""Section 4.1: an external LLM revises the rejected response; Levenshtein turns that into token labels."""
