"""A live page: draw a character and watch q(a | x) over the memory; `python -m vma_pyro.demo`."""
