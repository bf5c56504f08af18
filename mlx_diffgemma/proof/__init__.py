"""What `check` replays. In: recordings of the reference, and this machine. Out: findings."""
