"""Training a prior: batches of pairs, the loop, and how good the result is."""
