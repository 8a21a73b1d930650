"""What contrastive tasks have in common, and others do without."""
