"""One script a table or figure of the paper, and the training of the picture-book model."""
