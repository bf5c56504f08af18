"""In: what an answer must obey. Out: that in the tokens of a model, and a canvas that begins with what is known."""
