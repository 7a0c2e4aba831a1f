"""How programs are run and weighed: plates, particles, log weights, effect handlers, checks."""
