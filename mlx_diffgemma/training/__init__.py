"""Fine-tuning. In: a network and examples. Out: events of training; adapters and weights, by the files wing."""
