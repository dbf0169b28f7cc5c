"""What a training job needs and how long a step takes, reckoned before anything is allocated."""
