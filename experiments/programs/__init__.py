"""Small programs on which estimators are compared; `other_fields.py` trains those that have a reference."""
