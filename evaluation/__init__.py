"""Every figure and table of the paper for the user's own models, and QA-feedback from end to end."""
