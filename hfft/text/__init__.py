"""What text tasks have in common, and image tasks do without."""
