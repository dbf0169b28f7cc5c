"""Core: ranks and groups, sequence layout, collectives, documents, and files and memory of the host."""
