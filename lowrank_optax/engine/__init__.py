"""The guarded step, and the two ways to see parameters: as vectors and as matrices."""
