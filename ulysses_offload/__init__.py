"""The commands that an installation gives: `ulysses-pretrain` and the like, each one of the repository's scripts."""
