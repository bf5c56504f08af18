"""What is on disk. In: folders and repositories. Out: checked headers and configs, networks; and back."""
