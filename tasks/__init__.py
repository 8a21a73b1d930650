"""The tasks that come with hfft, one file each; a new file here is a new task."""

if __name__ != "hfft.tasks":  # else every task would be registered twice
    raise ImportError(f"import this package as hfft.tasks, not as {__name__}")
