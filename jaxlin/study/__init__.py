"""Studies: grids of runs that are trained, measured and reported together."""
