"""Token files, the order in which their documents are read, and the samples that a step takes."""
