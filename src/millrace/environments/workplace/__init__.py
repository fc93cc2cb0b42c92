"""The office of the domain `workplace_assistant`: its tables, the tools that read and change them, data and tasks."""
