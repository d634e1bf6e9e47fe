"""Entry points: one stage, one file, one command. Read a table, call the library, write a table."""
