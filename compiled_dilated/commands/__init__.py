"""What `compiled-dilated` can do, one file per command."""
