"""Many experiments from one file: the grid, the engines that run it, its results, its claims."""
