"""A model under several conditions on the same samples. Knows no config, run folder or data set."""
