"""Measure estimators on a program: bias, variance, signal-to-noise ratio and cost."""
