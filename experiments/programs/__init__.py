"""Small programs on which the estimators are compared; `experiments/other_fields.py` trains those with a reference."""
