"""Update rules of the solvers, one file each; `registry` finds them by name."""
