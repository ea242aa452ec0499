"""Weight files: names, descriptions, strict loading, building a model from one."""
