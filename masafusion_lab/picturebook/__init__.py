"""The picture-book world: scenes, edits with ground truth, and the model trained on them."""
