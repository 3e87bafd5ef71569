"""Step 2 of RLMEC: a generative reward model, trained to rewrite answers with few edits."""
