"""Other runtimes' formats: a trained model as a folder that needs none of this repository."""
