"""In: a protocol's JSON. Out: an Order; and of its News that JSON again. Translation alone, a file each."""
