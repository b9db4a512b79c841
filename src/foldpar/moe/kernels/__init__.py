"""Products over groups of rows, permutations and activations: plain torch, with Triton twins where a GPU is there."""
