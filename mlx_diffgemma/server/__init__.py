"""In: HTTP requests. Out: answers, as they come. Protocols are translated into one Order, and back from one stream of
News; one thread holds the model."""
