"""Software engineering: rows, prompts, edits of files in memory, checkouts, an agent's editor, and the run of tests."""
