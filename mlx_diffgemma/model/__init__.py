"""What the weights compute. In: ids or embeddings, and a prefix cache. Out: hidden states; what it needs in bytes."""
