"""Token files, the order in which their documents are read, and the samples of each step."""
