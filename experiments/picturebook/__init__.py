"""Training of the picture-book model, a module a part."""
