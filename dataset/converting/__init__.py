"""Other projects' layouts, turned into records: the parts of `python -m dataset.convert`."""
