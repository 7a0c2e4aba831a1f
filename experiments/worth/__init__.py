"""What `likelihoods.py` measures, and its page."""
