"""In: which machine this one is. Out: which rows of a matrix are its own, and the pieces of all put side by side."""
