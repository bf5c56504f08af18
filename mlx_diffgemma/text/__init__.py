"""What people give and get: messages and texts come in, ids go to the model; its ids come back as texts and calls."""
