"""Parts of :func:`margeq.optimize_marglik`: MAP steps, starts, inner solvers, one run."""
