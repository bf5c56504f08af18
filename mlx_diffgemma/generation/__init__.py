"""From ids to ids. In: a network, prompts of ids, settings, noise. Out: one stream of events."""
