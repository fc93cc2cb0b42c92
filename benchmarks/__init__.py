"""What Millrace's own work costs, measured against the bare thing. Each module is a program that states its ratio."""
