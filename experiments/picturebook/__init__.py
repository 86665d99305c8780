"""Training of the picture-book model, one Lightning module a part: `python -m experiments.picturebook.all`."""
