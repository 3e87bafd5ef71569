"""Human votes (Figure 5): pages for annotators, and the counting of what they send back."""
