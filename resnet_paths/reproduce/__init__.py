"""Running the notebooks and training the networks that the project ships."""
