"""What other libraries do to a model, one file each, imported only on use."""
