"""The live canvas. In: events. Out: what a terminal, a pipe or a recording shows."""
