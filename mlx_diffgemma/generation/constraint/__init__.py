"""Conditioning a canvas on a language, exactly. In: the parts of a language, hidden states, the embedding table. Out:
the constraint, and what a step reads under it."""
