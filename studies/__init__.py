"""The findings of the density papers, tested on the models that we have."""
