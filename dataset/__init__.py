"""The data: records, loss mask, data set and collation."""
