"""From a checkpoint to what somebody else loads: weights made to fit a named network, and said what was done to each."""
