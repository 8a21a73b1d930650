"""What tasks on images share: how an image becomes a model's input."""
