"""The commands of `compiled-dilated`, one file each."""
