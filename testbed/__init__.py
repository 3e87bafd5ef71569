"""A synthetic preference world whose true score is known, so that a better policy can be told from a worse one."""
