"""What others measured, read from their tables: fitted or packed into `profiles/data`."""
