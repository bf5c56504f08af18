"""In: a model and this machine. Out: what fits, what a step takes, what machines send each other."""
