"""What people give and get. In: texts and messages, or ids. Out: ids, or texts, thoughts and tool calls."""
