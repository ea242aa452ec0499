"""What a data set holds and what is wrong with it: the parts of `python -m dataset.doctor`."""
