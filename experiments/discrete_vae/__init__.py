"""The field's benchmark of estimators for discrete latents: variational autoencoders on small binary images.

`programs` are model and guide, `images` the data, `recorded` an update without Python, `runs` trains, and `scores`
measures what has been trained.
"""
