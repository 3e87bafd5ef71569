"""TLCR on a real language model and people's own edits: toxic sentences and their minimal rewrites (ParaDetox)."""
