"""Preference data: what records look like, where they come from, how they are split, what stages get."""
