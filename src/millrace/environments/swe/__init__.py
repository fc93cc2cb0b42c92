"""Software engineering without execution: files in memory, edits of them, prompts."""
