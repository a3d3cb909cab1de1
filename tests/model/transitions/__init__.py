"""The transition model: which steps the algorithm may take, and in which order; see `table`."""
