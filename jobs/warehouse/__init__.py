"""The Delta tables of a warehouse: schemas, reading and writing, the writer lock, releases and reports."""
