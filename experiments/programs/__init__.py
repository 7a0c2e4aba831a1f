"""Programs of other fields, and two small ones: model, guide and data, each in one file."""
