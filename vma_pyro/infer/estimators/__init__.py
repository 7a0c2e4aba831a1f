"""Objectives and gradient estimators, one idea a file."""
