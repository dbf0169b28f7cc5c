"""One script per question; `common` holds what they share, `block` the ways to run one transformer block."""
